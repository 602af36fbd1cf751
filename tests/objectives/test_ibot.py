"""iBOT against its paper's equations written out crop by crop, and what it promises the trainer.

There are no golden numbers of the official iBOT; the parts it shares with DINO and DINOv2 are held by theirs.
"""

import math

import pytest
import torch

from selfsight.errors import UserError
from selfsight.objectives import Progress
from selfsight.objectives.ibot import IBOT, IBOTConfig
from selfsight.recipe import EncoderConfig

ENCODER = EncoderConfig(
    "vit_tiny_patch16_224", img_size=32, args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
)
START = Progress(step=0, steps_per_epoch=4, total_steps=16)


def small(**keys) -> IBOTConfig:
    sizes = {"out_dim": 20, "hidden_dim": 16, "bottleneck_dim": 8, "global_crops_size": 32, "local_crops_size": 16}
    return IBOTConfig(**{**sizes, "local_crops_number": 2, **keys})


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_loss_and_centres_are_those_of_the_paper(harness, shared):
    """Equation 1 over pairs of different crops, equation 2 over each crop's masked patches, divided by their number;
    the centre of the patches is over all of them, masked or not, as in the official update_center."""
    torch.manual_seed(0)
    config = small(shared_head=shared, patch_out_dim=None if shared else 12, dino_weight=0.7, ibot_weight=1.3)
    model = IBOT(config, ENCODER).double()
    for p in model.teacher.parameters():  # a teacher that is not the student
        p += 0.1 * torch.randn_like(p)
    model.mask_token.normal_()
    model.center.normal_()
    model.patch_center.value.normal_()
    center, patch_center = model.center.clone(), model.patch_center.value.clone()
    batch = {k: v.double() for k, v in harness.make_batch(model, 3).items()}
    mask = model.masks(batch["mask"]).unflatten(0, (2, 3))
    assert mask.any()
    assert not mask.any(dim=-1).all()
    outcome = model(batch, START)

    s_head, t_head = model.patch_heads()
    t = [model.teacher(crop) for crop in batch["global"]]
    s = [
        model.student(crop, mask=m, mask_token=model.mask_token) for crop, m in zip(batch["global"], mask, strict=True)
    ]
    cls_s = [x.cls for x in s] + [model.student(crop).cls for crop in batch["local"]]
    l_cls, l_mim, pairs = 0.0, 0.0, 0
    for q in range(2):
        u = ((model.teacher_head(t[q].cls) - center) / 0.04).softmax(-1)
        for v in range(4):
            if v != q:
                l_cls += -(u * (model.student_head(cls_s[v]) / 0.1).log_softmax(-1)).sum(-1).mean()
                pairs += 1
        u = ((t_head(t[q].patches) - patch_center) / 0.04).softmax(-1)
        each = -(u * (s_head(s[q].patches) / 0.1).log_softmax(-1)).sum(-1)  # (3, N)
        l_mim += ((each * mask[q]).sum(-1) / mask[q].sum(-1).clamp(min=1)).mean() / 2
    # The weights of the masked patches are in float32, as in DINOv2's code; hence the tolerance.
    torch.testing.assert_close(outcome.metrics["dino"], l_cls / pairs)
    torch.testing.assert_close(outcome.metrics["ibot"], l_mim, rtol=1e-6, atol=0)
    torch.testing.assert_close(outcome.loss, 0.7 * l_cls / pairs + 1.3 * l_mim, rtol=1e-6, atol=0)

    model.after_step()
    mean_cls = torch.cat([model.teacher_head(x.cls) for x in t]).mean(0)
    mean_patch = torch.cat([t_head(x.patches).flatten(0, 1) for x in t]).mean(0)
    torch.testing.assert_close(model.center, 0.9 * center + 0.1 * mean_cls)
    torch.testing.assert_close(model.patch_center.value, 0.9 * patch_center + 0.1 * mean_patch)


def test_half_of_the_crops_are_masked_by_a_tenth_to_a_half():
    torch.manual_seed(0)
    model = IBOT(small(global_crops_size=112), ENCODER)
    masks = model.masks(torch.rand(500, model.views().noise[0].length))
    assert masks.shape == (1000, 14 * 14)
    ratio = masks.float().mean(dim=1)
    assert (ratio > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)  # 3 standard deviations of 1000 coins
    assert ratio.max() <= 0.5
    assert ratio[ratio > 0].mean().item() == pytest.approx(0.29, abs=0.02)  # 0.3, less what falls short


def test_masks_follow_the_image_whatever_batch_it_is_in():
    model = IBOT(small(), ENCODER)
    noise = torch.rand(6, model.views().noise[0].length)
    first, second = model.masks(noise).unflatten(0, (2, 6))
    alone = model.masks(noise[4:5])
    assert torch.equal(alone, torch.stack([first[4], second[4]]))


def test_the_teacher_sees_the_whole_image(harness):
    """With another mask its part of the outcome stays as it is."""
    model = IBOT(small(), ENCODER)
    batch = harness.make_batch(model, 4)
    one = model.distil(batch, torch.zeros(8, 16, dtype=torch.bool), START)
    other = model.distil(batch, torch.ones(8, 16, dtype=torch.bool), START)
    assert torch.equal(one.features, other.features)
    assert torch.equal(one.metrics["teacher_entropy"], other.metrics["teacher_entropy"])
    assert one.metrics["ibot"] == 0 < other.metrics["ibot"]


@torch.no_grad()
def test_loss_of_an_output_that_tells_nothing(harness):
    """Uniform students: ln K for the class tokens, and ln K for each crop of which something is masked."""
    model = IBOT(small(), ENCODER)
    for name, p in model.named_parameters():
        if "last_layer" not in name:
            p.zero_()
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[:3, 5:9] = True
    outcome = model.distil(harness.make_batch(model, 4), mask, START)
    assert outcome.loss.item() == pytest.approx((1 + 3 / 8) * math.log(20), rel=1e-5)
    known = model.collapse_values()
    assert "loss" not in known
    assert {name: outcome.metrics[name].item() for name in known} == pytest.approx(known)


def test_heads_shared_or_not():
    shared, own = IBOT(small(), ENCODER), IBOT(small(shared_head=False, patch_out_dim=12), ENCODER)
    assert [len(m.teacher_pairs()) for m in (shared, own)] == [2, 3]
    assert not any("patch_head" in name for name in shared.state_dict())
    assert own.patch_center.value.shape == (12,)
    for head in ("student_head", "student_patch_head"):
        name = f"{head}.last_layer.weight_v"
        (scale,) = [r.lr_scale(START) for r in own.parameter_rules() if name.startswith(r.prefix)]
        assert scale == 0.0


def test_wrong_recipes():
    with pytest.raises(UserError, match=r"objective.mask_ratio is"):
        IBOT(small(mask_ratio=[0.5]), ENCODER)
    with pytest.raises(UserError, match=r"objective.mask_probability is 2"):
        IBOT(small(mask_probability=2.0), ENCODER)
    with pytest.raises(UserError, match=r"set objective.shared_head=false"):
        IBOT(small(patch_out_dim=12), ENCODER)
