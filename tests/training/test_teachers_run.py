"""Runs with further teachers: DINOv3's gram teacher across a stop, and distillation from another run's checkpoint."""

from typing import Any

import pytest
import torch
import yaml

import selfsight as package
from selfsight.training.interrupts import Interrupts


@pytest.fixture
def objective(recipe):
    """Changes the objective of the recipe and further sections."""

    def change(name: str, keys: dict[str, Any], **sections: dict[str, Any]) -> None:
        plain = yaml.safe_load(recipe.read_text())
        kept = ("out_dim", "hidden_dim", "bottleneck_dim", "global_crops_size", "local_crops_size")
        small = {key: plain["objective"][key] for key in kept}
        plain["objective"] = {"name": name, **small, "local_crops_number": 2, **keys}
        for section, values in sections.items():
            plain[section] |= values
        recipe.write_text(yaml.safe_dump(plain))

    return change


@pytest.mark.parametrize("zero", [0, 3])
def test_a_gram_teacher_continues_as_it_was(selfsight, command, objective, read, tmp_path, monkeypatch, zero):
    """Stopped after the first copy, before the refresh that the log shows when it goes on."""
    keys = {"gram_start": 4, "gram_refresh_every": 4, "gram_crops_size": 64}
    objective("dinov3", keys, training={"zero": zero})
    assert selfsight(command("whole")) == 0
    with monkeypatch.context() as patch:
        asked = iter(range(100))
        patch.setattr(Interrupts, "asked_to_stop", lambda self: next(asked) >= 5)
        assert selfsight(command("parts")) == 85
    assert selfsight(command("parts")) == 0
    (records, weights), (records_parts, weights_parts) = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert records == records_parts
    assert weights.keys() == weights_parts.keys()
    assert [k for k in weights if not torch.equal(weights[k], weights_parts[k])] == []
    assert [("gram" in r) for r in records] == [False] * 4 + [True] * 8
    assert weights["_extra_state"] == 3  # copies: before the steps 4 and 8, and for the one that would be 12
    assert torch.equal(weights["gram_teacher.vit.norm.weight"], weights["teacher.vit.norm.weight"])


def test_distillation_of_a_run_and_of_its_export(selfsight, command, objective, read, tmp_path):
    objective("dinov2", {"shared_head": False}, encoder={"drop_path_rate": 0.0})
    assert selfsight(command("large")) == 0
    smaller = ["encoder.args.embed_dim=24", "encoder.args.num_heads=2"]
    checkpoint = tmp_path / "large" / "checkpoints" / "step_00000012"
    export = tmp_path / "large" / "exports" / "step_00000012"
    for name, teacher in (("of-checkpoint", checkpoint), ("of-export", export)):
        objective("distillation", {"teacher": str(teacher)})
        assert selfsight(command(name, *smaller)) == 0
        assert package.load_pretrained(tmp_path / name).embed_dim == 24
        _, large = read(tmp_path / "large")
        _, weights = read(tmp_path / name)
        assert torch.equal(weights["frozen.encoder.vit.norm.weight"], large["teacher.vit.norm.weight"])
    records, _ = read(tmp_path / "of-export")
    assert records[-1]["loss"] < records[0]["loss"]
