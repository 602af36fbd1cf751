"""The cache: bounded, least recently used first, one fetch for all who ask, and nothing to repair after a kill."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from selfsight.errors import UserError
from selfsight.shards.cache import Cache, default_folder

KB = 1024


def data_of(key: str, size: int = 10 * KB) -> bytes:
    return (key.encode() * size)[:size]


def take(cache: Cache, key: str, size: int = 10 * KB) -> bool:
    """Whether it was there; what came is what it should be in either case."""
    fetched = []
    with cache.take(key, size, lambda: fetched.append(key) or data_of(key, size)) as file:
        assert file.read() == data_of(key, size)
    return not fetched


def names(cache: Cache) -> set[str]:
    return {p.name for p in cache.folder.iterdir()} - {"lock"}


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "runs", 100 * KB)


def test_what_was_fetched_is_there_the_next_time(cache):
    assert not take(cache, "a")
    assert take(cache, "a")
    assert take(Cache(cache.folder, 100 * KB), "a")
    cache.drop("a")
    assert not take(cache, "a")
    cache.drop("never seen")


def test_the_least_recently_used_goes_first(cache, held):
    for key in "abcdefghi":
        take(cache, key)
    time.sleep(0.02)  # a file system counts time in ticks of up to 10 ms
    assert take(cache, "a")
    assert take(cache, "c")
    take(cache, "j")
    take(cache, "k")  # the eleventh of ten
    assert {"a", "c", "j", "k"} <= names(cache)
    assert "b" not in names(cache)
    assert held(cache.folder) <= 100 * KB


def test_a_reader_keeps_what_is_evicted_under_it(cache):
    take(cache, "a")
    with cache.take("a", None, lambda: b"") as file:
        for i in range(30):
            take(cache, f"other{i}")
        assert "a" not in names(cache)
        assert file.read() == data_of("a")


def test_what_does_not_fit_is_handed_on_and_not_kept(cache):
    for _ in range(2):
        assert not take(cache, "large", 101 * KB)
        assert not take(Cache(cache.folder, 0), "any")
    assert not cache.keeps(101 * KB)
    with cache.take("unknown", None, lambda: bytes(101 * KB)) as file:
        assert len(file.read()) == 101 * KB
    with cache.take("short", 10, lambda: b"123") as file:  # fewer bytes than announced
        assert file.read() == b"123"
    assert names(cache) == set()


def test_a_file_of_another_length_is_fetched_again(cache):
    take(cache, "a")
    os.truncate(cache.folder / "a", 5)
    assert not take(cache, "a")
    assert take(cache, "a")


def test_threads_that_ask_at_once_fetch_once(cache):
    fetched = []

    def fetch() -> bytes:
        fetched.append(1)
        time.sleep(0.05)
        return data_of("a")

    def ask() -> None:
        with cache.take("a", 10 * KB, fetch) as file:
            got.append(file.read())

    got: list[bytes] = []
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == [data_of("a")] * 8
    assert len(fetched) == 1
    assert names(cache) == {"a"}


def test_a_fetch_that_fails_leaves_the_turn_to_the_next(cache):
    def fail() -> bytes:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        cache.take("a", None, fail)
    assert names(cache) == set()
    assert not take(cache, "a")


def test_a_full_disk_is_said_once_and_reading_goes_on(cache, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for key in "abc":
        assert not take(cache, key)
    assert not cache.keeps(1)
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert names(cache) == set()


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    cache = Cache(tmp_path / "file" / "runs", 100 * KB)
    assert not take(cache, "a")
    assert not take(cache, "a")
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_lock_file_that_says_nonsense_is_mended(cache, held):
    for text in (b"", b"junk", b"99999999999999999999 99999999999.000\n", b"0 0\n", b"\xff\xfe"):
        (cache.folder).mkdir(exist_ok=True)
        (cache.folder / "lock").write_bytes(text)
        for i in range(15):
            take(cache, f"{i}")
            assert held(cache.folder) <= 100 * KB


def test_where_and_how_large_by_default(tmp_path, monkeypatch):
    for name in ("SELFSIGHT_CACHE", "XDG_CACHE_HOME", "SELFSIGHT_CACHE_BYTES"):
        monkeypatch.delenv(name, raising=False)
    assert default_folder() == Path.home() / ".cache/selfsight/runs"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg/selfsight/runs"
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "own"))
    assert default_folder() == tmp_path / "own/runs"
    statistics = os.statvfs(tmp_path)
    free = statistics.f_bavail * statistics.f_frsize
    assert Cache().capacity() == pytest.approx(free / 2, rel=0.05)  # others write to this disk as well
    for text, size in {"123": 123, "4K": 4096, "2MiB": 2 << 20, "3GB": 3 << 30, "1t": 1 << 40, "0": 0}.items():
        monkeypatch.setenv("SELFSIGHT_CACHE_BYTES", text)
        assert Cache().capacity() == size
    monkeypatch.setenv("SELFSIGHT_CACHE_BYTES", "much")
    with pytest.raises(UserError, match="no size"):
        Cache()


WORK = """
import os, sys, time
from pathlib import Path
import random
from selfsight.shards.cache import Cache

