"""Features are computed once, by however many processes, and a killed one is continued."""

import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from eval_probes import store
from eval_probes.pooling import Pooling
from eval_probes.store import Entry, FeatureStore
from selfsight.errors import UserError

N, D = 100, 3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(store, "BLOCK", 10)


def entry(folder: Path, pooling: Pooling | None = None, dtype: str = "float32") -> Entry:
    return FeatureStore(folder).entry({"k": 1}, pooling or Pooling(), N, D, dtype)


def fill(folder: Path, die_after: int | None = None) -> int:
    """Writes row numbers; the number of blocks that this call filled. After `die_after` of them the process is killed
    with a block in hand."""
    filled = 0
    for claim in entry(folder).claims():
        if filled == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        claim.finish(np.repeat(np.arange(claim.start, claim.stop)[:, None], D, axis=1).astype(np.float32))
        filled += 1
    return filled


def whole(folder: Path) -> bool:
    found = entry(folder)
    return found.complete and np.array_equal(found.read(), np.repeat(np.arange(N)[:, None], D, axis=1))


def test_many_share_the_blocks(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        shares = list(pool.map(lambda _: fill(tmp_path), range(8)))
    assert sum(shares) == 10, "each block once"
    assert whole(tmp_path)
    assert fill(tmp_path) == 0
    assert len([p for p in tmp_path.rglob("*") if p.name.startswith(".")]) == 0, "temporary folders are removed"


def test_a_killed_process_loses_what_it_had_in_hand_only(tmp_path):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=fill, args=(tmp_path, 4))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not entry(tmp_path).complete
    assert fill(tmp_path) == 6
    assert whole(tmp_path)


def test_a_block_that_is_given_back_is_there_for_others(tmp_path):
    claims = entry(tmp_path).claims()
    held = next(claims)
    others = entry(tmp_path).claims()
    first = next(others)
    assert first.start != held.start
    held.close()
    first.close()
    assert fill(tmp_path) == 10


def test_what_is_asked_for_is_taken_from_what_is_there(tmp_path):
    wide = entry(tmp_path, Pooling(4, True))
    assert wide.shape == (N, 5 * D)
    for claim in wide.claims():
        claim.finish(np.tile(np.arange(5 * D, dtype=np.float32), (claim.stop - claim.start, 1)))
    for pooling, columns in (
        (Pooling(1), [9, 10, 11]),
        (Pooling(2), [6, 7, 8, 9, 10, 11]),
        (Pooling(0, True), [12, 13, 14]),
        (Pooling(1, True), [9, 10, 11, 12, 13, 14]),
        (Pooling(1, True, True), [9, 12, 10, 13, 11, 14]),
    ):
        found = entry(tmp_path, pooling)
        assert found.path == wide.path
        assert pooling.take(found.read(), found.pooling)[0].tolist() == columns
    assert entry(tmp_path, Pooling(5)).path != wide.path
    assert entry(tmp_path, dtype="float16").path.parent != wide.path.parent


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="make room"):
        entry(tmp_path)


@pytest.mark.parametrize("tag", ["cls", "cls4", "avg", "cls+avg", "cls4+avg", "cls~avg"])
def test_a_pooling_has_one_name(tag):
    assert Pooling.parse(tag).tag == tag


@pytest.mark.parametrize("tag", ["", "cls1", "cls0", "+avg", "cls+", "cls4~avg", "patches", "clsavg", "~"])
def test_other_names_are_refused(tag):
    with pytest.raises(UserError):
        Pooling.parse(tag)
