"""The encoder with LayerScale and mask tokens, and DINOv2's head, against the official code's numbers."""

import pytest
import torch

from selfsight import encoders
from selfsight.recipe import EncoderConfig

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=DTYPES, ids=str)
def vit(golden, request):
    """The numbers, an encoder with the official weights and its mask token."""
    numbers = golden.load("dinov2_vit", request.param)
    hyper = numbers.hyper("weights")
    args = {k: hyper[k] for k in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "init_values")}
    config = EncoderConfig("vit_tiny_patch16_224", hyper["img_size"], args=args)
    encoder = encoders.build(config, pos_interpolation="dino").to(request.param)
    weights = numbers.weights("weights")
    mask_token = weights.pop("mask_token")
    encoder.vit.load_state_dict(weights, strict=True)
    return numbers, encoder, mask_token


@pytest.mark.parametrize("case", ["forward_32x32", "forward_48x40"])
@torch.no_grad()
def test_tokens_of_whole_and_of_masked_images(vit, case):
    numbers, encoder, mask_token = vit
    if case == "forward_48x40" and numbers.dtype == torch.float64:
        pytest.skip("the official code resamples the position table in float32, in the float64 run too")
    inputs = numbers.inputs(case)
    whole = encoder(inputs["images"])
    numbers.check(case, "x_norm_clstoken", whole.cls)
    numbers.check(case, "x_norm_patchtokens", whole.patches)
    masked = encoder(inputs["images"], mask=inputs["masks"], mask_token=mask_token)
    numbers.check(case, "masked_x_norm_clstoken", masked.cls)
    numbers.check(case, "masked_x_norm_patchtokens", masked.patches)
    for i, layer in enumerate(encoder.intermediate(inputs["images"], n=2)):
        numbers.check(case, f"intermediate{i}_patches", layer.patches)
        numbers.check(case, f"intermediate{i}_cls", layer.cls)


def test_a_masked_patch_says_where_it_is_and_not_what_it_shows():
    torch.manual_seed(0)
    args = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "reg_tokens": 3}
    encoder = encoders.build(EncoderConfig("vit_tiny_patch16_224", 32, args=args))
    images, token = torch.randn(2, 3, 32, 32), torch.randn(1, 24)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, [0, 5]] = True
    tokens, _ = encoder.prepare_tokens(images, mask=mask, mask_token=token)
    bare, _ = encoder.prepare_tokens(images)
    hidden = torch.zeros(2, 20, dtype=torch.bool)
    hidden[:, [4, 9]] = True  # after a class token and three registers
    torch.testing.assert_close(tokens[~hidden], bare[~hidden])
    expected = token + encoder.position_table((4, 4))[:, [-16, -11]]
    torch.testing.assert_close(tokens[hidden].view(2, 2, 24), expected.expand(2, -1, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["nl3", "nl2_nobias", "nl1"])
def test_head(golden, case, dtype):
    numbers = golden.load("dinov2_head", dtype)
    hyper = numbers.hyper(case)
    head = encoders.DINOHead(hyper.pop("in_dim"), hyper.pop("out_dim"), norm_last_layer=False, **hyper).to(dtype)
    head.load_state_dict(numbers.weights(case), strict=True)
    inputs = numbers.inputs(case)
    x = inputs["x"].requires_grad_()
    y = head(x)
    numbers.check(case, "y", y)
    (y * inputs["cotangent"]).sum().backward()
    numbers.check(case, "grad_x", x.grad)
    expected = [k.removeprefix("grad_w.") for k in numbers.outputs(case) if k.startswith("grad_w.")]
    assert sorted(expected) == sorted(name for name, _ in head.named_parameters())
    for name, parameter in head.named_parameters():
        numbers.check(case, f"grad_w.{name}", parameter.grad)
