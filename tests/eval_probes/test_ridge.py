"""Ridge regression agrees with scikit-learn for every λ, adds up over parts, and knows known answers."""

import numpy as np
import pytest
import torch

from eval_probes import ridge
from eval_probes.features import Features
from eval_probes.pooling import Pooling
from eval_probes.ridge import Moments, Ridge
from eval_probes.subject import Subject
from selfsight.errors import UserError


def features(X, y, corpus: str) -> Features:
    return Features(
        np.asarray(X, np.float32),
        np.asarray(y, np.int64),
        list("abcd"),
        corpus,
        corpus,
        Subject("w", "w" * 64, {}, {}, 8),
        Pooling(),
    )


def blobs(n: int, seed: int, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    y = np.arange(n) % 4
    X = np.random.default_rng(9).normal(size=(4, 8))[y] + noise * generator.normal(size=(n, 8))
    return (X * np.logspace(-2, 2, 8) + 5).astype(np.float32), y


def test_every_lambda_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is the other opinion")
    X, y = blobs(200, 0)
    heads = ridge.solve(Moments.of(torch.from_numpy(X), torch.from_numpy(y), 4), (1e-4, 0.1, 10.0))
    z = (X.astype(np.float64) - X.mean(axis=0, dtype=np.float64)) / X.std(axis=0, dtype=np.float64)
    for i, penalty in enumerate((1e-4, 0.1, 10.0)):
        # Theirs sums over images where ours takes the mean. A column of deviation 0.005 around 5 has, standardisation
        # folded in, weights of some hundred: products of a thousand, of which float32 knows 6e-5.
        theirs = linear_model.Ridge(alpha=penalty * len(X)).fit(z, np.eye(4)[y])
        np.testing.assert_allclose(heads.logits(torch.from_numpy(X))[i], theirs.predict(z), atol=6e-5)


def test_parts_add_up():
    X, y = (torch.from_numpy(a) for a in blobs(300, 0))
    whole = ridge.solve(Moments.of(X, y, 4), (0.1,))
    parts = ridge.solve(Moments.of(X[:100], y[:100], 4) + Moments.of(X[100:], y[100:], 4), (0.1,))
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(parts.bias, whole.bias, rtol=1e-5, atol=1e-6)


def test_known_answers():
    y, y_test = np.arange(400) % 4, np.arange(120) % 4
    label = ridge.evaluate(features(np.eye(8)[y], y, "a"), features(np.eye(8)[y_test], y_test, "b"))
    assert label.value == 1.0
    generator = np.random.default_rng(0)
    noise = ridge.evaluate(
        features(generator.normal(size=(400, 8)), y, "a"), features(generator.normal(size=(120, 8)), y_test, "b")
    )
    assert noise.low <= 0.25 <= noise.high
    blob = ridge.evaluate(features(*blobs(400, 0), "a"), features(*blobs(120, 1), "b"))
    assert blob.value > 0.95
    assert blob.details["lambda"] in Ridge().lambdas


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="positive lambdas"):
        Ridge(lambdas=(0.0,))
    few = features(*blobs(4, 0), "a")
    with pytest.raises(UserError, match="one training image per class"):
        ridge.evaluate(few, features(*blobs(8, 1), "b"))
