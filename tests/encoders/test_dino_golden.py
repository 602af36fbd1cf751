"""The encoder and DINO's head against the official code's numbers."""

import pytest
import torch

from selfsight import encoders
from selfsight.recipe import EncoderConfig

DTYPES = [torch.float32, torch.float64]


def dino_encoder(hyper: dict) -> encoders.Encoder:
    config = EncoderConfig(
        name="vit_tiny_patch16_224",
        img_size=hyper["img_size"],
        args={k: hyper[k] for k in ("patch_size", "embed_dim", "depth", "num_heads")},
    )
    return encoders.build(config, pos_interpolation="dino")


@pytest.fixture(params=DTYPES, ids=str)
def vit(golden, request):
    numbers = golden.load("dino_vit", request.param)
    encoder = dino_encoder(numbers.hyper("weights")).to(request.param)
    weights = golden.to_dino(numbers.weights("weights"))
    state = {k.removeprefix("student."): v for k, v in weights.items() if k.startswith("student.")}
    encoder.load_state_dict(state, strict=True)
    return numbers, encoder


@pytest.mark.parametrize("case", ["vit_32x32", "vit_16x16", "vit_48x48", "vit_48x32", "vit_16x64"])
@torch.no_grad()
def test_tokens_at_every_size(vit, case):
    numbers, encoder = vit
    images = numbers.inputs(case)["images"]
    tokens, grid = encoder.prepare_tokens(images)
    numbers.check(case, "prepared_tokens", tokens)
    numbers.check(case, "pos_encoding", encoder.position_table(grid))
    out = encoder(images)
    assert out.grid == grid == (images.shape[2] // 8, images.shape[3] // 8)
    numbers.check(case, "cls", out.cls)
    for i, layer in enumerate(encoder.intermediate(images, n=2)):
        numbers.check(case, f"intermediate{i}", layer.sequence)
    numbers.check(case, "last_attention", encoder.last_attention(images))


@torch.no_grad()
def test_low_variance_tokens_show_the_layernorm_epsilon(vit):
    numbers, encoder = vit
    scale = torch.tensor(numbers.hyper("low_variance")["token_scale"], dtype=torch.float32)
    v = encoder.vit
    for p in (v.cls_token, v.pos_embed, v.patch_embed.proj.weight, v.patch_embed.proj.bias):
        p.copy_(p.float() * scale)  # scaled in float32 in the file, whatever is computed afterwards
    images = numbers.inputs("low_variance")["images"]
    numbers.check("low_variance", "cls", encoder(images).cls)
    numbers.check("low_variance", "first_norm", v.blocks[0].norm1(encoder.prepare_tokens(images)[0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["nl3", "nl3_free_g", "nl1", "nl2", "nl3_bn_train"])
def test_head(golden, case, dtype):
    numbers = golden.load("dino_head", dtype)
    hyper = numbers.hyper(case)
    head = encoders.DINOHead(hyper.pop("in_dim"), hyper.pop("out_dim"), **hyper).to(dtype)
    head.load_state_dict(numbers.weights(case), strict=True)
    inputs = numbers.inputs(case)
    x = inputs["x"].requires_grad_()
    y = head(x)
    numbers.check(case, "y", y)
    (y * inputs["cotangent"]).sum().backward()
    numbers.check(case, "grad_x", x.grad)
    grads = {name: p.grad for name, p in head.named_parameters() if p.requires_grad}
    expected = [k.removeprefix("grad_w.") for k in numbers.outputs(case) if k.startswith("grad_w.")]
    assert sorted(grads) == sorted(expected)
    for name, grad in grads.items():
        numbers.check(case, f"grad_w.{name}", grad)
