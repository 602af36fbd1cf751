"""The linear probe: multinomial logistic regression by SGD on kept features, a whole grid of learning rates at once.

All heads see the same batches, so one matrix product serves them all: W is (D, heads·C) and the gradient of each head
depends on its own columns only. The learning rate is chosen on a stratified tenth of the *training* images; then the
chosen head is trained again on all of them and meets the test images once.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from eval_probes.bench import Bench
from eval_probes.features import Features, check_pair
from eval_probes.protocol import FeatureProtocol
from eval_probes.results import Score, score_of
from eval_probes.subject import pick_device
from selfsight.console import progress
from selfsight.errors import UserError


@dataclass(frozen=True)
class Linear(FeatureProtocol):
    """Features are standardised by the training images' statistics, which lets one grid serve encoders of any scale."""

    kind = "linear"
    lrs: tuple[float, ...] = tuple(float(f"{10 ** (i / 3):.3g}") for i in range(-12, 1))  # 1e-4 … 1
    batch_size: int = 512
    epochs: int = 20
    min_steps: int = 1000  # small sets are seen more often
    momentum: float = 0.9
    weight_decay: float = 0.0
    held_out: float = 0.1  # fraction of each class's training images on which the learning rate is chosen
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lrs or min(self.lrs) <= 0 or self.batch_size < 1 or not 0 < self.held_out < 1:
            raise UserError("a linear probe needs positive learning rates, a batch size and 0 < held_out < 1")

    def run(self, bench: Bench) -> list[Score]:
        train, test = bench.pair(self)
        return [evaluate(train, test, self, device=bench.how.device)]

    def steps(self, n: int) -> int:
        return max(self.min_steps, self.epochs * math.ceil(n / self.batch_size))


@dataclass(frozen=True)
class Heads:
    """Trained heads, one for each learning rate. `weight` (H, D, C), `bias` (H, C)."""

    weight: Tensor
    bias: Tensor

    def logits(self, X: Tensor) -> Tensor:
        """X (N, D) → (H, N, C)."""
        return torch.einsum("nd,hdc->hnc", X, self.weight) + self.bias[:, None]


def train_heads(X: Tensor, y: Tensor, n_classes: int, protocol: Linear, *, label: str | None = None) -> Heads:
    """Trains a head per learning rate of `protocol` on X (N, D) float32 and y (N,) int64, from zero weights.

    SGD with momentum on the mean cross entropy, cosine to zero; batches are drawn from seeded permutations, and every
    head sees the same ones. Equal to training each head by itself, up to the order of sums.
    """
    device, (n, d), h = X.device, X.shape, len(protocol.lrs)
    lr = torch.tensor(protocol.lrs, device=device).repeat_interleave(n_classes)  # one per column, head-major
    weight = torch.zeros(d + 1, h * n_classes, device=device)  # the last row is the bias
    momentum = torch.zeros_like(weight)
    X1 = torch.cat([X, torch.ones(n, 1, device=device)], dim=1)
    total = protocol.steps(n)
    with progress(label or "linear probe", total=total) as bar:
        for step, rows in enumerate(batches(n, min(protocol.batch_size, n), total, protocol.seed)):
            rows = rows.to(device)
            x, target = X1[rows], y[rows]
            p_BHC = rearrange(x @ weight, "b (h c) -> b h c", h=h).softmax(dim=-1)
            p_BHC.scatter_add_(2, target.view(-1, 1, 1).expand(-1, h, 1), -torch.ones(len(x), h, 1, device=device))
            gradient = x.T @ rearrange(p_BHC, "b h c -> b (h c)") / len(x)  # of the mean cross entropy
            if protocol.weight_decay:
                gradient[:-1] += protocol.weight_decay * weight[:-1]
            momentum.mul_(protocol.momentum).add_(gradient)
            weight -= lr * (0.5 * (1 + math.cos(math.pi * step / total))) * momentum
            bar.advance()
    weight = rearrange(weight, "d (h c) -> h d c", h=h)
    return Heads(weight[:, :-1].contiguous(), weight[:, -1].contiguous())


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


def right_ones(heads: Heads, X: Tensor, y: Tensor, top: int = 1) -> Tensor:
    """bool (H, N): whether y is among each head's `top` best; a head that diverged has none right."""
    found = []
    for x, target in zip(X.split(8192), y.split(8192), strict=True):
        logits = heads.logits(x)
        own = logits.gather(2, target.view(1, -1, 1).expand(len(logits), -1, 1))
        # Equal logits count against the head: a constant one has no answer.
        found.append(((logits >= own).sum(dim=2) <= top) & logits.isfinite().all(dim=2))
    return torch.cat(found, dim=1)


def evaluate(train: Features, test: Features, protocol: Linear | None = None, *, device: str | None = None) -> Score:
    """Accuracy on `test` of the probe chosen and trained on `train`. Raises UserError as `check_pair` does."""
    protocol = protocol or PRESETS["linear"]
    n_classes = check_pair(train, test)
    place = pick_device(device)
    assert train.y is not None
    fit, held = hold_out(train.y, protocol.held_out, protocol.seed)
    if len(held) == 0:
        raise UserError(f"{train.corpus} has one image per class: a probe needs two to choose its learning rate")
    X, y = train.tensor(place), train.labels(place)
    rows_fit, rows_held = torch.from_numpy(fit).to(place), torch.from_numpy(held).to(place)

    X_fit, X_held = standardise(X[rows_fit], X[rows_held])
    grid = train_heads(X_fit, y[rows_fit], n_classes, protocol, label="linear probe: learning rates")
    accuracy = right_ones(grid, X_held, y[rows_held]).float().mean(dim=1).tolist()
    best = int(np.argmax(accuracy))  # the smallest learning rate among equals
    del X_fit, X_held

    X, X_test = standardise(X, test.tensor(place))
    chosen = replace(protocol, lrs=(protocol.lrs[best],))
    head = train_heads(X, y, n_classes, chosen, label="linear probe: chosen head")
    y_test = test.labels(place)
    details = {
        "lr": protocol.lrs[best],
        "held_out_accuracy": accuracy[best],
        "held_out_by_lr": {f"{lr:g}": a for lr, a in zip(protocol.lrs, accuracy, strict=True)},
        "train_accuracy": float(right_ones(head, X, y).float().mean()),
        "steps": protocol.steps(train.n),
        "n_train": train.n,
        "n_classes": n_classes,
        "features": test.describe(),
    }
    if n_classes > 5:
        details["top5"] = float(right_ones(head, X_test, y_test, top=5).float().mean())
    items = right_ones(head, X_test, y_test)[0].cpu().numpy()
    return score_of("top1", items, protocol, test.subject, train=train.corpus_id, test=test.corpus_id, details=details)


PRESETS = {"linear": Linear()}
