"""Several processes, several micro-batches: the same training as one process with one batch."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfsight.stream.quarantine import read_quarantine
from selfsight.training import checkpoint, cluster
from selfsight.training.interrupts import Interrupts
from selfsight.training.pieces import Piece
from selfsight.training.snapshot import Snapshot
from selfsight.weights.run import read_state

PARTS = [(2, 3, 4), (1, 0, 3), (4, 1, 2), (2, 2, None)]  # processes, ZeRO stage, steps
PLAIN = "encoder.drop_path_rate=0.0"  # which images lose a block depends on how the batch is split


def assert_same_training(a, b, steps: int, lr: float = 1e-3) -> None:
    (records_a, weights_a), (records_b, weights_b) = a, b
    assert len(records_a) == len(records_b) == steps
    for x, y in zip(records_a, records_b, strict=True):
        assert x.keys() == y.keys()
        for key in ("loss", "grad_norm", "teacher_entropy", "feature_spread"):
            assert x[key] == pytest.approx(y[key], rel=2e-4), f"{key} at step {x['step']}"
    for name, weight in weights_a.items():
        # AdamW makes steps of up to lr of the rounding noise in a key bias, whose true gradient is zero.
        tolerance = 2 * lr * steps if name.endswith("qkv.bias") else 1e-4
        torch.testing.assert_close(weights_b[name], weight, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_micro_batches_are_one_batch(selfsight, command, read, tmp_path):
    assert selfsight(command("one", PLAIN)) == 0
    assert selfsight(command("four", PLAIN, "training.accumulation=4")) == 0
    assert_same_training(read(tmp_path / "one"), read(tmp_path / "four"), 12)


# Several commands of one launch, since starting ranks is what takes the time.
COMMANDS = """
import json, sys
from launch.cli import main
sys.exit(0 if [main(arguments) for arguments in json.loads(sys.argv[1])] == [2, 0, 0, 0, 2] else 1)
"""


@pytest.fixture
def damage(corpora, tmp_path):
    """Copies the corpus and changes a byte of some of its images."""

    def copy_with(images: int) -> Path:
        copy = tmp_path / f"{images}-damaged"
        shutil.copytree(corpora["one"], copy)
        shard = next((copy / "shards").iterdir())
        content, at = bytearray(shard.read_bytes()), 0
        for _ in range(images):
            at = content.index(b"IDAT", at + 1)
            content[at + 40] ^= 0xFF
        shard.write_bytes(content)
        return copy

    return copy_with


def test_two_processes_are_one_and_continue_what_one_began(
    selfsight, command, torchrun, read, tmp_path, monkeypatch, damage
):
    sharded, whole = [PLAIN, "training.zero=1"], [PLAIN, "training.zero=0"]
    with monkeypatch.context() as patch:
        asked = iter(range(1, 100))
        patch.setattr(Interrupts, "asked_to_stop", lambda self: next(asked) >= 5)
        assert selfsight(command("mixed", *whole)) == 85
    script = tmp_path / "commands.py"
    script.write_text(COMMANDS)
    mistake = command("odd", "batch_size=9", "stream.lanes=3")
    damaged, ruined = command("damaged", *sharded), command("ruined", PLAIN, "training.checkpoint_every=1")
    damaged[2], ruined[2] = f"corpus={damage(1)}", f"corpus={damage(30)}"
    launch = [mistake, command("two", *sharded), command("mixed", *whole), damaged, ruined]
    child = torchrun(2, [str(script), json.dumps(launch)])
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    assert err.count("selfsight: batch_size 9 is no multiple of 2 processes") == 1
    assert out.split() == [str(tmp_path / name) for name in ("two", "mixed", "damaged")]  # each said once
    assert "2 CPU processes, ZeRO-1" in err
    assert "mixed continues from step 5" in err
    assert err.count("1 image could not be read and others stood in") == 1
    (found,) = read_quarantine(tmp_path / "damaged" / "quarantine")
    assert "the image is not what was stored" in found.what
    # Every rank ends in a sentence: of its own, or that another has ended.
    ends = ("images cannot be read, more than", "nor those around it", "another process of this job has ended")
    assert sum(err.count(end) for end in ends) == 2
    assert "Traceback" not in err
    assert selfsight(command("one", PLAIN)) == 0
    assert_same_training(read(tmp_path / "one"), read(tmp_path / "two"), 12)
    assert_same_training(read(tmp_path / "one"), read(tmp_path / "mixed"), 12)


def part(arguments) -> int:
    """In ranks of their own: a part of a run, until `stop` steps are done; what it took up is written again at once."""
    from launch.cli import main

    command, stop, again = arguments
    asked = iter(range(1, 10**6))
    Interrupts.asked_to_stop = lambda self: next(asked) >= (stop or 10**6)  # type: ignore[method-assign]
    load = checkpoint.load

    def load_and_write(path, engine) -> None:
        load(path, engine)
        snapshot = Snapshot()
        snapshot.take(engine)
        checkpoint.write(Path(again), engine.cluster, snapshot, read_state(path))

    checkpoint.load = load_and_write
    return main(command)


def whole(path: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint has of the optimiser, put together."""
    weights = load_file(path / "objective.safetensors")
    written = checkpoint.Written(path, [f"optimizer/{p.name}" for p in sorted((path / "optimizer").iterdir())])
    found = {f"{state}/{name}": number for (name, state), number in written.numbers.items()}
    for name, state in written.stretches:
        tensor = torch.full_like(weights[name], float("nan")).flatten()
        written.read(Piece(name, 0, len(tensor), tensor, 0), state, tensor)
        found[f"{state}/{name}"] = tensor
    return weights | found


