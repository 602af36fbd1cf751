"""Features of a corpus under frozen weights, and what must hold between those a probe learns from and is tested on."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval_probes.pooling import Pooling
from eval_probes.subject import Subject
from selfsight.errors import UserError
from selfsight.shards.corpus import UNLABELLED, Corpus

ROWS = 16384  # looked at when a collapse is looked for
CONSTANT = 1e-6  # deviation between images, as a fraction of the features' size, below which they tell nothing


@dataclass(frozen=True)
class Features:
    """One feature vector per image of a corpus, in the order of the corpus."""

    X: np.ndarray  # float32 or float16 (N, D), memory-mapped
    y: np.ndarray | None  # int64 (N,), None for an unlabelled corpus
    classes: list[str] | None
    corpus: str  # path
    corpus_id: str
    subject: Subject
    pooling: Pooling
    how: dict[str, Any] = field(default_factory=dict)  # precision, resize and what else decided them

    @property
    def n(self) -> int:
        return len(self.X)

    def tensor(self, device: torch.device | str = "cpu", rows: np.ndarray | None = None) -> Tensor:
        """float32 (N, D) on `device`, all rows or those given."""
        X = self.X if rows is None else self.X[rows]
        return torch.from_numpy(np.ascontiguousarray(X)).to(device).float()

    def labels(self, device: torch.device | str = "cpu", rows: np.ndarray | None = None) -> Tensor:
        """int64 (N,) on `device`. Only for a labelled corpus."""
        assert self.y is not None
        return torch.from_numpy(self.y if rows is None else self.y[rows]).to(device)

    def describe(self) -> dict[str, Any]:
        """JSON-able: what stands in a score's details."""
        return {"dimension": self.X.shape[1], "tokens": self.pooling.tag, **self.how}


class Collapsed(UserError):
    """The encoder answers every image alike: there is nothing that a score could say. The message is one sentence."""


def check_sound(features: Features) -> None:
    """Raises UserError for features that are not finite, Collapsed for features that do not differ between images."""
    sample = np.asarray(features.X[:: max(1, features.n // ROWS)], dtype=np.float64)
    name = features.subject.name
    if not np.isfinite(sample).all():
        raise UserError(f"the features of {name} are not finite: its training diverged, take an earlier step")
    deviation, size = sample.std(axis=0).max(), np.abs(sample).max()
    if len(sample) > 1 and deviation <= CONSTANT * size:
        raise Collapsed(
            f"{name} answers every image of {features.corpus} alike (they differ by {deviation:.1e} where values reach "
            f"{size:.1e}): the encoder has collapsed, there is nothing to score"
        )


def check_pair(train: Features, test: Features) -> int:
    """The number of classes that `train` and `test` share. Raises UserError when a probe on them would mean nothing."""
    if (train.subject.digest, train.pooling) != (test.subject.digest, test.pooling):
        raise UserError("train and test features come from different weights or pooling: extract both alike")
    if train.X.shape[1] != test.X.shape[1]:
        raise UserError(f"train features are {train.X.shape[1]} wide and test features {test.X.shape[1]}")
    for features in (train, test):
        check_sound(features)
    sides = []
    for f in (train, test):
        labels = None if f.y is None or (f.y == UNLABELLED).any() else f.y
        sides.append((f.corpus, f.corpus_id, f.classes, labels))
    return _check_labels(*sides)


def check_corpora(train: Corpus, test: Corpus) -> float:
    """The share of test images that are, byte for byte, training images too.

    Raises UserError when a probe on the two would mean nothing, before any feature is computed.
    """
    _check_labels(*((str(c.path), c.id, c.classes, c.labels()) for c in (train, test)))
    known = set(train.index(["sha256"])["sha256"].to_pylist())
    shared = sum(digest in known for digest in test.index(["sha256"])["sha256"].to_pylist())
    if shared == test.n:
        raise UserError(f"every image of {test.path} is in {train.path} as well: test on images that were held out")
    return shared / test.n


def _check_labels(train: tuple, test: tuple) -> int:
    """Of two corpora (name, id, classes, labels or None): the number of classes they share."""
    for name, _, classes, labels in (train, test):
        if classes is None or labels is None or (labels == UNLABELLED).any():
            raise UserError(f"{name} has no labels: a probe needs them; build it from folders named by class")
    (first, first_id, classes, y), (second, second_id, others, y_test) = train, test
    if classes != others:
        raise UserError(
            f"{first} and {second} have different classes ({_differing(classes, others)}): "
            "build both from folders with the same names"
        )
    if len(classes) < 2:
        raise UserError(f"{first} has one class only ({classes[0]}): there is nothing to tell apart")
    if first_id == second_id:
        raise UserError(f"{first} and {second} are the same corpus: test on images that were held out")
    if missing := sorted(set(np.unique(y_test)) - set(np.unique(y))):
        raise UserError(f"{first} has no image of {classes[missing[0]]}, which {second} asks for: add some")
    return len(classes)


def _differing(a: list[str], b: list[str]) -> str:
    only = sorted(set(a) ^ set(b))
    return f"{', '.join(only[:3])}{' …' if len(only) > 3 else ''} in only one" if only else "another order"
