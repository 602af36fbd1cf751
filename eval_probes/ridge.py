"""Ridge regression onto one-hot labels in closed form: a linear probe without steps, rates or luck.

Sums over images are all it needs of them, so shards and ranks add theirs up and no feature is kept. One eigenvalue
decomposition then gives every λ: W = Q (S + λI)⁻¹ Qᵀ XᵀY / n on centred, standardised features.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval_probes.bench import Bench
from eval_probes.features import Features, check_pair
from eval_probes.grid import Heads, right_ones
from eval_probes.linear import hold_out
from eval_probes.protocol import FeatureProtocol
from eval_probes.results import Score, score_of
from eval_probes.subject import pick_device
from selfsight.errors import UserError

ROWS = 8192


@dataclass
class Moments:
    """Sums over images of features x (D,) and one-hot labels y (C,), float64. Two of them add up."""

    n: float
    x: Tensor  # (D,)
    y: Tensor  # (C,)
    xx: Tensor  # (D, D)
    xy: Tensor  # (D, C)

    @classmethod
    def of(cls, X: Tensor, y: Tensor, n_classes: int) -> "Moments":
        """Of features (N, D) float and labels (N,) int64."""
        D, kind = X.shape[1], {"dtype": torch.float64, "device": X.device}
        sums = cls(
            len(X),
            torch.zeros(D, **kind),
            torch.zeros(n_classes, **kind),
            torch.zeros(D, D, **kind),
            torch.zeros(D, n_classes, **kind),
        )
        for block, labels in zip(X.split(ROWS), y.split(ROWS), strict=True):
            x, t = block.double(), F.one_hot(labels, n_classes).double()
            sums.x += x.sum(dim=0)
            sums.y += t.sum(dim=0)
            sums.xx.addmm_(x.T, x)
            sums.xy.addmm_(x.T, t)
        return sums

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.n + other.n, self.x + other.x, self.y + other.y, self.xx + other.xx, self.xy + other.xy)


def solve(moments: Moments, lambdas: tuple[float, ...]) -> Heads:
    """The heads of every λ, on features as they are: standardisation is folded into them. λ is relative to the variance
    of a standardised feature, which is 1."""
    n = moments.n
    mean_x, mean_y = moments.x / n, moments.y / n
    covariance = moments.xx / n - torch.outer(mean_x, mean_x)
    cross = moments.xy / n - torch.outer(mean_x, mean_y)
    std = covariance.diagonal().clamp_min(0).sqrt()
    # A column that never changes has no weight.
    scale = torch.where(std > 1e-6 * std.max(), 1 / std, torch.zeros_like(std))
    S, Q = torch.linalg.eigh(scale[:, None] * covariance * scale)
    projected = Q.T @ (scale[:, None] * cross)  # (D, C)
    penalty = torch.tensor(lambdas, dtype=torch.float64, device=S.device)[:, None]
    shrunk = projected / (S.clamp_min(0) + penalty)[:, :, None]  # (L, D, C)
    weight = scale[:, None] * (Q @ shrunk)
    bias = mean_y - torch.einsum("d,ldc->lc", mean_x, weight)
    return Heads(weight.float(), bias.float())


@dataclass(frozen=True)
class Ridge(FeatureProtocol):
    """λ is chosen on a stratified tenth of the training images; then the head is solved again on all of them."""

    kind = "ridge"
    lambdas: tuple[float, ...] = tuple(float(f"{10.0**i:g}") for i in range(-6, 4))
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lambdas or min(self.lambdas) <= 0 or not 0 < self.held_out < 1:
            raise UserError("ridge regression needs positive lambdas and 0 < held_out < 1")

    def run(self, bench: Bench) -> list[Score]:
        train, test = bench.pair(self)
        return [evaluate(train, test, self, device=bench.how.device)]


def choose(X: Tensor, y: Tensor, n_classes: int, protocol: Ridge) -> tuple[Heads, dict]:
    """The head for X (N, D), y (N,) with the λ that does best on held-out rows of them, and how it was chosen."""
    fit, held = hold_out(y.cpu().numpy(), protocol.held_out, protocol.seed)
    if len(held) == 0:
        raise UserError("there is one training image per class: a probe needs two to choose its λ")
    rows_fit, rows_held = (torch.from_numpy(rows).to(X.device) for rows in (fit, held))
    kept, apart = (Moments.of(X[rows], y[rows], n_classes) for rows in (rows_fit, rows_held))
    accuracy = right_ones(solve(kept, protocol.lambdas), X[rows_held], y[rows_held]).float().mean(dim=1).tolist()
    best = len(accuracy) - 1 - int(np.argmax(accuracy[::-1]))  # the strongest penalty among equals
    said = {f"{penalty:g}": a for penalty, a in zip(protocol.lambdas, accuracy, strict=True)}
    chosen = {"lambda": protocol.lambdas[best], "held_out_accuracy": accuracy[best], "held_out_by_lambda": said}
    return solve(kept + apart, (protocol.lambdas[best],)), chosen


def evaluate(train: Features, test: Features, protocol: Ridge | None = None, *, device: str | None = None) -> Score:
    """Accuracy on `test` of the head solved on `train`. Raises UserError as `check_pair` does."""
    protocol = protocol or PRESETS["ridge"]
    n_classes = check_pair(train, test)
    place = pick_device(device)
    head, chosen = choose(train.tensor(place), train.labels(place), n_classes, protocol)
    items = right_ones(head, test.tensor(place), test.labels(place))[0].cpu().numpy()
    details = {**chosen, "n_train": train.n, "n_classes": n_classes, "features": test.describe()}
    return score_of("top1", items, protocol, test.subject, train=train.corpus_id, test=test.corpus_id, details=details)


PRESETS = {"ridge": Ridge()}
