"""Draws are stratified and repeat themselves; the score is their mean, its interval Student's."""

from dataclasses import replace

import numpy as np
import pytest

from eval_probes import lowshot
from eval_probes.features import Features
from eval_probes.intervals import student
from eval_probes.lowshot import PROBES, LowShot
from eval_probes.pooling import Pooling
from eval_probes.protocol import find
from eval_probes.subject import Subject
from selfsight.errors import UserError

FIVE = LowShot(probe="ridge", per_class=5)


def features(n: int, seed: int, corpus: str, noise: float = 1.0) -> Features:
    y = np.arange(n) % 3
    X = np.random.default_rng(9).normal(size=(3, 6))[y] + noise * np.random.default_rng(seed).normal(size=(n, 6))
    subject = Subject("w", "w" * 64, {}, {}, 6)
    return Features(X.astype(np.float32), y, list("abc"), corpus, corpus, subject, Pooling())


@pytest.mark.parametrize("r", [2, 5, 30])
def test_students_interval_is_scipys(r):
    stats = pytest.importorskip("scipy.stats", reason="scipy is the other opinion")
    values = np.random.default_rng(r).normal(size=r)
    theirs = stats.t.interval(0.95, r - 1, loc=values.mean(), scale=stats.sem(values))
    assert student(values) == pytest.approx(theirs, rel=1e-6)


def test_draws_are_stratified_and_differ():
    y, classes = np.array([0] * 300 + [1] * 100 + [2] * 20), list("abc")
    first = lowshot.draw(y, classes, FIVE, 0)
    assert np.bincount(y[first]).tolist() == [5, 5, 5]
    assert np.array_equal(first, lowshot.draw(y, classes, FIVE, 0))
    assert not np.array_equal(first, lowshot.draw(y, classes, FIVE, 1))
    percent = lowshot.draw(y, classes, LowShot(percent=2.0), 0)
    assert np.bincount(y[percent]).tolist() == [6, 2, 1]


@pytest.mark.parametrize("probe", PROBES)
def test_every_probe_learns_from_five(probe):
    train, test = features(90, 0, "a", noise=0.1), features(60, 1, "b", noise=0.1)
    score = lowshot.evaluate(train, test, LowShot(probe=probe, per_class=5, repeats=2))
    assert score.value > 0.95
    assert score.details["n_train"] == 15


def test_the_score_is_the_mean_of_its_draws():
    train, test = features(300, 0, "a", noise=2.0), features(90, 1, "b", noise=2.0)
    score = lowshot.evaluate(train, test, FIVE)
    told = score.details["by_repeat"]
    assert len(set(told)) > 1
    assert score.value == pytest.approx(np.mean(told))
    assert score.value == pytest.approx(score.items.mean(), abs=1e-6)
    assert score.details["std"] == pytest.approx(np.std(told, ddof=1))
    assert score.low < score.value < score.high
    assert lowshot.evaluate(train, test, FIVE) == score


def test_the_numbers_of_the_probe_within_decide_the_digest():
    assert FIVE.digest != replace(FIVE, probe="knn").digest
    assert FIVE.numbers()["within"]["lambdas"]
    five_percent = find("lowshot-1pct").override(["percent=5"])
    assert five_percent.percent == 5.0
    assert find("lowshot-1pct").override(["percent=5.0"]).digest == five_percent.digest


def test_mistakes_are_one_sentence():
    for wrong, message in (
        ({}, "per_class or percent"),
        ({"per_class": 5, "percent": 1.0}, "per_class or percent"),
        ({"per_class": "5"}, "takes numbers"),
        ({"per_class": 0}, "at least one image"),
        ({"percent": 101}, "up to 100"),
        ({"per_class": 5, "probe": "dino-knn"}, "cannot use"),
        ({"per_class": 5, "repeats": 1}, "two repeats"),
    ):
        with pytest.raises(UserError, match=message):
            LowShot(**wrong)
    with pytest.raises(UserError, match=r"some have fewer \(a 4, b 4, c 4\)"):
        lowshot.evaluate(features(12, 0, "a"), features(9, 1, "b"), FIVE)
