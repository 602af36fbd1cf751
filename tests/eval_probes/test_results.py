"""Intervals with known values; a store that many can write to and nobody can change."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from eval_probes.intervals import bootstrap, mcnemar, sign_flips, wilson
from eval_probes.knn import KNN
from eval_probes.results import ResultsStore, Score, figure, paired_p, score_of
from eval_probes.subject import Subject
from selfsight.errors import UserError


def score(value: float = 0.5) -> Score:
    return Score("top1", value, 100, 0.4, 0.6, "knn", "p", "weights", "w", "train", "test", details={"k": 20})


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (1, 10, 0.0179, 0.4042),  # Brown, Cai and DasGupta's and every table's example
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
        (40000, 50000, 0.79647, 0.80348),
    ],
)
def test_wilson(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=6e-5)


def test_a_bootstrap_interval_is_about_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    half = 1.96 * values.std() / 400**0.5
    # The ends are quantiles of 2,000 draws: known to about 5 % of the half width.
    assert bootstrap(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


@pytest.mark.parametrize(("more", "less"), [(0, 0), (3, 0), (10, 2), (7, 7), (6000, 5800)])
def test_mcnemar_is_the_binomial_test(more, less):
    stats = pytest.importorskip("scipy.stats", reason="scipy is the other opinion")
    a = np.array([True] * more + [False] * less + [True] * 50)
    b = np.array([False] * more + [True] * less + [True] * 50)
    expected = stats.binomtest(more, more + less).pvalue if more + less else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_sign_flips_agree_with_the_paired_t_test():
    stats = pytest.importorskip("scipy.stats", reason="scipy is the other opinion")
    generator = np.random.default_rng(1)
    a = generator.normal(size=200)
    for shift in (0.0, 0.1, 0.2):
        b = a + generator.normal(shift, 1.0, 200)
        expected = stats.ttest_rel(a, b).pvalue
        assert sign_flips(a, b) == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 10_000) ** 0.5 + 0.01)


def test_scores_keep_what_each_item_was_worth_and_are_compared_by_it(tmp_path):
    generator = np.random.default_rng(0)
    right, better = generator.random(1003) < 0.5, generator.random(1003) < 0.7
    subjects = [Subject(name, name * 64, {}, {"step": 1}, 8) for name in "ab"]
    a, b = (
        score_of("top1", items, KNN(), subject, train="t", test="u")
        for items, subject in zip((right, better), subjects, strict=True)
    )
    errors = generator.random(1003).astype(np.float32)
    c = score_of("error", errors, KNN(), subjects[0], train=None, test="u", unit="px", better="lower")
    d = figure("rankme", 17.25, 1003, KNN(), subjects[0], train=None, test="u")
    store = ResultsStore(tmp_path / "results.sqlite")
    store.add(a, b, c, d)
    kept = store.rows()
    assert kept == [a, b, c, d]
    assert np.array_equal(kept[0].items, right)
    assert np.array_equal(kept[2].items, errors)
    assert paired_p(kept[0], kept[1]) == mcnemar(right, better) < 1e-6
    assert paired_p(kept[0], kept[2]) is None
    assert paired_p(kept[3], kept[3]) is None
    assert (a.value, (a.low, a.high)) == (right.mean(), wilson(int(right.sum()), 1003))
    assert c.said() == f"{errors.mean():.4g} px (95 % interval {c.low:.4g}–{c.high:.4g}, n=1003)"
    assert d.said() == "17.25 (n=1003)"
    assert store.find(KNN(), subjects[0], "t", "u") == [a]
    assert store.find(KNN(k=10), subjects[0], "t", "u") == []


def test_scores_come_back_in_order(tmp_path):
    store = ResultsStore(tmp_path / "new" / "results.sqlite")
    assert store.rows() == []
    for v in (0.1, 0.2):
        store.add(score(v))
    assert store.rows() == [score(0.1), score(0.2)]


def test_rows_cannot_be_changed(tmp_path):
    store = ResultsStore(tmp_path / "results.sqlite")
    store.add(score())
    with sqlite3.connect(store.path) as db:
        for statement in ("UPDATE scores SET value = 1", "DELETE FROM scores"):
            with pytest.raises(sqlite3.DatabaseError, match="never changed"):
                db.execute(statement)


def test_many_writers_lose_nothing(tmp_path):
    path = tmp_path / "results.sqlite"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: ResultsStore(path).add(score(i / 100)), range(40)))
    assert sorted(s.value for s in ResultsStore(path).rows()) == [i / 100 for i in range(40)]


def test_a_file_that_is_no_store_is_one_sentence_and_stays_as_it_was(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes, longer than a hundred bytes " * 10)
    with pytest.raises(UserError, match="cannot be used as a results store"):
        ResultsStore(path).add(score())
    assert path.read_text().startswith("my notes")


def test_a_newer_store_is_refused(tmp_path):
    path = tmp_path / "results.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="newer selfsight"):
        ResultsStore(path).add(score())


def test_reading_leaves_the_folder_as_it_is(tmp_path):
    store = ResultsStore(tmp_path / "results.sqlite")
    store.add(score(0.5))
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(store.rows()) == 1
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    assert store.path.read_bytes()[18:20] == b"\1\1"  # no write-ahead log, which a folder one may only read cannot have
