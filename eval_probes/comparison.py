"""Runs against the first of them: what the newest checkpoints scored on the same images by the same protocols.

In: groups of readings. Out: differences with the p of a paired test, adjusted for how many were made (Holm), and a
verdict that claims no more than that. The test is over test images: it does not know what another training seed would
have done.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from eval_probes.intervals import holm
from eval_probes.readings import Group, Reading, short_names
from eval_probes.results import paired_p
from selfsight.errors import UserError

ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """`other` against `base`: the newest checkpoint of either."""

    protocol: str
    digest: str
    metric: str
    base: Reading
    other: Reading
    p: float | None = None  # None: no values per image were kept, or the weights are the same
    adjusted: float | None = None  # p, for all the tests made beside it
    verdict: str = ""

    @property
    def difference(self) -> float:
        return self.other.score.value - self.base.score.value

    def to_dict(self) -> dict:
        """JSON-able."""
        sides = {
            name: {"run": r.run, "step": r.step, "value": r.score.value, "weights_digest": r.score.weights_digest}
            for name, r in (("base", self.base), ("other", self.other))
        }
        measured = {key: getattr(self, key) for key in ("protocol", "digest", "metric")}
        tested = {key: getattr(self, key) for key in ("difference", "p", "adjusted", "verdict")}
        return {**measured, "unit": self.base.score.unit, **sides, **tested}


def compare(groups: Sequence[Group], *, every_metric: bool = False) -> list[Comparison]:
    """Every further run against the first, by the metric that stands for each protocol, or by `every_metric`. Raises
    UserError when there are no two runs, or nothing was measured on both."""
    runs = list(dict.fromkeys(run for group in groups for run in group.runs))
    if len(runs) < 2:
        raise UserError("there is one run only: give two or more to compare")
    found = [
        Comparison(g.protocol, g.digest, metric, base, other, _p(base, other))
        for g in groups
        for metric in (g.metrics if every_metric else [g.headline])
        for base in _newest(g.metrics[metric], runs[0])
        for run in runs[1:]
        for other in _newest(g.metrics[metric], run)
    ]
    if not found:
        names = ", ".join(short_names(runs).values())
        raise UserError(f"nothing was measured on two of {names} alike: run one suite on both, on the same corpora")
    adjusted = iter(holm([c.p for c in found if c.p is not None]))
    names = short_names(runs)
    return [_judged(replace(c, adjusted=None if c.p is None else next(adjusted)), names) for c in found]


def _newest(readings: Sequence[Reading], run: str) -> list[Reading]:
    return [r for r in readings if r.run == run][-1:]


def _p(base: Reading, other: Reading) -> float | None:
    same = base.score.weights_digest == other.score.weights_digest
    return None if same else paired_p(other.score, base.score)


def _judged(c: Comparison, names: dict[str, str]) -> Comparison:
    better = c.base.score.better
    ahead = c.other if (c.difference > 0) == (better != "lower") else c.base
    if c.base.score.weights_digest == c.other.score.weights_digest:
        verdict = "the same weights"
    elif c.adjusted is None:
        verdict = "not tested"
    elif c.adjusted >= ALPHA:
        verdict = "no difference shown"
    else:
        verdict = f"{names[ahead.run]} is {'higher' if better == 'none' else 'better'}"
    return replace(c, verdict=verdict)
