"""Scores as they are read: from runs and results stores, folded to one reading per measurement, those that may be
compared side by side.

In: run folders and results.sqlite files. Out: `Group`s. Of the same measurement made twice the newest holds.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from eval_probes.protocol import MODULES
from eval_probes.results import ResultsStore, Score
from eval_probes.subject import PIXELS
from selfsight.errors import UserError
from selfsight.weights.folder import Export
from selfsight.weights.run import exports, is_run

RESULTS = "results.sqlite"  # of a run


@dataclass(frozen=True)
class Reading:
    """A score with whose it is."""

    run: str  # folder of the run; else the path of the weights, or "pixels"
    step: int | None  # of the checkpoint
    score: Score


@dataclass(frozen=True)
class Group:
    """What one protocol gave on one pair of corpora: only such scores may be compared."""

    protocol: str
    digest: str
    train: str | None  # corpus ids
    test: str | None
    metrics: dict[str, list[Reading]]  # the metric that stands for the protocol first; by run, then by step

    @property
    def headline(self) -> str:
        return next(iter(self.metrics))

    @property
    def runs(self) -> list[str]:
        """Runs and weights measured here, the baseline of the pixels left out."""
        found = (r.run for readings in self.metrics.values() for r in readings)
        return [run for run in dict.fromkeys(found) if run != PIXELS]


def read(paths: Iterable[str | Path]) -> list[Group]:
    """What stands in runs and results stores. Raises UserError for a path that is neither, or has no scores."""
    readings: list[Reading] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"there is no {path}: give a run or a results.sqlite")
        file = path / RESULTS if path.is_dir() else path
        if path.is_dir() and not is_run(path) and not file.is_file():
            raise UserError(f"{path} is no run: give a folder with a recipe.yaml, or a results.sqlite")
        found = of_store(file)
        if not found:
            raise UserError(f"{path} has no scores yet: `selfsight eval` writes them into a run")
        readings += found
    return grouped(readings)


def of_store(file: Path) -> list[Reading]:
    """Everything in a results store, oldest first; one that lies in a run is taken for the run's own."""
    run = file.parent if file.name == RESULTS and is_run(file.parent) else None
    own = set() if run is None else _digests(run)
    return [_reading(score, run, own) for score in ResultsStore(file).rows()]


def grouped(readings: Iterable[Reading]) -> list[Group]:
    """`readings`, oldest first, in groups: the protocols in the order of their list, runs as they come."""
    newest: dict[tuple, Reading] = {}
    for reading in readings:
        s = reading.score
        key = (s.protocol_digest, s.train_corpus, s.test_corpus, s.metric, reading.run, s.weights_digest)
        newest[key] = reading  # keeps the place of the first
    runs = list(dict.fromkeys(reading.run for reading in newest.values()))
    groups: dict[tuple, Group] = {}
    for (digest, train, test, metric, *_), reading in newest.items():
        empty = Group(reading.score.protocol, digest, train, test, {})
        group = groups.setdefault((digest, train, test), empty)
        group.metrics.setdefault(metric, []).append(reading)
    for group in groups.values():
        for found in group.metrics.values():
            found.sort(key=lambda r: (r.run != PIXELS, runs.index(r.run), -1 if r.step is None else r.step))
    known = list(MODULES)
    return sorted(groups.values(), key=lambda g: known.index(g.protocol) if g.protocol in known else len(known))


def short_names(runs: Sequence[str]) -> dict[str, str]:
    """Each path by as few of its last parts as tell them apart."""
    parts = {run: Path(run).parts for run in runs}
    for n in range(1, max(map(len, parts.values()), default=1) + 1):
        names = {run: "/".join(p[-n:]) for run, p in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {run: run for run in runs}


def _reading(score: Score, run: Path | None, own: set[str]) -> Reading:
    step = score.details.get("weights", {}).get("step")
    if score.weights == PIXELS:
        return Reading(PIXELS, None, score)
    export = Path(score.weights)
    owner = export.parent.parent if export.parent.name == "exports" else export
    # A run may have been moved or copied since, and its older exports removed.
    if run is not None and (score.weights_digest in own or not owner.exists()):
        owner = run
    return Reading(str(owner.resolve()), step, score)


def _digests(run: Path) -> set[str]:
    found = set()
    for export in exports(run).values():
        with suppress(UserError):  # half copied
            found.add(Export.open(export).digest)
    return found
