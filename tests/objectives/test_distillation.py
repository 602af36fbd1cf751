"""Distillation from frozen teachers, with heads and without, and from a live one."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from selfsight.collective import Collective
from selfsight.errors import UserError
from selfsight.losses import koleo, sinkhorn_knopp, spatial_loss, summary_loss
from selfsight.objectives import Progress
from selfsight.objectives.dino import dino_loss
from selfsight.objectives.dinov2 import DINOv2, DINOv2Config
from selfsight.objectives.distillation import Distillation, DistillationConfig
from selfsight.recipe import EncoderConfig
from selfsight.training.optim import layer_scales

STUDENT = EncoderConfig(
    "vit_tiny_patch16_224", img_size=32, args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
)
TEACHER = EncoderConfig(STUDENT.name, img_size=32, args={**STUDENT.args, "embed_dim": 48, "depth": 3})
SIZES = {
    "out_dim": 30,
    "patch_out_dim": 20,
    "hidden_dim": 40,
    "bottleneck_dim": 16,
    "global_crops_size": 32,
    "local_crops_size": 16,
    "local_crops_number": 2,
}
START = Progress(step=0, steps_per_epoch=4, total_steps=16)
ALONE = Collective()


def small(**keys) -> Distillation:
    torch.manual_seed(1)
    return Distillation(DistillationConfig(**{**SIZES, **keys}), STUDENT)


def write_checkpoint(folder, encoder: EncoderConfig = TEACHER) -> DINOv2:
    """Of a DINOv2 run with a large encoder, as training leaves it."""
    torch.manual_seed(2)
    model = DINOv2(DINOv2Config(**{**SIZES, "shared_head": False}), encoder)
    with torch.no_grad():
        for _, teacher in model.teacher_pairs():
            for p in teacher.parameters():
                p += 0.02 * torch.randn_like(p)
    folder.mkdir()
    said = {"name": encoder.name, "img_size": 32, "args": encoder.args, "pos_interpolation": "dino"}
    (folder / "state.json").write_text(json.dumps({"encoder": said}))
    save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / "objective.safetensors")
    return model


def write_export(folder, patch_size: int = 8) -> DINOv2:
    args = {**TEACHER.args, "patch_size": patch_size}
    model = write_checkpoint(folder, EncoderConfig(TEACHER.name, 32, args=args))
    (folder / "state.json").unlink()
    save_file(model.teacher.vit.state_dict(), folder / "model.safetensors")
    document = {"architecture": TEACHER.name, "model_args": {**args, "img_size": 32}, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(document))
    return model


def test_a_frozen_teachers_prototypes(harness, tmp_path):
    """The whole loss once more from its parts: DINO's of all pairs of different crops, iBOT's of the patches that a
    mask names, whole crops to both, KoLeo of the two global crops."""
    large = write_checkpoint(tmp_path / "step")
    model = small(teacher=str(tmp_path / "step"))
    batch = harness.make_batch(model, 4)
    outcome = model(batch, START)
    images, local, temp = batch["global"].flatten(0, 1), batch["local"].flatten(0, 1), 0.04  # where τ_t begins
    t, s = large.teacher(images), model.student(images)
    cls_s = torch.cat([s.cls, model.student(local).cls])
    q = sinkhorn_knopp(large.teacher_head(t.cls), temp, ALONE).unflatten(0, (2, 4))
    l_dino = dino_loss(model.student_head(cls_s).unflatten(0, (4, 4)), q, 0.1)
    mask = model.masks(batch["mask"])
    q_patch = sinkhorn_knopp(large.teacher_patch_head(t.patches[mask]), temp, ALONE)
    log_p = (model.student_patch_head(s.patches[mask]) / 0.1).log_softmax(-1)
    each = -(q_patch * log_p).sum(-1)
    of = mask.nonzero()[:, 0]
    l_ibot = sum(each[of == i].mean() for i in of.unique()) / 8
    l_koleo = koleo(s.cls[:4], ALONE) + koleo(s.cls[4:], ALONE)
    torch.testing.assert_close(outcome.loss, l_dino + l_ibot + 0.1 * l_koleo)
    torch.testing.assert_close(outcome.features, s.cls[:4].detach())


def test_a_frozen_teacher_stays_as_it_is(harness, tmp_path):
    write_checkpoint(tmp_path / "step")
    model = small(teacher=str(tmp_path / "step"))
    before = {k: v.clone() for k, v in model.frozen.state_dict().items()}
    harness.train(model, range(3))
    assert all(torch.equal(v, before[k]) for k, v in model.frozen.state_dict().items())
    assert not any(p.requires_grad for p in model.frozen.parameters())
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"student", "student_head", "student_patch_head"}
    assert model.teacher.embed_dim == 24  # what is exported: the student's average
    assert not torch.equal(model.teacher.vit.cls_token, model.student.vit.cls_token)


def test_losses_of_features_by_hand():
    """x = (1, 0), y = (1, 1): cos = 1/√2; of |x − y| = (0, 1) smooth L1 is (0 + 1/2) / 2 = 1/4."""
    x, y = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]])
    assert summary_loss(x[0], y[0]).item() == pytest.approx(1 - 1 / math.sqrt(2))
    assert spatial_loss(x, y).item() == pytest.approx(0.9 * (1 - 1 / math.sqrt(2)) + 0.1 / 4)
    assert spatial_loss(y, y).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shared_head", [False, True])
def test_a_frozen_teachers_features(harness, tmp_path, shared_head):
    large = write_export(tmp_path / "export")
    keys = {"teacher": str(tmp_path / "export"), "shared_head": shared_head, "patch_out_dim": None}
    model = small(**keys)
    assert [c.name for c in model.views().crops] == ["global"]
    batch = harness.make_batch(model, 4)
    outcome = model(batch, START)
    images = batch["global"].flatten(0, 1)
    t, s = large.teacher(images), model.student(images)
    patch_head = model.student_head if shared_head else model.student_patch_head
    expected = summary_loss(model.student_head(s.cls), t.cls) + spatial_loss(patch_head(s.patches), t.patches)
    torch.testing.assert_close(outcome.loss, expected)
    outcome.loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert missing == []
    model.after_step()
    again = small(**keys)
    again.load_state_dict(model.state_dict(), strict=True)
    assert model.collapse_values() == {}


def test_a_frozen_teachers_features_are_learnt(harness, tmp_path):
    write_export(tmp_path / "export")
    model = small(teacher=str(tmp_path / "export"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    batch, losses = harness.make_batch(model, 4), []
    for _ in range(20):
        loss = model(batch, START).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_patches_of_another_size_are_brought_to_the_students_grid(harness, tmp_path):
    large = write_export(tmp_path / "export", patch_size=4)  # 8 × 8 patches, the student has 4 × 4
    model = small(teacher=str(tmp_path / "export"))
    batch = harness.make_batch(model, 2)
    images = batch["global"].flatten(0, 1)
    grid = large.teacher(images).patches.transpose(1, 2).unflatten(2, (8, 8))
    target = torch.nn.functional.interpolate(grid, (4, 4), mode="bicubic").flatten(2).transpose(1, 2)
    expected = spatial_loss(model.student_patch_head(model.student(images).patches), target)
    torch.testing.assert_close(model(batch, START).metrics["patches"], expected.detach())


def test_a_live_teacher_learns_as_it_would_alone(harness):
    """Nothing of the student's loss reaches it, and its own loss is DINOv2's."""
    model = small(teacher_name=TEACHER.name, teacher_args=TEACHER.args)
    alone = DINOv2(model.config, TEACHER)
    alone.load_state_dict(model.large.state_dict())
    batch = harness.make_batch(model, 4)
    outcome, its = model(batch, START), alone(batch, START)
    torch.testing.assert_close(outcome.metrics["large_ibot"], its.metrics["ibot"])
    outcome.loss.backward()
    its.loss.backward()
    found = {n.removeprefix("large."): g for n, g in harness.gradients(model).items() if n.startswith("large.")}
    torch.testing.assert_close(found, harness.gradients(alone))
    assert not model.large.teacher_head.last_layer.weight_v.requires_grad
    assert len(model.teacher_pairs()) == 6


def test_the_student_matches_the_live_teachers_average(harness):
    model = small(teacher_name=TEACHER.name, teacher_args=TEACHER.args)
    assert model.cls_heads() == (model.student_head, model.large.teacher_head)
    assert model.patch_heads() == (model.student_patch_head, model.large.teacher_patch_head)
    prefixes = list(layer_scales(model, 0.9, 0.2))
    assert prefixes.index("student.vit.blocks.0.") < prefixes.index("large.student.vit.blocks.2.")
    batch = harness.make_batch(model, 4)
    before = model(batch, START).metrics
    with torch.no_grad():
        for p in model.large.student.parameters():
            p += 0.1  # only the average is looked at
    after = model(batch, START).metrics
    assert torch.equal(before["ibot"], after["ibot"])
    assert not torch.equal(before["large_ibot"], after["large_ibot"])


def test_losses_leave_autocast(harness, tmp_path):
    write_export(tmp_path / "export")
    for model in (small(teacher=str(tmp_path / "export")), small(teacher_name=TEACHER.name, teacher_args=TEACHER.args)):
        with torch.autocast("cpu", torch.bfloat16):
            outcome = model(harness.make_batch(model, 4), START)
        assert outcome.loss.dtype == torch.float32


def test_prototypes_must_be_as_many(tmp_path):
    write_checkpoint(tmp_path / "step")
    with pytest.raises(UserError, match=r"has 30 prototypes: set objective.out_dim"):
        small(teacher=str(tmp_path / "step"), out_dim=31)
    with pytest.raises(UserError, match=r"has 20 prototypes: set objective.patch_out_dim"):
        small(teacher=str(tmp_path / "step"), patch_out_dim=None)
    with pytest.raises(UserError, match="is no teacher"):
        small(teacher=str(tmp_path / "none"))