FOLDER, BOUND, SIZE = Path(sys.argv[1]), 6 << 20, 1 << 20

def data_of(key):
    return (key.encode() * SIZE)[:SIZE]

def work(seed, rounds, log=None):
    cache, chance = Cache(FOLDER, BOUND), random.Random(seed)
    for _ in range(rounds):
        key = f"key{chance.randrange(12):02d}"
        def fetch():
            if log is not None:
                os.write(log, b"x")
            return data_of(key)
        with cache.take(key, SIZE, fetch) as file:
            assert file.read() == data_of(key), key
"""


def started(code: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WORK + code, str(folder)], stdout=subprocess.PIPE)


def test_many_processes_keep_the_bound_together(tmp_path, held):
    """Six processes take twelve files of 1 MiB through a cache of 6 MiB, while this one watches its size."""
    folder = tmp_path / "runs"
    working = started(
        """
children = []
for seed in range(6):
    if (pid := os.fork()) == 0:
        status = 1
        try:
            work(seed, 60)
            status = 0
        finally:
            os._exit(status)
    children.append(pid)
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
""",
        folder,
    )
    most = 0
    while working.poll() is None:
        most = max(most, held(folder))
        time.sleep(0.001)
    working.communicate()
    assert working.returncode == 0
    assert 4 << 20 < most <= 6 << 20
    assert {p.suffix for p in folder.iterdir()} == {""}


def test_killed_at_any_moment_it_leaves_nothing_to_repair(tmp_path):
    """Forty times two processes that write and evict are killed together; the next ones go on, within the bound."""
    working = started(
        """
import signal
chance = random.Random(0)
for turn in range(40):
    children = []
    for seed in range(2):
        if (pid := os.fork()) == 0:
            try:
                work(1000 * turn + seed, 10**6)
            finally:
                os._exit(1)
        children.append(pid)
    time.sleep(chance.uniform(0, 0.03))
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    for pid in children:
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert sum(p.stat().st_size for p in FOLDER.glob("key*")) <= BOUND
work(1, 100)
Cache(FOLDER, 1 << 20).take("key99", SIZE, lambda: data_of("key99")).close()  # makes room by looking at all
assert {p.name for p in FOLDER.iterdir()} == {"lock", "key99"}, list(FOLDER.iterdir())
""",
        tmp_path / "runs",
    )
    working.communicate()
    assert working.returncode == 0


def test_a_stopped_process_does_not_hold_up_the_others(tmp_path, monkeypatch):
    """Who waits too long for another to bring a file goes for it itself."""
    import selfsight.shards.cache as module

    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    other = started("Cache(FOLDER).take('a', 3, lambda: print('in', flush=True) or time.sleep(60))", tmp_path / "runs")
    try:
        assert other.stdout.readline() == b"in\n"
        with Cache(tmp_path / "runs", 100 * KB).take("a", 3, lambda: b"abc") as file:
            assert file.read() == b"abc"
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert not take(Cache(tmp_path / "runs", 100 * KB), "a")
