"""Multinomial logistic regression with an L2 penalty, for every C at once, solved to a tolerance: no rates, no steps.

The heads of all C share the passes over the features, two matrix products for each evaluation, and L-BFGS treats each
as if it were alone. Beside the accuracy come scores of the probabilities: see `calibration`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from eval_probes import calibration
from eval_probes.bench import Bench
from eval_probes.features import Features, check_pair
from eval_probes.grid import ELEMENTS, Heads, right_ones
from eval_probes.lbfgs import minimise
from eval_probes.linear import hold_out, standardise
from eval_probes.protocol import FeatureProtocol
from eval_probes.results import Score, score_of
from eval_probes.subject import pick_device
from selfsight.errors import UserError

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Logistic(FeatureProtocol):
    """C is chosen on a stratified tenth of the training images; then the head is solved again on all of them.

    C is scikit-learn's: the objective is C · Σ loss + ½‖W‖², the bias is not penalised. Where classes are easily told
    apart the strongest penalties answer as well as others, with probabilities that say nothing: the log loss sees it.
    """

    kind = "logistic"
    Cs: tuple[float, ...] = tuple(float(f"{10 ** (i / 2):.6g}") for i in range(-12, 3))  # 1e-6 … 10
    standardised: bool = True  # features, by the training images' statistics
    dtype: str = "float32"
    tol: float = 1e-5  # largest entry of the gradient of the objective / (C · images)
    iterations: int = 500
    chosen_by: str = "nll"  # on the held-out images: nll, the least log loss, or top1, the best accuracy
    memory: int = 10  # steps that L-BFGS remembers
    temperature_scaled: bool = False  # probabilities, by a temperature fitted on the held-out training images
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.Cs or min(self.Cs) <= 0 or not 0 < self.held_out < 1:
            raise UserError("logistic regression needs positive Cs and 0 < held_out < 1")
        if self.dtype not in DTYPES:
            raise UserError(f"logistic regression cannot compute in {self.dtype!r}: choose float32 or float64")
        if self.chosen_by not in ("nll", "top1"):
            raise UserError(f"C cannot be chosen by {self.chosen_by!r}: choose nll or top1")
        if self.tol < 0 or self.iterations < 1 or self.memory < 1:
            raise UserError("logistic regression needs a tolerance, and at least 1 iteration and 1 step of memory")

    def run(self, bench: Bench) -> list[Score]:
        train, test = bench.pair(self)
        return evaluate(train, test, self, device=bench.how.device)


@dataclass(frozen=True)
class Solution:
    """Heads of several C, and how far each was solved."""

    heads: Heads
    gradient: Tensor  # (H,)
    iterations: Tensor  # (H,)


def solve(X: Tensor, y: Tensor, n_classes: int, Cs: Sequence[float], protocol: Logistic) -> Solution:
    """The head of each of `Cs` for X (N, D) and labels (N,), in the dtype of X."""
    N, D = X.shape
    penalties = 1 / (N * torch.tensor(Cs, dtype=torch.float64, device=X.device))

    def objective(theta: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss + ½‖W‖² / (C · N), and its gradient, of heads with rows W (D, C), then the bias (C,)."""
        h = len(which)
        theta_hdc = theta.view(h, D + 1, n_classes)
        weight = rearrange(theta_hdc[:, :D], "h d c -> d (h c)")
        bias = rearrange(theta_hdc[:, D], "h c -> (h c)")
        loss = torch.zeros(h, dtype=torch.float64, device=X.device)
        by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        rows = max(1, ELEMENTS // len(bias))
        for x, target in zip(X.split(rows), y.split(rows), strict=True):
            log_p = rearrange(torch.addmm(bias, x, weight), "n (h c) -> n h c", h=h).log_softmax(dim=2)
            own = target[:, None, None].expand(-1, h, 1)
            loss -= log_p.gather(2, own)[:, :, 0].sum(dim=0, dtype=torch.float64)
            error = log_p.exp_().scatter_add_(2, own, log_p.new_full(own.shape, -1.0))
            error = rearrange(error, "n h c -> n (h c)")
            by_weight.addmm_(x.T, error)
            by_bias += error.sum(dim=0)
        gradient = torch.cat([by_weight, by_bias[None]]) / N
        gradient = rearrange(gradient, "d (h c) -> h d c", h=h).contiguous()
        penalty = penalties[which]
        gradient[:, :D] += penalty.to(X.dtype)[:, None, None] * theta_hdc[:, :D]
        squared = theta_hdc[:, :D].square().sum(dim=(1, 2), dtype=torch.float64)
        return loss / N + penalty * squared / 2, gradient.flatten(1)

    start = X.new_zeros(len(Cs), (D + 1) * n_classes)
    found = minimise(objective, start, tol=protocol.tol, iterations=protocol.iterations, memory=protocol.memory)
    theta = found.theta.view(len(Cs), D + 1, n_classes)
    return Solution(Heads(theta[:, :D], theta[:, D]), found.gradient, found.iterations)


def evaluate(
    train: Features, test: Features, protocol: Logistic | None = None, *, device: str | None = None
) -> list[Score]:
    """top1, nll, ece and brier on `test` of the head chosen and solved on `train`. Raises UserError as `check_pair`."""
    protocol = protocol or PRESETS["logistic"]
    n_classes = check_pair(train, test)
    place = pick_device(device)
    assert train.y is not None
    fit, held = hold_out(train.y, protocol.held_out, protocol.seed)
    if len(held) == 0:
        raise UserError(f"{train.corpus} has one image per class: a probe needs two to choose its C")
    X, y = train.tensor(place).to(DTYPES[protocol.dtype]), train.labels(place)
    X_test, y_test = test.tensor(place).to(X.dtype), test.labels(place)
    scaled = standardise if protocol.standardised else lambda *all_alike: list(all_alike)

    rows_fit, rows_held = (torch.from_numpy(rows).to(place) for rows in (fit, held))
    X_fit, X_held = scaled(X[rows_fit], X[rows_held])
    tried = solve(X_fit, y[rows_fit], n_classes, protocol.Cs, protocol)
    accuracy = right_ones(tried.heads, X_held, y[rows_held]).float().mean(dim=1).tolist()
    losses = torch.stack([calibration.nll(head.logits(X_held)[0], y[rows_held]).mean() for head in tried.heads.each()])
    told = [
        {"C": C, "accuracy": a, "nll": loss} for C, a, loss in zip(protocol.Cs, accuracy, losses.tolist(), strict=True)
    ]
    # The strongest penalty among equals.
    best = int(np.argmin([head["nll"] for head in told]) if protocol.chosen_by == "nll" else np.argmax(accuracy))
    temperature = 1.0
    if protocol.temperature_scaled:
        temperature = calibration.fit_temperature(tried.heads.each()[best].logits(X_held)[0], y[rows_held])
    del X_fit, X_held, tried

    X, X_test = scaled(X, X_test)
    final = solve(X, y, n_classes, protocol.Cs[best : best + 1], protocol)
    details = {
        "C": protocol.Cs[best],
        "held_out_accuracy": accuracy[best],
        "held_out": told,
        "gradient": float(final.gradient),
        "iterations": int(final.iterations),
        "temperature": temperature,
        "n_train": train.n,
        "n_classes": n_classes,
        "features": test.describe(),
    }
    if n_classes > 5:
        details["top5"] = float(right_ones(final.heads, X_test, y_test, top=5).float().mean())
    items = right_ones(final.heads, X_test, y_test)[0].cpu().numpy()
    where = {"train": train.corpus_id, "details": details}
    logits = final.heads.logits(X_test)[0] / temperature
    return [
        score_of("top1", items, protocol, test.subject, test=test.corpus_id, **where),
        *calibration.scores(logits, y_test, protocol, test, **where),
    ]


# DINOv2's (`dinov2/eval/log_regression.py`), for weights of 224 pixels: features as they are, of images resized to 224
# without a margin, 45 values of C, double precision. There the tenth is drawn from all images, here from each class.
DINOV2 = Logistic(
    "dinov2-logreg",
    resize=224,
    Cs=tuple(float(f"{10 ** (-6 + i / 4):.6g}") for i in range(45)),
    standardised=False,
    dtype="float64",
    tol=1e-12,
    iterations=1000,
    chosen_by="top1",
)

PRESETS = {"logistic": Logistic(), "dinov2-logreg": DINOV2}
