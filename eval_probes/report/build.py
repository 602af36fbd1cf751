"""A run folder → one HTML file that stands by itself: no script, nothing from the network, pictures inside.

In: the run, and the corpora its encoders are shown on. Out: report.html, written whole or not at all. What there is no
data for is left out with a word about it.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import torch

from eval_probes.features import Collapsed
from eval_probes.pooling import Pooling
from eval_probes.readings import RESULTS, grouped, of_store
from eval_probes.report import gallery, scores, sections
from eval_probes.report.charts import number
from eval_probes.report.runfolder import RunFolder, open_run
from eval_probes.results import Score
from selfsight import __version__
from selfsight.errors import UserError
from selfsight.files import publish
from selfsight.shards.corpus import Corpus


def build_report(
    run: Path, *, train: str | Path | None = None, test: str | Path | None = None, out: Path | None = None
) -> Path:
    """Writes the report of `run` to `out` (default run/report.html) and returns its path.

    `train` is the corpus searched for neighbours (default: the one the recipe names, if it is still there), `test` the
    held-out one whose images are shown (default: images of `train`). Scores are those of run/results.sqlite. Raises
    UserError when `run` is no run or a corpus given is none.
    """
    opened = open_run(Path(run))
    trained_on = _recipe_corpus(opened)
    bank = Corpus.open(train) if train is not None else trained_on
    asked = Corpus.open(test) if test is not None else None
    target = Path(out) if out is not None else opened.path / "report.html"
    write(target, render("template.html", _context(opened, trained_on or bank, bank, asked)))
    return target


def _context(run: RunFolder, trained_on: Corpus | None, bank: Corpus | None, asked: Corpus | None) -> dict[str, Any]:
    readings = of_store(run.path / RESULTS)
    groups, measured = grouped(readings), [reading.score for reading in readings]
    encoders = {n: e for n, e in (("trained", run.trained), ("untrained", run.untrained)) if e is not None}
    why = {
        "scores": _why_no_scores(bank),
        "curves": "No metrics were written: metrics.jsonl is missing or empty.",
        "near": "No pictures: the run has no exports yet." if not encoders else "No pictures: no corpus was found.",
    }
    why["maps"] = why["near"]
    device = "cuda" if torch.cuda.is_available() else None
    near, maps, shown, alarms = None, None, asked or bank, sections.alarms(run)
    if encoders and bank is not None:
        try:
            near = gallery.neighbours(encoders, bank, asked, pooling=_pooling(run, measured), device=device)
        except Collapsed as e:  # a finding, and no reason to lose the rest
            why["near"] = "No pictures: to a collapsed encoder all images are neighbours."
            alarms.append(("Collapsed:", f"{e}."))
    if encoders and shown is not None:
        maps = gallery.maps(encoders, shown, device=device)
    export = run.trained or run.untrained
    labels = None if trained_on is None else trained_on.classes
    curves, constant = sections.curves(run)
    return {
        "version": __version__,
        "name": run.path.resolve().name,
        "where": run.path.resolve(),
        "finding": scores.finding(run, measured),
        "facts": sections.facts(run, None if trained_on is None else trained_on.n, len(labels) if labels else None),
        "alarms": alarms,
        "groups": scores.score_groups(run, groups, _chance(asked)),
        "score_curves": scores.score_curves(run, groups),
        "curves": curves,
        "constant": constant,
        "near": near,
        "maps": maps,
        "asked": "held-out" if asked is not None else "training",
        "why": why,
        "weights": None if export is None else str(export.path.resolve()),
        "digest": None if export is None else export.digest,
        "corpus_id": None if trained_on is None else trained_on.id,
        "recipe": run.recipe_lines,
    }


def _recipe_corpus(run: RunFolder) -> Corpus | None:
    """The corpus the run was trained on, if it is still where the recipe says and still the same."""
    named, export = run.recipe.get("corpus"), run.trained or run.untrained
    if not named:
        return None
    try:
        corpus = Corpus.open(named)
    except UserError:
        return None
    known = export.origin["meta"].get("corpus_id") if export is not None else None
    return corpus if known in (None, corpus.id) else None


def _pooling(run: RunFolder, measured: list[Score]) -> Pooling:
    """The features of the last score of the trained encoder: the same ones are in the cache already."""
    for score in reversed(measured):
        if run.trained is not None and score.weights_digest == run.trained.digest:
            return Pooling.parse(score.details["features"]["tokens"]) if "features" in score.details else Pooling()
    return Pooling()


def _why_no_scores(bank: Corpus | None) -> str:
    if bank is not None and bank.classes is None:
        return "The corpus has no labels, so there is nothing to probe for; the figures below need none."
    return "No scores yet: `selfsight eval knn` and `selfsight eval linear` write them into the run."


def _chance(asked: Corpus | None) -> tuple[str, float] | None:
    """The held-out corpus's id and the accuracy of always answering its most frequent class."""
    labels = None if asked is None else asked.labels()
    if asked is None or labels is None or not len(labels):
        return None
    return asked.id, max(Counter(labels.tolist()).values()) / len(labels)


def render(template: str, context: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("eval_probes", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "count": scores.count, "percent": scores.percent, "pyrepr": repr}
    return environment.get_template(template).render(context)


def write(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with publish(target) as file:
        file.write(text.encode())
