"""Whether a classifier's probabilities can be believed: log loss, Brier score, expected calibration error.

In: logits of the test images. Out: the three as scores. A temperature fitted on images that were held out of training
mends most of what is wrong with them, and changes no answer (Guo et al. 2017, arXiv:1706.04599).
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval_probes.features import Features
from eval_probes.lbfgs import minimise
from eval_probes.protocol import Protocol
from eval_probes.results import Score, figure, score_of

BINS = 15


def nll(logits: Tensor, y: Tensor) -> Tensor:
    """−log p of the right class in nats: (N,), of logits (N, C) and labels (N,)."""
    return F.cross_entropy(logits, y, reduction="none")


def brier(logits: Tensor, y: Tensor) -> Tensor:
    """Σ_c (p_c − [c = y])², between 0 and 2 (Brier 1950): (N,)."""
    return (logits.softmax(dim=1) - F.one_hot(y, logits.shape[1])).square().sum(dim=1)


def ece(logits: Tensor, y: Tensor, bins: int = BINS) -> float:
    """Mean distance between confidence and accuracy over `bins` equally wide bins (i / bins, (i + 1) / bins] of the
    confidence, the largest probability; each bin counts by its images (Guo et al., equation 3)."""
    confidence, answer = logits.double().softmax(dim=1).max(dim=1)
    gap = confidence - (answer == y).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return float(torch.zeros_like(gap[:1]).repeat(bins).index_add_(0, place, gap).abs().sum() / len(y))


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """The T > 0 for which logits / T have the least log loss."""
    z, own = logits.double(), logits.double().gather(1, y[:, None])

    def objective(log_beta: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        beta = log_beta.exp()[0]  # 1 / T
        loss = torch.logsumexp(beta * z, dim=1) - beta * own[:, 0]
        by_beta = ((beta * z).softmax(dim=1) * z).sum(dim=1) - own[:, 0]
        return loss.mean()[None], (beta * by_beta.mean())[None]

    start = torch.zeros(1, 1, dtype=torch.float64, device=logits.device)
    return float((-minimise(objective, start, tol=1e-6, iterations=100).theta).exp())


def scores(
    logits: Tensor, y: Tensor, protocol: Protocol, test: Features, *, train: str, details: dict[str, Any] | None = None
) -> list[Score]:
    """nll, ece and brier of `logits` (N, C) for the images of `test` with labels `y`. `train`: id of a corpus.

    The calibration error comes without an interval: it is no mean over images, and resampling them inflates it.
    """
    where = {"train": train, "test": test.corpus_id, "better": "lower", "details": details}

    def items(values: Tensor) -> np.ndarray:
        return values.float().cpu().numpy()

    return [
        score_of("nll", items(nll(logits, y)), protocol, test.subject, unit="nats", **where),
        figure("ece", ece(logits, y), test.n, protocol, test.subject, unit="%", **where),
        score_of("brier", items(brier(logits, y)), protocol, test.subject, unit="", **where),
    ]
