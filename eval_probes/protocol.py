"""A protocol is a frozen dataclass: every number that decides a score. Its digest goes with the score.

Named protocols stand in `PRESETS` of the module that computes them; `find` knows which module that is without loading
the others.
"""

import difflib
import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Self

import yaml

from selfsight.errors import UserError

if TYPE_CHECKING:
    from eval_probes.bench import Bench
    from eval_probes.pooling import Pooling
    from eval_probes.results import Score

# Name of a protocol → (the module whose PRESETS has it, what it is in a few words).
MODULES = {
    "knn": ("eval_probes.knn", "weighted k-nearest-neighbour vote"),
    "dino-knn": ("eval_probes.knn", "DINO's vote: k = 20, T = 0.07"),
    "dinov2-knn": ("eval_probes.knn", "DINOv2's: the same numbers, and the same ranking"),
    "linear": ("eval_probes.linear", "linear probe, learning rate chosen on held-out training images"),
    "linear-grid": ("eval_probes.linear", "the same over DINOv2's four choices of tokens as well"),
    "ridge": ("eval_probes.ridge", "ridge regression in closed form, λ chosen on held-out training images"),
    "logistic": ("eval_probes.logistic", "logistic regression, C chosen on held-out training images, with calibration"),
    "dinov2-logreg": ("eval_probes.logistic", "DINOv2's logistic regression: 45 values of C in double precision"),
    "lowshot-5perclass": ("eval_probes.lowshot", "a probe that learns from 5 images per class, drawn five times"),
    "lowshot-1pct": ("eval_probes.lowshot", "the same from 1 % of each class"),
    "label-free": ("eval_probes.labelfree", "RankMe, α-ReQ, uniformity and spread of the test images' features"),
    "homography": ("eval_probes.geometry.homography", "patches found again in the test images, warped"),
    "epipolar": ("eval_probes.geometry.epipolar", "mutual matches of patches between views of a scene"),
    "dino-linear": ("eval_probes.linear_crops", "DINO's linear probe of ViT-S on random crops, 100 epochs"),
    "dino-linear-base": ("eval_probes.linear_crops", "DINO's of ViT-B: class token and mean patch token"),
    "dinov2-linear": ("eval_probes.linear_crops", "DINOv2's linear probe on random crops: best of 52 heads"),
    "mae-linprobe": ("eval_probes.linprobe", "MAE's linear probe on random crops: batch norm and LARS, 90 epochs"),
    "mae-linprobe-kept": ("eval_probes.linprobe", "the same on kept features, without crops"),
    "capi-attentive": ("eval_probes.attentive", "CAPI's attentive probe on random crops: best of 30 heads"),
}


@dataclass(frozen=True)
class Protocol(ABC):
    """Base of all protocols. `version` rises when the code computes something else from the same numbers."""

    kind: ClassVar[str]  # what is computed: knn, linear, …
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("train", "test")  # of the bench: train, test, scene
    name: str = ""  # of the preset it is, or was made from; else the kind

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.kind)  # how a frozen dataclass sets its own fields

    @abstractmethod
    def run(self, bench: "Bench") -> "list[Score]":
        """Its scores, the one that stands for it first. Raises UserError where they would mean nothing."""

    def poolings(self) -> "list[Pooling]":
        """The features that it will ask for, so that several protocols can be served by one pass over the images."""
        return []

    @property
    def digest(self) -> str:
        """sha256 of kind, version and every field but the name, which decides nothing."""
        said = {**self.numbers(), "kind": self.kind, "version": self.version}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def numbers(self) -> dict[str, Any]:
        """Every field that decides a score, JSON-able."""
        said = {key: value for key, value in asdict(self).items() if key != "name"}
        return json.loads(json.dumps(said))

    def override(self, assignments: list[str]) -> Self:
        """With the values of `key=value` strings. Raises UserError for an unknown key or a value of another kind."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        changed = {}
        for assignment in assignments:
            key, sign, text = assignment.partition("=")
            if not sign or key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(known)}"
                raise UserError(f"{self.name} has no key {assignment!r}: {hint}" if sign else f"give {key}=VALUE")
            changed[key] = _like(known[key], text, key)
        return replace(self, **changed)


@dataclass(frozen=True)
class FeatureProtocol(Protocol):
    """A protocol on one feature vector per image."""

    tokens: str = "cls"  # which become the feature: cls, avg, cls+avg, cls4, …: see `Pooling`
    resize: int | None = None  # shorter side before the crop, pixels; None: as the weights say

    @property
    def pooling(self) -> "Pooling":
        from eval_probes.pooling import Pooling

        return Pooling.parse(self.tokens)

    def poolings(self) -> "list[Pooling]":
        return [self.pooling]


def find(name: str) -> Protocol:
    """The protocol called `name`. Raises UserError, naming the nearest, when there is none."""
    if name not in MODULES:
        near = difflib.get_close_matches(name, MODULES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(MODULES)}"
        raise UserError(f"there is no protocol {name!r}: {hint}")
    return import_module(MODULES[name][0]).PRESETS[name]


def _like(old: Any, text: str, key: str) -> Any:
    """`text` as a value of the kind that `old` is."""
    try:
        value = yaml.safe_load(text)
        if isinstance(old, tuple):
            inner = old[0] if old else 0.0
            items = value if isinstance(value, list) else [value]
            return tuple(_kept(inner, item) for item in items)
        return _kept(old, value)
    except (yaml.YAMLError, TypeError, ValueError):
        raise UserError(f"{key}={text} should be like {old!r}") from None


def _kept(old: Any, value: Any) -> Any:
    if old is None or value is None:
        if old is not None:
            raise TypeError
        return value
    if isinstance(old, float) and isinstance(value, int | str) and not isinstance(value, bool):
        return float(value)  # YAML 1.1 takes 1e-3 for a string
    if type(value) is not type(old):
        raise TypeError
    return value
