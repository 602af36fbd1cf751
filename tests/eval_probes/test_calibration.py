"""Calibration agrees with torchmetrics and scikit-learn, and with bins filled by hand."""

import math

import numpy as np
import pytest
import torch

from eval_probes import calibration
from eval_probes.features import Features
from eval_probes.pooling import Pooling
from eval_probes.protocol import find
from eval_probes.subject import Subject


@pytest.fixture
def answers() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (500, 5) that say too much, and labels drawn from what they should have said."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(500, 5, generator=generator, dtype=torch.float64)
    y = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return 3 * logits, y


def test_torchmetrics_and_scikit_learn_agree(answers):
    functional = pytest.importorskip("torchmetrics.functional.classification", reason="torchmetrics is another opinion")
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is another opinion")
    logits, y = answers
    p = logits.softmax(dim=1)
    theirs = functional.multiclass_calibration_error(p, y, num_classes=5, n_bins=15, norm="l1")
    assert calibration.ece(logits, y) == pytest.approx(float(theirs), abs=1e-6)
    assert float(calibration.nll(logits, y).mean()) == pytest.approx(metrics.log_loss(y, p), abs=1e-12)
    theirs = metrics.brier_score_loss(y, p, labels=range(5), scale_by_half=False)
    assert float(calibration.brier(logits, y).mean()) == pytest.approx(theirs, abs=1e-12)


def test_bins_by_hand():
    # Confidences 0.6 (right), 0.6 (wrong), 0.9 (right), and 1 (right), which belongs to the last bin of ten.
    p = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0])
    assert calibration.ece(p.log(), y, bins=10) == pytest.approx((abs(1.2 - 1) + 0.1 + 0) / 4)
    assert calibration.brier(p.log(), y).tolist() == pytest.approx([0.32, 0.72, 0.02, 0])
    assert calibration.nll(p.log(), y).tolist() == pytest.approx([-math.log(x) for x in (0.6, 0.4, 0.9, 1)])


def test_the_temperature_is_the_one_that_was_hidden(answers):
    logits, y = answers
    T = calibration.fit_temperature(logits, y)
    assert pytest.approx(3, rel=0.15) == T
    least = calibration.nll(logits / T, y).mean()
    assert all(least < calibration.nll(logits / t, y).mean() for t in (0.99 * T, 1.01 * T))
    assert calibration.ece(logits / T, y) < calibration.ece(logits, y) / 2


def test_scores_have_items_where_they_are_means(answers):
    logits, y = answers
    X = np.zeros((500, 2), np.float32)
    test = Features(X, y.numpy(), list("abcde"), "b", "b", Subject("w", "w" * 64, {}, {}, 2), Pooling())
    nll, ece, brier = calibration.scores(logits.float(), y, find("logistic"), test, train="a")
    assert [s.metric for s in (nll, ece, brier)] == ["nll", "ece", "brier"]
    assert nll.low < nll.value < nll.high
    assert len(nll.items) == len(brier.items) == 500
    assert (ece.items, ece.low) == (None, None)
