"""Every C is scikit-learn's, problems do not touch each other, known answers are found."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from eval_probes import logistic
from eval_probes.features import Features
from eval_probes.lbfgs import minimise
from eval_probes.logistic import PRESETS, Logistic
from eval_probes.pooling import Pooling
from eval_probes.subject import Subject
from selfsight.errors import UserError

EXACT = Logistic(dtype="float64", tol=1e-10, iterations=3000)


def features(X, y, corpus: str) -> Features:
    X, y = np.asarray(X, np.float32), np.asarray(y, np.int64)
    return Features(X, y, list("abc"), corpus, corpus, Subject("w", "w" * 64, {}, {}, 6), Pooling())


def blobs(n: int, seed: int, noise: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Three overlapping classes; the columns are of different scales, and not centred."""
    y = np.arange(n) % 3
    X = np.random.default_rng(9).normal(size=(3, 6))[y] + noise * np.random.default_rng(seed).normal(size=(n, 6))
    return X * np.logspace(-0.5, 0.5, 6) + 1, y


@pytest.fixture(scope="module")
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    X, y = blobs(150, 0)
    return torch.from_numpy(X), torch.from_numpy(y)


def test_every_C_is_scikit_learns(problem):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is the other opinion")
    X, y = problem
    Cs = PRESETS["dinov2-logreg"].Cs[::4]  # 1e-6, 1e-5, … 1e5
    ours = logistic.solve(X, y, 3, Cs, EXACT)
    assert (ours.gradient <= 1e-10).all()
    for i, C in enumerate(Cs):
        theirs = linear_model.LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10).fit(X.numpy(), y.numpy())
        # A gradient of 1e-10 against a curvature of 1e-3 or more.
        np.testing.assert_allclose(ours.heads.weight[i].T, theirs.coef_, rtol=0, atol=1e-6)
        np.testing.assert_allclose(ours.heads.bias[i], theirs.intercept_, rtol=0, atol=1e-6)


def test_blocks_of_rows_and_other_Cs_change_nothing(problem, monkeypatch):
    X, y = problem
    alone = logistic.solve(X, y, 3, (0.1,), EXACT)
    monkeypatch.setattr(logistic, "ELEMENTS", 400)
    among = logistic.solve(X, y, 3, (1e3, 0.1, 1e-6), EXACT)
    torch.testing.assert_close(among.heads.weight[1], alone.heads.weight[0], rtol=0, atol=1e-8)
    assert among.iterations[1] == alone.iterations[0]


def test_single_precision_is_near_enough(problem):
    X, y = problem
    Cs = (1e-4, 0.1, 10.0)
    exact = logistic.solve(X, y, 3, Cs, EXACT)
    ours = logistic.solve(X.float(), y, 3, Cs, Logistic())
    assert (ours.gradient <= 1e-5).all()
    # A gradient of 1e-5 against a curvature of some hundredths.
    torch.testing.assert_close(ours.heads.weight.double(), exact.heads.weight, rtol=0, atol=1e-3)


def test_rosenbrocks_valleys_are_followed_to_their_ends():
    scale = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)

    def valleys(theta, which):
        x, y, b = theta[:, 0], theta[:, 1], scale[which]
        gradient = torch.stack([2 * (x - 1) - 4 * b * x * (y - x * x), 2 * b * (y - x * x)], dim=1)
        return (1 - x).square() + b * (y - x * x).square(), gradient

    start = torch.tensor([[-1.2, 1.0]] * 3, dtype=torch.float64)
    found = minimise(valleys, start, tol=1e-10, iterations=200)
    torch.testing.assert_close(found.theta, torch.ones_like(start), rtol=0, atol=1e-8)
    assert len(found.iterations.unique()) > 1, "each ends when it is done"
    assert minimise(valleys, start, tol=1e-10, iterations=3).iterations.tolist() == [3, 3, 3]
    assert minimise(valleys, torch.ones_like(start), tol=1e-10, iterations=9).iterations.tolist() == [0, 0, 0]


@pytest.mark.parametrize("preset", ["logistic", "dinov2-logreg"])
def test_known_answers(preset):
    protocol = replace(PRESETS[preset], iterations=30)
    train, test = features(*blobs(300, 0, noise=0.1), "a"), features(*blobs(120, 1, noise=0.1), "b")
    top1, *others = logistic.evaluate(train, test, protocol)
    assert top1.value > 0.98
    assert [score.metric for score in others] == ["nll", "ece", "brier"]
    assert {score.better for score in others} == {"lower"}
    told = top1.details["held_out"]
    assert [head["C"] for head in told] == list(protocol.Cs)
    if preset == "logistic":
        assert others[0].value < 0.1
        assert top1.details["C"] == min(told, key=lambda head: head["nll"])["C"]
    else:
        assert top1.details["C"] == max(told, key=lambda head: head["accuracy"])["C"], "the first of the best"
    assert logistic.evaluate(train, test, protocol)[0] == top1


def test_noise_gives_chance_and_says_how_little_it_knows():
    noise = np.random.default_rng(0).normal(size=(480, 6))
    y = np.random.default_rng(1).permutation(np.arange(480) % 3)
    train, test = features(noise[:240], y[:240], "a"), features(noise[240:], y[240:], "b")
    top1, nll, _, brier = logistic.evaluate(train, test)
    assert top1.low <= 1 / 3 <= top1.high
    assert nll.value == pytest.approx(np.log(3), abs=0.1)
    assert brier.value == pytest.approx(2 / 3, abs=0.05)


def test_a_temperature_changes_no_answer():
    train, test = features(*blobs(90, 0), "a"), features(*blobs(300, 1), "b")
    bold = replace(PRESETS["logistic"], Cs=(1e4,))
    raw, mended = (logistic.evaluate(train, test, replace(bold, temperature_scaled=on)) for on in (False, True))
    assert np.array_equal(raw[0].items, mended[0].items)
    assert (raw[0].details["temperature"], mended[0].details["temperature"] != 1) == (1, True)
    assert mended[1].value != raw[1].value


def test_mistakes_are_one_sentence():
    for wrong, message in (
        ({"Cs": (0.0,)}, "positive Cs"),
        ({"dtype": "float8"}, "float32 or float64"),
        ({"chosen_by": "luck"}, "nll or top1"),
        ({"iterations": 0}, "at least 1 iteration"),
    ):
        with pytest.raises(UserError, match=message):
            Logistic(**wrong)
    with pytest.raises(UserError, match="one image per class"):
        logistic.evaluate(features(*blobs(3, 0), "a"), features(*blobs(9, 1), "b"))
