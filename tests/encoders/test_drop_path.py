"""Stochastic depth that leaves dropped images out of the computation, and equals dropping them afterwards."""

import pytest
import torch
from timm.layers import DropPath
from torch.utils.flop_counter import FlopCounterMode

from selfsight import encoders
from selfsight.encoders.attention import Group, Layout, unpack
from selfsight.encoders.blocks import draw, step
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig

TINY = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
NAMES = ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"]


def build(name: str, rate: float, **more) -> encoders.Encoder:
    torch.manual_seed(0)
    encoder = encoders.build(EncoderConfig(name, 32, rate, drop_path_uniform=True, args={**TINY, **more}))
    for p in encoder.parameters():  # LayerScale starts at 1e-5, which would hide what is dropped
        torch.nn.init.normal_(p, std=0.3)
    return encoder


def rates(encoder) -> list[float]:
    return [m.drop_prob for m in encoder.modules() if isinstance(m, DropPath)]


def test_rates_of_the_blocks():
    assert rates(build(NAMES[0], 0.3)) == [0.3] * 4
    linear = encoders.build(EncoderConfig(NAMES[0], 32, 0.3, args=TINY))
    assert rates(linear) == pytest.approx([0.3, 0.3])  # of the second block: the first has none
    teacher = EncoderConfig(NAMES[0], 32, 0.3, drop_path_uniform=True, args=TINY)
    assert rates(encoders.build(teacher, drop_path=False)) == []
    with pytest.raises(UserError, match="drop_path_uniform is not there"):
        encoders.build(EncoderConfig("vit_small_patch16_18x2_224", 32, 0.3, drop_path_uniform=True, args=TINY))


@pytest.mark.parametrize("name", NAMES)
def test_equals_dropping_after_the_branch(name):
    """By hand: x + branch(x) · B / k for the k images kept, x for the others; the draw is repeated from its seed."""
    encoder = build(name, 0.4)
    block, groups = encoder.vit.blocks[0], (Group(5, 7), Group(8, 3))
    x = torch.randn(5 * 7 + 8 * 3, 48)
    torch.manual_seed(7)
    drops = draw(block, groups, x)
    out = step(block, x, Layout(groups), drops)
    torch.manual_seed(7)
    kept = [[torch.randperm(g.count)[: int(g.count * 0.6)] for g in groups] for _ in range(2)]
    expected = []
    for i, (part, group) in enumerate(zip(unpack(x, groups), groups, strict=True)):
        for branch, chosen in zip(("attn", "mlp"), kept, strict=True):
            factor = torch.zeros(group.count, 1, 1)
            factor[chosen[i]] = group.count / len(chosen[i])
            part = part + factor * residual(block, branch, part)
        expected.append(part)
    for actual, wanted in zip(unpack(out, groups), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)
    both = set(kept[0][0].tolist()) | set(kept[1][0].tolist())
    untouched = [i for i in range(5) if i not in both]
    assert torch.equal(unpack(out, groups)[0][untouched], unpack(x, groups)[0][untouched])


def residual(block, branch, x):
    if branch == "attn":
        y = block.attn(block.norm1(x))
        return block.ls1(y) if hasattr(block, "ls1") else block.gamma_1 * y
    y = block.mlp(block.norm2(x))
    return block.ls2(y) if hasattr(block, "ls2") else block.gamma_2 * y


def test_low_rates_drop_each_image_by_itself():
    block, groups = build(NAMES[0], 0.1).vit.blocks[0], (Group(2000, 2),)
    torch.manual_seed(3)
    attention, mlp = draw(block, groups, torch.empty(4000, 48))
    assert attention is not None
    assert mlp is not None
    assert attention.rows is None
    scale = attention.scale.view(2000, 2)
    assert torch.equal(scale[:, 0], scale[:, 1])
    assert scale.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert scale.mean().item() == pytest.approx(1, abs=0.03)  # standard deviation 0.0075
    assert not torch.equal(scale, mlp.scale.view(2000, 2))


@pytest.mark.parametrize("name", NAMES)
def test_same_generator_same_numbers_and_gradients(name):
    encoder, images = build(name, 0.5), torch.randn(6, 3, 32, 32)
    seen = []
    for _ in range(2):
        torch.manual_seed(1)
        encoder.zero_grad()
        tokens = encoder(images).sequence
        tokens.square().sum().backward()
        seen.append([tokens.detach(), *(p.grad.clone() for p in encoder.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert not torch.equal(encoder(images).sequence, seen[0][0])
    encoder.eval()
    assert torch.equal(encoder(images).sequence, encoder(images).sequence)


def test_masked_patches_keep_their_places_in_the_subset():
    """Rotary tables of masked images differ from image to image, and must follow the images that are kept."""
    encoder = build("vit_small_patch16_dinov3", 0.5)
    images = torch.randn(6, 3, 32, 32)
    keep = torch.stack([torch.randperm(16)[:5] for _ in range(6)])
    torch.manual_seed(2)
    tokens = encoder(images, keep=keep)
    order = torch.tensor([3, 1, 4, 0, 2])  # the order of kept patches says nothing
    torch.manual_seed(2)
    other = encoder(images, keep=keep[:, order])
    torch.testing.assert_close(other.patches, tokens.patches[:, order], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_half_the_images_cost_half(name):
    encoder, images = build(name, 0.5), torch.randn(8, 3, 32, 32)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(images)
            embedding = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
        return counter.get_total_flops() - embedding

    training = flops()
    encoder.eval()
    assert training * 2 == flops()


def test_one_image_is_never_dropped():
    encoder = build(NAMES[0], 0.9)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(encoder(images).sequence, encoder.eval()(images).sequence)