def test_a_run_goes_on_with_other_processes_and_another_stage(selfsight, command, warm, read, tmp_path):
    """2 processes, then 1, then 4: nothing of the state is lost on the way, and the same batches follow."""
    for ranks, zero, stop in PARTS:
        arguments = [command("parts", PLAIN, f"training.zero={zero}", "training.keep=9"), stop, str(tmp_path / "again")]
        before = checkpoint.newest(tmp_path / "parts")
        answer = warm("test_parallel:part", arguments, ranks=ranks)
        assert answer["codes"] == [85 if stop else 0] * ranks, answer["err"][0]
        if before:
            taken_up, again = whole(before), whole(tmp_path / "again" / "checkpoints" / before.name)
            assert len(taken_up) > 100
            torch.testing.assert_close(again, taken_up, rtol=0, atol=0)
    assert selfsight(command("one", PLAIN)) == 0
    assert_same_training(read(tmp_path / "one"), read(tmp_path / "parts"), 12)


@pytest.mark.parametrize(("name", "rate", "states"), [("lars", 10.0, ["momentum"]), ("lamb", 0.1, ["exp_avg", "step"])])
def test_layer_wise_optimisers_go_on_as_well(selfsight, command, warm, read, tmp_path, name, rate, states):
    """1 process without ZeRO, 2 with stage 3, 1 with stage 1, for two steps each, against one without a stop."""
    keys = [PLAIN, "training.keep=9", "epochs=1", "optimizer.warmup_epochs=0"]
    keys += [f"optimizer.name={name}", f"optimizer.base_lr={rate}"]
    for ranks, zero, stop in ((1, 0, 2), (2, 3, 2), (1, 1, None)):
        arguments = [command("parts", *keys, f"training.zero={zero}"), stop, str(tmp_path / "again")]
        before = checkpoint.newest(tmp_path / "parts")
        answer = warm("test_parallel:part", arguments, ranks=ranks)
        assert answer["codes"] == [85 if stop else 0] * ranks, answer["err"][0]
        if before:
            taken_up, again = whole(before), whole(tmp_path / "again" / "checkpoints" / before.name)
            assert {f"{state}/student.vit.blocks.0.mlp.fc1.weight" for state in states} <= taken_up.keys()
            torch.testing.assert_close(again, taken_up, rtol=0, atol=0)
    assert selfsight(command("one", *keys)) == 0
    assert_same_training(read(tmp_path / "one"), read(tmp_path / "parts"), 6, lr=rate * 8 / 256)


def test_cores_are_shared_out_among_those_that_share_them():
    """torchrun gives all ranks of a machine the same cores; srun, as a rule, gives each its own."""
    together = [(machine, list(range(96))) for machine in "ab" for _ in range(8)]
    assert [cluster.neighbours(together, rank) for rank in (0, 15)] == [(8, 8), (8, 8)]
    bound = [(machine, list(range(12 * i, 12 * i + 12))) for machine in "ab" for i in range(8)]
    assert [cluster.neighbours(bound, rank) for rank in (0, 15)] == [(8, 1), (8, 1)]
    assert cluster.neighbours([("a", [0])], 0) == (1, 1)


def test_ranks_are_read_from_torchrun_and_from_srun():
    assert cluster.ranks({}) == {}
    assert cluster.ranks({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == {}
    ours = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert cluster.ranks({**ours, "SLURM_STEP_NUM_TASKS": "4"}) == ours
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    assert cluster.ranks({**step, "SLURM_JOB_ID": "12345678", "MASTER_ADDR": "n1"}) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "25678",
    }
