"""Several sizes in one forward without padding: the numbers and gradients of separate forwards, for less arithmetic."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from selfsight import encoders
from selfsight.encoders import attention
from selfsight.encoders.attention import Group, Layout
from selfsight.recipe import EncoderConfig

TINY = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
CONFIGS = {
    "plain": EncoderConfig("vit_tiny_patch16_224", 32, args=TINY),
    "qk norm, registers, LayerScale": EncoderConfig(
        "vit_tiny_patch16_224", 32, args={**TINY, "qk_norm": True, "reg_tokens": 2, "init_values": 0.5}
    ),
    "dinov3": EncoderConfig("vit_small_patch16_dinov3", 32, args={**TINY, "init_values": 0.5}),
    "eva02": EncoderConfig("eva02_tiny_patch14_224", 32, args=TINY),
    "parallel blocks": EncoderConfig("vit_small_patch16_18x2_224", 32, args=TINY),
    "differential attention": EncoderConfig("vit_tiny_patch16_224", 32, args={**TINY, "attn_layer": "diff"}),
}
SIZES = [(4, 32, 32), (6, 16, 24), (1, 40, 16)]


def batches(dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, h, w, generator=generator, dtype=dtype) for n, h, w in SIZES]


def gradients(encoder) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_numbers_and_gradients_of_separate_forwards(config):
    torch.manual_seed(0)
    encoder = encoders.build(config).double()  # float64: what is left is the order of summation
    images, keep = batches(), torch.stack([torch.randperm(6)[:3] for _ in range(6)])
    keeps = [None, keep, None]
    packed = encoder.forward_list(images, keeps=keeps)
    sum(t.sequence.square().sum() for t in packed).backward()
    together = gradients(encoder)
    alone = [encoder(x, keep=k) for x, k in zip(images, keeps, strict=True)]
    sum(t.sequence.square().sum() for t in alone).backward()
    for a, b in zip(packed, alone, strict=True):
        assert a.grid == b.grid
        torch.testing.assert_close(a.sequence, b.sequence, atol=1e-12, rtol=1e-12)
    for name, gradient in gradients(encoder).items():
        torch.testing.assert_close(together[name], gradient, atol=1e-10, rtol=1e-10)


def test_masks_and_norms_have_one_entry_for_each_batch():
    encoder = encoders.build(CONFIGS["dinov3"])
    images, token, norm = batches(torch.float32)[:2], torch.randn(1, 48), torch.nn.LayerNorm(48)
    torch.nn.init.normal_(norm.weight)
    masks, norms = [torch.rand(4, 16) < 0.5, None], [None, norm]
    packed = encoder.forward_list(images, masks=masks, mask_token=token, prefix_norms=norms)
    for a, x, mask, prefix_norm in zip(packed, images, masks, norms, strict=True):
        b = encoder(x, mask=mask, mask_token=token, prefix_norm=prefix_norm)
        torch.testing.assert_close(a.sequence, b.sequence, atol=2e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="shorter"):
        encoder.forward_list(images, masks=masks[:1])


def by_sequence(q, k, v, starts_q, starts_k, longest_q, longest_k):
    """torch's `varlen_attn` in its own words, for machines that lack the kernel."""
    assert k.shape == v.shape
    images = []
    for starts, longest in ((starts_q, longest_q), (starts_k, longest_k)):
        assert longest == (starts[1:] - starts[:-1]).max()
        assert starts.dtype == torch.int32
        images.append([slice(a, b) for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)])
    out = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q[seeing], k[seen], v[seen])))
        for seeing, seen in zip(*images, strict=True)
    ]
    return torch.cat(out, dim=1).transpose(0, 1)


def test_variable_length_kernel_sees_where_images_end(monkeypatch):
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", by_sequence)
    groups = [Group(2, 5), Group(3, 2), Group(1, 7)]
    where, ends = Layout(tuple(groups)), torch.tensor([0, 5, 10, 12, 14, 16, 23], dtype=torch.int32)
    q, k, v = ([torch.randn(g.count, 4, g.length, 8) for g in groups] for _ in range(3))
    expected = attention.attend(q, k, v, where, where, 0.0)
    assert expected.shape == (2 * 5 + 3 * 2 + 7, 4 * 8)
    torch.testing.assert_close(attention.varlen(q, k, v, ends, ends), expected)
    first = [x[:, :, :2] for x in q]
    expected = attention.attend(first, k, v, Layout(tuple(Group(g.count, 2) for g in groups)), where, 0.0)
    torch.testing.assert_close(attention.varlen(first, k, v, 2 * torch.arange(7, dtype=torch.int32), ends), expected)


