"""The linear probe: multinomial logistic regression by SGD on kept features, a whole grid of heads at once.

The grid is learning rate × tokens, and all its heads see the same batches. Rate and tokens are chosen on a stratified
tenth of the *training* images; then the chosen head is trained again on all of them and meets the test images once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

import numpy as np
import torch
from torch import Tensor

from eval_probes.bench import Bench
from eval_probes.features import Features, check_pair
from eval_probes.grid import Grid, right_ones
from eval_probes.pooling import Pooling
from eval_probes.protocol import Protocol
from eval_probes.results import Score, score_of
from eval_probes.subject import pick_device
from selfsight.console import progress
from selfsight.errors import UserError


@dataclass(frozen=True)
class Linear(Protocol):
    """Features are standardised by the training images' statistics, which lets one grid serve encoders of any scale."""

    kind = "linear"
    tokens: tuple[str, ...] = ("cls",)  # each becomes an input of its own: cls, avg, cls4+avg, …: see `Pooling`
    resize: int | None = None  # shorter side before the crop, pixels; None: as the weights say
    lrs: tuple[float, ...] = tuple(float(f"{10 ** (i / 3):.3g}") for i in range(-12, 1))  # 1e-4 … 1
    batch_size: int = 512
    epochs: int = 20
    min_steps: int = 1000  # small sets are seen more often
    momentum: float = 0.9
    weight_decay: float = 0.0
    held_out: float = 0.1  # fraction of each class's training images on which rate and tokens are chosen
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lrs or min(self.lrs) <= 0 or self.batch_size < 1 or not 0 < self.held_out < 1:
            raise UserError("a linear probe needs positive learning rates, a batch size and 0 < held_out < 1")
        if not self.tokens:
            raise UserError("a linear probe needs tokens to look at: give cls, avg, cls4+avg or the like")

    def poolings(self) -> list[Pooling]:
        return [Pooling.parse(tag) for tag in self.tokens]

    def run(self, bench: Bench) -> list[Score]:
        train, test = bench.labelled()
        widest = reduce(or_, self.poolings())
        X, X_test = (bench.features(corpus, widest, resize=self.resize) for corpus in (train, test))
        return [evaluate(X, X_test, self, device=bench.how.device)]

    def steps(self, n: int) -> int:
        return max(self.min_steps, self.epochs * math.ceil(n / self.batch_size))


def train_heads(
    X: Tensor, y: Tensor, n_classes: int, protocol: Linear, inputs: Sequence[slice] | None = None, *, label: str = ""
) -> Grid:
    """Trains a head per learning rate of `protocol` for each of `inputs`, columns of X (N, D) float32, or for all of X;
    y (N,) int64. From zero weights.

    SGD with momentum on the mean cross entropy, cosine to zero; batches are drawn from seeded permutations, and every
    head sees the same ones. Equal to training each head by itself, up to the order of sums.
    """
    inputs = inputs or [slice(None)]
    n = len(X)
    size, total = min(protocol.batch_size, n), protocol.steps(n)
    grid = Grid(
        [X[:1, columns].shape[1] for columns in inputs],
        protocol.lrs,
        n_classes,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
        device=X.device,
    )
    x = X.new_empty(size, X.shape[1])
    with progress(label or "linear probe", total=total) as bar:
        for step, rows in enumerate(batches(n, size, total, protocol.seed)):
            rows = rows.to(X.device)
            # Into the same memory each time, which is still in the cache when the products read it.
            torch.index_select(X, 0, rows, out=x)
            grid.step([x[:, columns] for columns in inputs], y[rows], cosine(step / total))
            bar.advance()
    return grid


def cosine(progress: float) -> float:
    """From 1 to 0 as `progress` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def batches(n: int, batch_size: int, total: int, seed: int):
    """`total` batches of row numbers out of n: one seeded permutation after another, a short rest left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator)
        for start in range(0, n - batch_size + 1, batch_size):
            if total == 0:
                return
            total -= 1
            yield order[start : start + batch_size]


