"""MoCo v3's loss against solo-learn's numbers and by hand, and what makes its ViT another than timm's."""

import math

import pytest
import torch

from selfsight.encoders.positions import sincos_table
from selfsight.objectives import Progress
from selfsight.objectives.moco_v3 import MoCoV3, MoCoV3Config, contrastive_loss
from selfsight.recipe import EncoderConfig

DTYPES = [torch.float32, torch.float64]
SMALL = MoCoV3Config(hidden_dim=32, out_dim=16, crop_size=32)


def encoder(**args) -> EncoderConfig:
    tiny = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return EncoderConfig("vit_tiny_patch16_224", img_size=32, args={**tiny, **args})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_direction_of_the_loss(golden, dtype):
    numbers = golden.load("solo_losses", dtype)
    q, k = (x.requires_grad_() for x in numbers.inputs("mocov3").values())
    loss, _ = contrastive_loss(q, k, numbers.hyper("mocov3")["temperature"])
    loss.backward()
    numbers.check("mocov3", "loss", loss)
    numbers.check("mocov3", "grad_a", q.grad)
    numbers.check("mocov3", "grad_b", k.grad)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_images_at_right_angles(temperature):
    """The query lies on its key and at right angles to the B − 1 others: 2τ · ln(1 + (B − 1)·e^{−1/τ})."""
    x = torch.eye(5, dtype=torch.float64)
    loss, accuracy = contrastive_loss(3 * x, 0.5 * x, temperature)
    assert loss.item() == pytest.approx(2 * temperature * math.log(1 + 4 * math.exp(-1 / temperature)), rel=1e-12)
    assert accuracy == 1


def test_a_constant_output():
    x = torch.ones(5, 8)
    assert contrastive_loss(x, x, 0.2)[0].item() == pytest.approx(0.4 * math.log(5), rel=1e-6)


def test_2_tau_keeps_the_gradient_at_high_temperatures():
    """To first order in 1/τ the loss is 2τ · ln B + 2 · (mean cosine with all keys − cosine with one's own)."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 4, dtype=torch.float64)
    cos = torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(k, dim=1).T
    tau = 1e6
    expected = 2 * (cos.mean() - cos.diagonal().mean())
    actual = contrastive_loss(q, k, tau)[0] - 2 * tau * math.log(6)
    assert actual.item() == pytest.approx(expected.item(), abs=1e-5)


def test_patches_and_positions_stay_as_they_were_drawn():
    torch.manual_seed(0)
    moco = MoCoV3(SMALL, encoder())
    frozen = [n for n, p in moco.named_parameters() if not p.requires_grad and not n.startswith("teacher")]
    held = ("pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.bias")
    assert frozen == [f"student.vit.{n}" for n in held]
    assert torch.equal(moco.student.vit.pos_embed[0], sincos_table(48, 4, 1).float())
    learnt = MoCoV3(MoCoV3Config(hidden_dim=32, out_dim=16, crop_size=32, freeze_patch_embed=False), encoder())
    assert learnt.student.vit.patch_embed.proj.weight.requires_grad


def test_initialisation_is_xaviers_for_each_of_query_key_and_value():
    torch.manual_seed(0)
    vit = MoCoV3(SMALL, encoder(embed_dim=192)).student.vit
    for weight, fan in (
        (vit.patch_embed.proj.weight, 192 + 3 * 8 * 8),
        (vit.blocks[0].attn.qkv.weight, 2 * 192),
        (vit.blocks[1].mlp.fc1.weight, 192 + 768),
    ):
        bound = (6 / fan) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound
    assert not any(vit.get_parameter(n).any() for n in ("patch_embed.proj.bias", "blocks.0.attn.qkv.bias"))
    assert vit.cls_token.std() < 1e-5


def test_the_heads_are_the_papers():
    moco = MoCoV3(MoCoV3Config(), encoder(embed_dim=96))
    shapes = [
        [tuple(layer.weight.shape) for layer in head if isinstance(layer, torch.nn.Linear)]
        for head in (moco.student_projector, moco.predictor)
    ]
    assert shapes == [[(4096, 96), (4096, 4096), (256, 4096)], [(4096, 256), (256, 4096)]]
    assert [head[-1].weight for head in (moco.student_projector, moco.predictor)] == [None, None]  # no scale, no shift


def test_momentum_rises_along_a_cosine():
    moco = MoCoV3(SMALL, encoder())
    assert [moco.teacher_momentum(Progress(i, 1, 2)) for i in range(3)] == pytest.approx([0.99, 0.995, 1.0], rel=1e-12)
