"""What a checkpoint is held against, and what becomes of half of one."""

import json

import pytest

from selfsight.errors import UserError
from selfsight.recipe import TrainingConfig
from selfsight.training import checkpoint
from selfsight.training.saver import kept
from selfsight.weights.run import checkpoints, read_state

STATE = {
    "schema": 2,
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
    ],
)
def test_another_run_is_named(tmp_path, key, value, said):
    checkpoint.check(tmp_path, STATE, STATE)
    with pytest.raises(UserError, match=said):
        checkpoint.check(tmp_path, STATE, {**STATE, key: value})


def test_any_number_of_processes_and_any_stage_go_on(tmp_path):
    checkpoint.check(tmp_path, STATE, {**STATE, "zero": 3, "world_size": 4})


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "damaged"),
        (json.dumps({**STATE, "schema": 3}), "newer selfsight"),
        (json.dumps({**STATE, "schema": 1}), "older selfsight"),
    ],
)
def test_a_state_that_is_damaged_or_of_another_version_is_a_sentence(tmp_path, text, said):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_state(tmp_path)


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        ({}, [9, 10]),
        ({"keep": 1, "keep_every": 4}, [4, 8, 10]),
        ({"keep": 1, "keep_best": "max knn"}, [3, 10]),
        ({"keep": 1, "keep_best": "min knn"}, [6, 10]),
        ({"keep": 1, "keep_best": "max unheard_of"}, [10]),
    ],
)
def test_what_is_kept(tmp_path, policy, steps):
    knn = {2: 0.5, 3: 0.7, 6: 0.1, 7: float("nan")}  # not every checkpoint has been measured
    for step in range(1, 11):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        metrics = {"knn": knn[step]} if step in knn else {}
        (folder / "state.json").write_text(json.dumps({**STATE, "step": step, "metrics": metrics}))
        (folder / "COMPLETE").touch()
    assert sorted(kept(checkpoints(tmp_path), TrainingConfig(**policy))) == steps