class Kernel(TorchDispatchMode):
    """The types of queries, keys and values of every call of the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[set[torch.dtype]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.torch_attn._varlen_attn.default:
            self.dtypes.append({x.dtype for x in args[:3]})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["qk norm, registers, LayerScale", "dinov3"])
def test_an_imagined_gpu_never_waits(name, monkeypatch):
    """Tensors with a device and no numbers: whoever asks for one, as a wait for the GPU does, is told that it is not
    there. Autocast's norms are float32; the kernel takes one type."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    encoder = encoders.build(replace(CONFIGS[name], drop_path_rate=0.3))
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.FLASH_ATTENTION), Kernel() as kernel:
        encoder.cuda()
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        try:
            encoder.forward_list([torch.randn(s, device="cuda") for s in ((4, 3, 32, 32), (6, 3, 16, 24))])
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert kernel.dtypes == [{torch.bfloat16}] * encoder.depth


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["plain", "qk norm, registers, LayerScale", "dinov3"])
def test_one_kernel_on_a_gpu(name):
    encoder = encoders.build(replace(CONFIGS[name], compile=False)).cuda()
    images = [x.cuda() for x in batches(torch.float32)]
    with torch.autocast("cuda", torch.bfloat16):
        packed = encoder.forward_list(images)
        alone = [encoder(x) for x in images]
    for a, b in zip(packed, alone, strict=True):
        torch.testing.assert_close(a.sequence, b.sequence, atol=0.05, rtol=0.02)  # bfloat16 has 8 bits


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["plain", "dinov3"])
def test_packing_and_masking_save_what_they_skip(name):
    encoder = encoders.build(CONFIGS[name])
    images = batches(torch.float32)
    separately = sum(flops(lambda x=x: encoder(x)) for x in images)
    assert flops(lambda: encoder.forward_list(images)) == separately  # padding would add to it
    big = torch.randn(2, 3, 128, 128)
    keep = torch.stack([torch.randperm(256)[:64] for _ in range(2)])
    patches = flops(lambda: encoder.vit.patch_embed(big))  # is done before patches are left out
    share = (flops(lambda: encoder(big, keep=keep)) - patches) / (flops(lambda: encoder(big)) - patches)
    assert share < 64 / 256 + 0.02  # products in proportion, attention less; the prefix is always there


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4], ids=["every block", "scaled", "subset"])
def test_prefix_only_is_the_prefix_of_all(config, rate):
    """Tokens and gradients, with the stochastic depth of the same draw."""
    torch.manual_seed(0)
    encoder = encoders.build(replace(config, drop_path_rate=rate)).double()
    images = batches()[:2]
    found = []
    for only in ([True, False], None):
        torch.manual_seed(1)
        whole, second = encoder.forward_list(images, prefix_only=only)
        prefix = torch.cat([whole.cls.unsqueeze(1), whole.registers], dim=1)
        assert whole.patches.shape[1] == (0 if only else 16)
        assert (whole.grid is None) == bool(only)
        (prefix.square().sum() + second.sequence.square().sum()).backward()
        found.append([prefix.detach(), second.sequence.detach(), *gradients(encoder).values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_the_last_block_is_spared_what_nobody_asks_for():
    encoder, images = encoders.build(CONFIGS["plain"]), batches(torch.float32)[0]
    whole, prefix = flops(lambda: encoder(images)), flops(lambda: encoder(images, prefix_only=True))
    assert 1 - prefix / whole > 0.7 * (10 / 12) / encoder.depth  # 10 of a block's 12 D² per token, for nearly all


def test_bfloat16_on_a_cpu_attends_as_float32_does():
    q, k, v = torch.randn(3, 2, 3, 37, 16).unbind()
    where = Layout((Group(2, 37),))
    exact = attention.attend([q], [k], [v], where, where, 0.0)
    half = attention.attend(*([x.bfloat16()] for x in (q, k, v)), where, where, 0.0)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.03, rtol=0.03)  # bfloat16 has 8 bits