def hold_out(y: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(fit, held) row numbers, ascending: `fraction` of each class, at least one image of a class that has two."""
    generator = np.random.default_rng(seed)
    held = []
    for c in np.unique(y):
        rows = np.flatnonzero(y == c)
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        held.append(generator.permutation(rows)[:count])
    chosen = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(y)), chosen), chosen


def standardise(fit: Tensor, *others: Tensor) -> list[Tensor]:
    """All (N, D) by the column means and deviations of `fit`; a column that never changes becomes zero."""
    mean, std = fit.mean(dim=0), fit.std(dim=0, correction=0)
    scale = torch.where(std > 1e-6 * std.max().clamp(min=1e-30), 1 / std, torch.zeros_like(std))
    return [(x - mean) * scale for x in (fit, *others)]


def evaluate(train: Features, test: Features, protocol: Linear | None = None, *, device: str | None = None) -> Score:
    """Accuracy on `test` of the probe chosen and trained on `train`, whose features hold all of the protocol's tokens.

    Raises UserError as `check_pair` does.
    """
    protocol = protocol or PRESETS["linear"]
    n_classes = check_pair(train, test)
    place = pick_device(device)
    assert train.y is not None
    fit, held = hold_out(train.y, protocol.held_out, protocol.seed)
    if len(held) == 0:
        raise UserError(f"{train.corpus} has one image per class: a probe needs two to choose its learning rate")
    X, y = train.tensor(place), train.labels(place)
    rows_fit, rows_held = torch.from_numpy(fit).to(place), torch.from_numpy(held).to(place)
    # Raw pixels have no tokens to choose from.
    poolings = [train.pooling] if train.subject.is_pixels else protocol.poolings()
    inputs = [p.columns(X.shape[1], train.pooling) for p in poolings]

    X_fit, X_held = standardise(X[rows_fit], X[rows_held])
    grid = train_heads(X_fit, y[rows_fit], n_classes, protocol, inputs, label=f"linear probe: {len(inputs)} × rates")
    accuracy = grid.right([X_held[:, columns] for columns in inputs], y[rows_held]).float().mean(dim=1).tolist()
    best = int(np.argmax(accuracy))  # the first tokens and the smallest learning rate among equals
    which, lr = best // len(protocol.lrs), protocol.lrs[best % len(protocol.lrs)]
    del X_fit, X_held, grid

    X, X_test = (x[:, inputs[which]] for x in standardise(X, test.tensor(place)))
    grid = train_heads(X, y, n_classes, replace(protocol, lrs=(lr,)), label="linear probe: chosen head")
    (head,), y_test = grid.heads(), test.labels(place)
    details = {
        "lr": lr,
        "held_out_accuracy": accuracy[best],
        "held_out": [
            {"tokens": p.tag, "lr": rate, "accuracy": accuracy[i * len(protocol.lrs) + j]}
            for i, p in enumerate(poolings)
            for j, rate in enumerate(protocol.lrs)
        ],
        "train_accuracy": float(right_ones(head, X, y).float().mean()),
        "steps": protocol.steps(train.n),
        "n_train": train.n,
        "n_classes": n_classes,
        "features": {**test.describe(), "tokens": poolings[which].tag, "dimension": X.shape[1]},
    }
    if n_classes > 5:
        details["top5"] = float(right_ones(head, X_test, y_test, top=5).float().mean())
    items = right_ones(head, X_test, y_test)[0].cpu().numpy()
    return score_of("top1", items, protocol, test.subject, train=train.corpus_id, test=test.corpus_id, details=details)


# DINOv2's choice of tokens: class tokens of one block or of four, with or without the mean patch token.
DINOV2_TOKENS = ("cls", "cls4", "cls+avg", "cls4+avg")

PRESETS = {"linear": Linear(), "linear-grid": Linear("linear-grid", tokens=DINOV2_TOKENS)}
