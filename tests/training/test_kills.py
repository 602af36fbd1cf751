"""Killed at any moment, or with a disk that fills, a run goes on from its last complete checkpoint to the same bits.

A few kills by default; SELFSIGHT_KILLS=30 python -m pytest tests/training/test_kills.py for thirty.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfsight.training import checkpoint
from selfsight.weights.run import checkpoints, exports, read_state

KILLS = int(os.environ.get("SELFSIGHT_KILLS", "8"))
LEFT = 400_000  # bytes on the full disk: less than a checkpoint, more than a log


def outcome(run: Path) -> tuple:
    """What a run has at its end: digests of weights, teacher and moments, exports, and the log but for times."""
    last = read_state(run / "checkpoints/step_00000012")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = {"images_per_second", "data_wait", "peak_memory"}
    log = [{k: v for k, v in line.items() if k not in timings} for line in lines]
    weights = {step: (path / "model.safetensors").read_bytes() for step, path in exports(run).items()}
    return last["files"], log, weights


@pytest.fixture(scope="module", params=[1, 2], ids=["one-process", "two-processes"])
def ranks(request) -> int:
    return request.param


def test_kill_minus_nine_at_random_moments(warm, command, tmp_path, ranks):
    """Half of them at a random time, half when the run is about to do something in its folder of checkpoints."""
    frequent = "training.checkpoint_every=2"
    for name in ("warm", "whole"):
        began = time.monotonic()
        assert warm("launch.cli:main", command(name, frequent), ranks=ranks)["codes"] == [0] * ranks
    seconds = time.monotonic() - began
    whole = outcome(tmp_path / "whole")
    moments, runs, killed = random.Random(ranks), 1, []
    while len(killed) < (KILLS if ranks == 1 else KILLS // 4):
        when = {"after": moments.uniform(0, seconds)} if len(killed) % 2 else {"event": moments.randint(1, 150)}
        answer = warm("launch.cli:main", command(f"killed{runs}", frequent), ranks=ranks, **when)
        if answer["codes"] == [0] * ranks:  # it came to its end before
            runs += 1
        else:
            assert answer["codes"][0] == -9, answer["err"][0]
            killed.append((runs, when))
    assert warm("launch.cli:main", command(f"killed{runs}", frequent), ranks=ranks)["codes"] == [0] * ranks
    for i in range(1, runs + 1):
        run = tmp_path / f"killed{i}"
        assert outcome(run) == whole, [when for number, when in killed if number == i]
        assert not list((run / "checkpoints").glob(".*"))


def limited(arguments: list[str]) -> int:
    """In a process of its own: a disk that takes no more than half of the checkpoint of step 6."""
    from launch.cli import main

    save_file = checkpoint.save_file

    def fill(tensors, path, metadata):
        if "step_00000006" in str(path):
            half = sum(tensor.nbytes for tensor in tensors.values()) // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, resource.RLIM_INFINITY))
        save_file(tensors, path, metadata)

    checkpoint.save_file = fill
    return main(arguments)


def assert_goes_on(warm, command, run: Path, answer, kept: list[int]) -> None:
    assert answer["codes"] == [2], answer["err"]
    last = answer["err"][0].splitlines()[-1]
    assert "could not be written" in last
    assert "make room, then give the same command again" in last
    assert list(checkpoints(run)) == kept
    assert not list((run / "checkpoints").glob(".*"))


def test_a_file_that_cannot_grow(warm, command, tmp_path):
    assert_goes_on(warm, command, tmp_path / "run", warm("test_kills:limited", command()), [0, 3])
    for name in ("run", "whole"):
        assert warm("launch.cli:main", command(name))["codes"] == [0]
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.fixture
def disk(tmp_path):
    """A disk of 64 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "selfsight-test", str(place)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills(warm, command, disk, tmp_path):
    arguments = command("disk/run")
    answer = warm("launch.cli:main", arguments, event=70)  # somewhere among the first checkpoints
    assert answer["codes"] == [-9]
    checkpoint.sweep(disk / "run")  # which would make room
    kept = list(checkpoints(disk / "run"))
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - LEFT))
    assert_goes_on(warm, command, disk / "run", warm("launch.cli:main", arguments), kept)
    ballast.unlink()
    assert warm("launch.cli:main", arguments)["codes"] == [0]
    assert warm("launch.cli:main", command("whole"))["codes"] == [0]
    assert outcome(disk / "run") == outcome(tmp_path / "whole")
