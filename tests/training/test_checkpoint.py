"""What a checkpoint is held against, and what becomes of half of one."""

import json

import pytest

from selfsight.errors import UserError
from selfsight.training import checkpoint
from selfsight.weights.run import read_state

STATE = {
    "schema": 1,
    "step": 5,
    "total_steps": 10,
    "seed": 0,
    "corpus_id": "abc",
    "batch_size": 8,
    "lanes": 2,
    "window": 16,
    "world_size": 1,
    "zero": 1,
    "objective": "dino",
    "encoder": {"name": "vit"},
}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("corpus_id", "xyz", "another corpus"),
        ("encoder", {"name": "other"}, "another encoder"),
        ("objective", "mae", "another objective"),
        ("batch_size", 16, "another batch_size"),
        ("seed", 1, "another seed"),
        ("zero", 0, "another ZeRO stage"),
        ("world_size", 2, "start 1 processes"),
    ],
)
def test_another_run_is_named(tmp_path, key, value, said):
    checkpoint.check(tmp_path, STATE, STATE)
    with pytest.raises(UserError, match=said):
        checkpoint.check(tmp_path, STATE, {**STATE, key: value})


def test_any_number_of_processes_goes_with_zero_0_and_with_a_finished_run(tmp_path):
    checkpoint.check(tmp_path, {**STATE, "zero": 0}, {**STATE, "zero": 0, "world_size": 4})
    checkpoint.check(tmp_path, {**STATE, "step": 10}, {**STATE, "world_size": 4})


def test_only_complete_ones_count(tmp_path):
    for step, complete in ((1, True), (2, True), (3, False)):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({**STATE, "step": step}))
        if complete:
            (folder / "COMPLETE").touch()
    (tmp_path / "checkpoints/.step_00000004").mkdir()
    checkpoint.sweep(tmp_path)
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints/step_00000002"
    assert not (tmp_path / "checkpoints/.step_00000004").exists()


def test_damaged_and_newer_state_is_a_sentence(tmp_path):
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_state(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({**STATE, "schema": 2}))
    with pytest.raises(UserError, match="newer selfsight"):
        read_state(tmp_path)
