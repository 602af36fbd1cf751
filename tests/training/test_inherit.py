"""Starting from earlier weights: what is taken over, what is derived, what is refused; and a run that does it."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from selfsight.errors import UserError
from selfsight.objectives import Objective, find
from selfsight.recipe import EncoderConfig
from selfsight.training.inherit import inherit, read_source
from selfsight.weights import export_encoder

VIT = EncoderConfig(
    "vit_tiny_patch16_224", img_size=32, args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
)
ROPE = EncoderConfig(
    "vit_tiny_patch16_dinov3_qkvb", img_size=32, args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
)
SIZES = {"out_dim": 32, "hidden_dim": 32, "bottleneck_dim": 16, "global_crops_size": 32, "local_crops_size": 16}


def build(name: str, encoder: EncoderConfig, seed: int, **keys) -> Objective:
    torch.manual_seed(seed)
    config = find(name).Config
    return find(name)(config(**{k: v for k, v in (SIZES | keys).items() if hasattr(config, k) or k in keys}), encoder)


def checkpoint(folder: Path, objective: Objective, encoder: EncoderConfig) -> Path:
    """As training writes it, of a teacher that has left its student."""
    with torch.no_grad():
        for p in objective.parameters():
            p += 0.1 * torch.randn_like(p)
    folder.mkdir()
    save_file({k: v.clone() for k, v in objective.state_dict().items()}, folder / "objective.safetensors")
    said = {**asdict(encoder), "pos_interpolation": objective.student.pos_interpolation}
    (folder / "state.json").write_text(json.dumps({"schema": 1, "step": 3, "encoder": said}))
    (folder / "COMPLETE").touch()
    return folder


def below(state: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def test_a_later_phase_at_a_higher_resolution(tmp_path):
    earlier = build("dinov2", VIT, 0)
    folder = checkpoint(tmp_path / "step", earlier, VIT)
    later = build("dinov2", replace(VIT, img_size=48), 1, global_crops_size=48)
    said = inherit(later, read_source(str(folder)))
    assert "its position table is resampled to 6×6 patches" in said
    old, new = earlier.state_dict(), later.state_dict()
    table = "vit.pos_embed"
    for student, teacher in (("student.", "teacher."), ("student_head.", "teacher_head.")):
        expected = {k: v for k, v in below(old, teacher).items() if k != table}
        for side in (student, teacher):
            torch.testing.assert_close(
                {k: v for k, v in below(new, side).items() if k != table}, expected, atol=0, rtol=0
            )
    assert torch.equal(new["mask_token"], old["mask_token"])
    assert new["student.vit.pos_embed"].shape == (1, 1 + 36, 24)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        tokens, expected = later.eval().student(images), earlier.eval().teacher(images)
    torch.testing.assert_close(tokens.sequence, expected.sequence, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mae", "byol", "dinov3"])
def test_any_objective_starts_from_an_export(tmp_path, name):
    encoder = ROPE if name == "dinov3" else VIT
    keys = {} if name == "dinov3" else {"crop_size": 32}
    source = build("simclr", encoder, 0, crop_size=32).student
    path = export_encoder(source, encoder, tmp_path / "export", meta={})
    later, untouched = (build(name, encoder, 1, **keys) for _ in range(2))
    assert "resampled" not in inherit(later, read_source(str(path)))
    seeing = ("student.", *(["teacher."] if later.teacher_pairs() else []))
    for side in seeing:
        torch.testing.assert_close(below(later.state_dict(), side), dict(source.state_dict()), atol=0, rtol=0)
    changed = {k for k, v in untouched.state_dict().items() if not torch.equal(v, later.state_dict()[k])}
    assert all(k.startswith(seeing) for k in changed)


def test_gram_anchoring_begins_where_the_first_phase_ended(tmp_path):
    earlier = build("dinov3", ROPE, 0, local_cls_norm=False)
    folder = checkpoint(tmp_path / "step", earlier, ROPE)
    later = build("dinov3", ROPE, 1, gram_start=0, gram_crops_size=64)
    inherit(later, read_source(str(folder)))
    old, new = earlier.state_dict(), later.state_dict()
    for side in ("gram_teacher.", "teacher.", "student."):
        assert [k for k, v in below(old, "teacher.").items() if not torch.equal(v, new[side + k])] == []
    assert torch.equal(new["local_norm.weight"], old["teacher.vit.norm.weight"])
    assert later.copies == 1
    again = build("dinov3", ROPE, 2, gram_start=None)  # and what has done its work is left behind
    inherit(again, read_source(str(checkpoint(tmp_path / "later", later, ROPE))))
    assert (again.copies, again.gram_teacher) == (0, None)


@pytest.mark.parametrize(
    ("args", "keys", "sentence"),
    [
        ({"depth": 3}, {}, r"lacks student.vit.blocks.2.*which this objective has"),
        ({"depth": 1}, {}, r"has student.vit.blocks.1.*which this objective has not"),
        ({"patch_size": 16}, {}, r"has student.vit.patch_embed.proj.weight of shape \(24, 3, 8, 8\), here"),
        (
            {},
            {"out_dim": 48},
            r"has center of shape \(32,\), here it is \(48,\): give .* start from one of its exports",
        ),
        ({"num_heads": 4}, {}, r"answers otherwise than it does there"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, args, keys, sentence):
    folder = checkpoint(tmp_path / "step", build("dino", VIT, 0), VIT)
    later = build("dino", replace(VIT, args=VIT.args | args), 1, **keys)
    with pytest.raises(UserError, match=sentence):
        inherit(later, read_source(str(folder)))


def test_wrong_folders(tmp_path):
    with pytest.raises(UserError, match="there is no weights folder"):
        read_source(str(tmp_path / "nothing"))
    folder = checkpoint(tmp_path / "step", build("dino", VIT, 0), VIT)
    (folder / "objective.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="missing or not whole"):
        read_source(str(folder))
    (folder / "COMPLETE").unlink()
    with pytest.raises(UserError, match="not a complete checkpoint"):
        read_source(str(folder))


def test_a_run_from_a_run_goes_on_without_it(selfsight, command, recipe, tmp_path, capsys):
    assert selfsight(command("first", "epochs=1")) == 0
    first = tmp_path / "first"
    (last,) = (first / "checkpoints").glob("step_00000006")
    taken = load_file(last / "objective.safetensors")
    assert selfsight(command("second", f"weights={first}", "epochs=1", "optimizer.base_lr=0.001")) == 0
    second = tmp_path / "second"
    assert f"starts with all weights from {last}" in capsys.readouterr().err
    begun = load_file(second / "exports/step_00000000/model.safetensors")
    torch.testing.assert_close(begun, below(taken, "teacher.vit."), atol=0, rtol=0)
    digest = yaml.safe_load((second / "recipe.yaml").read_text())["weights_sha256"]
    assert f"of {last}" in (second / "recipe.yaml").read_text()
    shutil.rmtree(second / "checkpoints/step_00000006")
    moved = first.rename(tmp_path / "elsewhere")
    assert selfsight(command("second", f"weights={first}", "epochs=1", "optimizer.base_lr=0.001")) == 0
    assert yaml.safe_load((second / "recipe.yaml").read_text())["weights_sha256"] == digest
    shutil.rmtree(second / "checkpoints")  # now there is nothing to go on from but the source, and another one is there
    other = ["optimizer.base_lr=0.001", "epochs=1"]
    assert selfsight(command("second", f"weights={moved / 'checkpoints/step_00000003'}", *other)) == 2
    assert "has other weights" in capsys.readouterr().err
    assert selfsight(command("elsewhere", f"weights={second}", "epochs=1")) == 2
    assert "was begun without weights" in capsys.readouterr().err
