"""Intervals with known values; a store that many can write to and nobody can change."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from eval_probes.intervals import wilson
from eval_probes.results import ResultsStore, Score
from selfsight.errors import UserError


def score(value: float = 0.5) -> Score:
    return Score("knn", value, 100, 0.4, 0.6, "knn", "p", "weights", "w", "train", "test", {"k": 20})


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


def test_scores_come_back_in_order(tmp_path):
    store = ResultsStore(tmp_path / "new" / "results.sqlite")
    assert store.rows() == []
    assert [store.add(score(v)) for v in (0.1, 0.2)] == [1, 2]
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
        rows = list(pool.map(lambda i: ResultsStore(path).add(score(i / 100)), range(40)))
    assert sorted(rows) == list(range(1, 41))
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
