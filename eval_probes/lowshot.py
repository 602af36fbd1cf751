"""Low-shot classification: a probe that learns from few images of each class, drawn again and again.

Features are extracted once; every draw is stratified, and trains one of the probes on kept features, which chooses its
own numbers within the draw. Out: the mean over draws, with the interval that draws alone would give.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eval_probes import knn, linear, logistic, ridge
from eval_probes.bench import Bench
from eval_probes.features import Features, check_pair
from eval_probes.intervals import student
from eval_probes.protocol import FeatureProtocol, find
from eval_probes.results import Score, figure
from selfsight.errors import UserError

PROBES = ("knn", "linear", "logistic", "ridge")


@dataclass(frozen=True)
class LowShot(FeatureProtocol):
    """Either `per_class` images or `percent` of each class's. A percentage leaves at least one image of each class."""

    kind = "lowshot"
    probe: str = "logistic"  # that learns from each draw, with its own defaults: knn, linear, logistic or ridge
    per_class: int | None = None
    percent: float | None = None
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe not in PROBES:
            raise UserError(f"low-shot cannot use {self.probe!r}: choose {', '.join(PROBES)}")
        if (self.per_class is None) == (self.percent is None):
            raise UserError("low-shot takes per_class or percent: give one of them, and null for the other")
        if not isinstance(self.per_class, int | None) or not isinstance(self.percent, int | float | None):
            raise UserError("low-shot takes numbers: per_class=5 or percent=1")
        if self.percent is not None:
            object.__setattr__(self, "percent", float(self.percent))
        percent = 100.0 if self.percent is None else self.percent
        if (self.per_class is not None and self.per_class < 1) or not 0 < percent <= 100:
            raise UserError("low-shot needs at least one image per class, or a percentage above 0 and up to 100")
        if self.repeats < 2:
            raise UserError("low-shot needs two repeats or more: one says nothing of their spread")

    def numbers(self) -> dict[str, Any]:
        """Those of the probe within are its own."""
        inner = find(self.probe)
        return {**super().numbers(), "within": {**inner.numbers(), "version": inner.version}}

    def run(self, bench: Bench) -> list[Score]:
        train, test = bench.pair(self)
        return [evaluate(train, test, self, device=bench.how.device)]


def draw(y: np.ndarray, classes: list[str], protocol: LowShot, repeat: int) -> np.ndarray:
    """Rows of one draw, ascending. Raises UserError naming classes that have fewer images than are asked for."""
    generator = np.random.default_rng([protocol.seed, repeat])
    present, counts = np.unique(y, return_counts=True)
    if few := [f"{classes[c]} {n}" for c, n in zip(present, counts, strict=True) if n < (protocol.per_class or 1)]:
        said = ", ".join(few[:3]) + (" …" if len(few) > 3 else "")
        raise UserError(f"low-shot asks for {protocol.per_class} images per class and some have fewer ({said})")
    chosen = []
    for c, n in zip(present, counts, strict=True):
        count = protocol.per_class or max(1, round((protocol.percent or 0) / 100 * n))
        chosen.append(generator.permutation(np.flatnonzero(y == c))[:count])
    return np.sort(np.concatenate(chosen))


def learn(train: Features, test: Features, protocol: LowShot, device: str | None) -> Score:
    """The accuracy of the probe within."""
    inner = find(protocol.probe)
    match inner:
        case logistic.Logistic():
            return logistic.evaluate(train, test, inner, device=device)[0]
        case linear.Linear():
            return linear.evaluate(train, test, replace(inner, tokens=(protocol.tokens,)), device=device)
        case ridge.Ridge():
            return ridge.evaluate(train, test, inner, device=device)
    assert isinstance(inner, knn.KNN)
    return knn.evaluate(train, test, inner, device=device)


def evaluate(train: Features, test: Features, protocol: LowShot, *, device: str | None = None) -> Score:
    """Mean accuracy on `test` over draws from `train`; for each test image, how often it was right.

    The interval is Student's over draws: what other images of the same classes would have given on the same test set.
    """
    check_pair(train, test)
    assert train.y is not None
    found = []
    for repeat in range(protocol.repeats):
        rows = draw(train.y, train.classes or [], protocol, repeat)
        found.append(learn(replace(train, X=train.X[rows], y=train.y[rows]), test, protocol, device))
    values = np.array([score.value for score in found])
    low, high = student(values)
    return figure(
        "top1",
        float(values.mean()),
        test.n,
        protocol,
        test.subject,
        train=train.corpus_id,
        test=test.corpus_id,
        interval=(max(0.0, low), min(1.0, high)),
        details={
            "std": float(values.std(ddof=1)),
            "by_repeat": values.tolist(),
            "n_train": found[0].details["n_train"],
            "n_classes": found[0].details["n_classes"],
            "features": test.describe(),
        },
        unit="%",
        better="higher",
        items=np.stack([np.asarray(score.items) for score in found]).mean(axis=0, dtype=np.float32),
    )


PRESETS = {
    "lowshot-5perclass": LowShot("lowshot-5perclass", per_class=5),
    "lowshot-1pct": LowShot("lowshot-1pct", percent=1.0),
}
