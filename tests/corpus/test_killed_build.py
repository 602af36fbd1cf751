"""A build that dies goes on: kill -9 at any moment, run it again, and the corpus is the one that never died."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from launch import cli
from selfsight.corpus import build, verify
from selfsight.corpus.ledger import Ledger
from selfsight.errors import UserError
from selfsight.shards import Corpus

ROOT = Path(cli.__file__).parents[1]


@pytest.fixture
def many(tmp_path):
    """A thousand small images, which take many units and many shards."""
    folder = tmp_path / "many"
    for i in range(1000):
        (folder / str(i % 4)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i % 256, i // 256, 9)).save(folder / str(i % 4) / f"{i}.bmp")
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("moment", ["scan", "first shards", "more shards", "chunks"])
def test_kill_and_rerun(moment, many, tmp_path):
    out = tmp_path / "out"
    reached = {
        "scan": lambda: (out / ".build/ledger.sqlite-wal").exists(),
        "first shards": lambda: (out / "shards/000000.tar").exists(),
        "more shards": lambda: (out / "index/000010.parquet").exists(),
        "chunks": lambda: (out / "chunks.npy").exists(),
    }[moment]
    command = [sys.executable, "-m", "launch", "corpus", "build", many, "--out", out, "--shard-size", "40KiB"]
    process = subprocess.Popen([*map(str, command), "--workers", "2"], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not reached() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (out / "manifest.json").exists():
        with pytest.raises(UserError, match="unfinished"):
            Corpus.open(out)
    report = build([many], out, workers=1, shard_bytes=40 << 10)
    whole = build([many], tmp_path / "whole", workers=1, shard_bytes=40 << 10)
    assert report.id == whole.id
    assert snapshot(out) == snapshot(tmp_path / "whole")
    assert verify(out, workers=1) == []


@pytest.mark.parametrize("children", [2, 3])  # multiprocessing's tracker and the first worker; one worker more
def test_ctrl_c_is_one_line_however_early(children, many, tmp_path):
    command = [sys.executable, "-m", "launch", "corpus", "build", many, "--out", tmp_path / "out", "--workers", "2"]
    process = subprocess.Popen(
        [*map(str, command)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    born = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and len(born.read_text().split()) < children:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err.splitlines()[-1]) == (130, "selfsight: interrupted; the same command again goes on")
    assert "Traceback" not in err
    assert build([many], tmp_path / "out", workers=1).n == 1000


def test_finished_work_is_not_done_twice(many, tmp_path, monkeypatch):
    """A build that fails while publishing keeps its scan and its shards."""
    import selfsight.corpus.ingest as ingest

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "chunks.npy")

    with monkeypatch.context() as m:
        m.setattr(ingest.np, "save", full)
        with pytest.raises(UserError, match="No space left"):
            build([many], tmp_path / "out", workers=1, shard_bytes=40 << 10)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/shards").iterdir()}
    assert len(before) > 10
    build([many], tmp_path / "out", workers=1, shard_bytes=40 << 10)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out/shards").iterdir()} == before
    assert verify(tmp_path / "out", workers=1) == []


def test_a_disk_that_fails_costs_no_work(many, tmp_path, monkeypatch):
    """Neither a source that cannot be read for a moment nor shards that somebody removed spoil what was done."""
    from selfsight.corpus.scan import Files

    read, victim = Files.read, str(many / "3/999.bmp").encode()

    def failing(self: Files, path: bytes, *args: int) -> bytes:
        if path == victim:
            raise OSError(5, "Input/output error", path)
        return read(self, path, *args)

    with monkeypatch.context() as m:
        m.setattr(Files, "read", failing)
        with pytest.raises(UserError, match="Input/output error"):
            build([many], tmp_path / "out", workers=1, shard_bytes=40 << 10)
    done = sorted((tmp_path / "out/shards").iterdir())
    assert len(done) > 1
    done[0].unlink()
    build([many], tmp_path / "out", workers=1, shard_bytes=40 << 10)
    assert verify(tmp_path / "out", workers=1) == []


def test_what_sqlite_cannot_do_is_an_error_of_the_disk(tmp_path):
    ledger = Ledger(tmp_path, "digest")
    ledger._db.execute("DROP TABLE images")
    for ask in (ledger.counts, lambda: list(ledger.images())):
        with pytest.raises(OSError, match=r"ledger\.sqlite: no such table"):
            ask()
    ledger.close()


def test_another_build_in_an_unfinished_folder_is_refused(photos, tmp_path):
    work = tmp_path / "out/.build"
    work.mkdir(parents=True)
    ledger = Ledger(work, "the recipe of another build")
    with pytest.raises(UserError, match="another build is writing"):
        build([photos], tmp_path / "out")
    ledger.close()
    with pytest.raises(UserError, match="unfinished build"):
        build([photos], tmp_path / "out")
    assert (work / "ledger.sqlite").exists()


def test_a_source_that_changes_meanwhile_is_noticed(photos, tmp_path, monkeypatch):
    import selfsight.corpus.ingest as ingest

    victim = photos / "dog/000.png"
    scan = ingest._scan

    def scan_then_change(*args: object) -> None:
        scan(*args)  # type: ignore[arg-type]
        data = bytearray(victim.read_bytes())
        data[-20] ^= 1
        victim.write_bytes(data)

    with monkeypatch.context() as m:
        m.setattr(ingest, "_scan", scan_then_change)
        with pytest.raises(UserError, match=r"dog/000\.png changed"):
            build([photos], tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    victim.unlink()
    assert build([photos], tmp_path / "out", workers=1).n == 39


def test_workers_leave_when_the_parent_is_killed(tmp_path):
    script = tmp_path / "pool_user.py"
    script.write_text(
        "import time, os\n"
        "from selfsight.corpus.pool import each\n"
        "def work(folder):\n"
        "    open(f'{folder}/{os.getpid()}', 'w').close()\n"
        "    time.sleep(0.01)\n"
        "if __name__ == '__main__':\n"
        f"    list(each(work, ({str(tmp_path / 'pids')!r} for _ in range(10**6)), 2))\n"
    )
    pids = tmp_path / "pids"
    pids.mkdir()
    process = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT / "ssl")})
    while len(list(pids.iterdir())) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()

    def alive(pid: str) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
        except OSError:
            return False

    for _ in range(1000):
        if not any(alive(p.name) for p in pids.iterdir()):
            return
        time.sleep(0.01)
    raise AssertionError("workers outlive their parent")
