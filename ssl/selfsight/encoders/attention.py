"""Self-attention of images of several sizes laid end to end, without padding (DINOv2's nested tensors; NaViT, 2023).

In: a pack (S, D), all tokens of all images one after the other, and the groups that say where each image ends. Linear
layers and norms see the pack as one matrix; only attention has to know the groups. The weights are those of timm's
attention modules.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn.attention import varlen as kernel

HALF = (torch.float16, torch.bfloat16)
FLASH = (8, 0)  # compute capability from which there is a variable-length kernel: Ampere's
MATERIALISED = 1024  # tokens of an image, up to which a CPU writes down the attention matrix in bfloat16


class Group(NamedTuple):
    """Images of one size in a pack. All groups together fill it: S = Σ count · length."""

    count: int  # B, images
    length: int  # T, tokens of each
    rope: Tensor | None = None  # (1 or B, 1, T - P, 2·head_dim): sines, then cosines; the P prefix tokens have none

    @property
    def size(self) -> int:
        return self.count * self.length


class Layout(NamedTuple):
    """What is where in a pack."""

    groups: tuple[Group, ...]
    ends: Tensor | None = None  # (1 + Σ count,) int32: 0 and where each image ends, if one kernel is to serve all sizes


class Asked(NamedTuple):
    """The rows of a pack that are still of interest after a block."""

    rows: Tensor  # (S',) int64
    layout: Layout  # of them


def layout(groups: Sequence[Group], like: Tensor) -> Layout:
    """Of a pack on the device of `like`."""
    if len(groups) == 1 or not like.is_cuda or torch.cuda.get_device_capability(like.device) < FLASH:
        return Layout(tuple(groups))
    lengths = [torch.full((g.count,), g.length, dtype=torch.int32, device=like.device) for g in groups]
    return Layout(tuple(groups), F.pad(torch.cat(lengths).cumsum(0, dtype=torch.int32), (1, 0)))


def pack(batches: Sequence[Tensor]) -> Tensor:
    """Batches (B_i, T_i, D) → (S, D)."""
    return torch.cat([x.flatten(0, 1) for x in batches]) if len(batches) > 1 else batches[0].flatten(0, 1)


def unpack(x_SD: Tensor, groups: Sequence[Group]) -> list[Tensor]:
    """The inverse of `pack`: views (B_i, T_i, D)."""
    parts = x_SD.split([g.size for g in groups])
    return [part.unflatten(0, (g.count, g.length)) for part, g in zip(parts, groups, strict=True)]


def asked(groups: Sequence[Group], tokens: Sequence[int | None], like: Tensor) -> Asked:
    """The first `tokens` of every image of a group (None: all); they are to be prefix tokens, which do not rotate."""
    rows, fewer, start = [], [], 0
    for g, n in zip(groups, tokens, strict=True):
        n = g.length if n is None else n
        first = start + g.length * torch.arange(g.count, device=like.device)
        rows.append((first.unsqueeze(1) + torch.arange(n, device=like.device)).flatten())
        fewer.append(g if n == g.length else Group(g.count, n))
        start += g.size
    return Asked(torch.cat(rows), layout(fewer, like))


def attention(attn: Any, x_SD: Tensor, layout: Layout, asked: Asked | None = None) -> Tensor:
    """timm's attention module `attn` on a pack, (S, D) → (S, D): no token sees another image's. With `asked`, of these
    rows only, (S', D): all tokens are seen, these see."""
    if not has_heads(attn):  # one of timm's rarer ones: it runs itself, group by group
        out_SD = each(attn, x_SD, layout)
        return out_SD if asked is None else out_SD[asked.rows]
    q, k, v = heads(attn, x_SD, layout.groups, asked)
    seeing = layout if asked is None else asked.layout
    out_SD = attn.norm(attend(q, k, v, seeing, layout, attn.attn_drop.p if attn.training else 0.0))
    if attn.gate is not None:
        out_SD = out_SD * attn.gate(x_SD if asked is None else x_SD[asked.rows]).sigmoid()
    return attn.proj_drop(attn.proj(out_SD))


def each(module: nn.Module, x_SD: Tensor, layout: Layout) -> Tensor:
    """timm's module on one group after the other, with the rotary table as an argument if there is one."""
    batches = zip(unpack(x_SD, layout.groups), layout.groups, strict=True)
    return pack([module(x) if g.rope is None else module(x, rope=g.rope) for x, g in batches])


def has_heads(attn: nn.Module) -> bool:
    return type(attn) in (Attention, AttentionRope, EvaAttention) and attn.qkv is not None


def heads(
    attn: Any, x_SD: Tensor, groups: Sequence[Group], asked: Asked | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Queries (of the rows `asked`, or all), keys and values, each (B, heads, T, head_dim) for every group, queries and
    keys rotated."""
    if getattr(attn, "q_bias", None) is None:
        qkv_SD = attn.qkv(x_SD)
    else:  # EVA's keys have a bias that is always zero
        qkv_SD = F.linear(x_SD, attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))
    q, k, v = rearrange(qkv_SD, "s (three h d) -> three s h d", three=3, h=attn.num_heads)
    seeing = groups if asked is None else asked.layout.groups
    return (
        _by_head(attn.q_norm(q if asked is None else q[asked.rows]), seeing, attn),
        _by_head(attn.k_norm(k), groups, attn),
        [part.transpose(1, 2) for part in unpack(v, groups)],
    )


def _by_head(x_Shd: Tensor, groups: Sequence[Group], attn: Any) -> list[Tensor]:
    """(B, heads, T, head_dim) of every group, rotated."""
    parts = ((part.transpose(1, 2), g.rope) for part, g in zip(unpack(x_Shd, groups), groups, strict=True))
    return [x if rope is None else rotate(x, rope, attn.rotate_half) for x, rope in parts]


def rotate(x_BhTd: Tensor, table: Tensor, half: bool) -> Tensor:
    """Turns the last tokens by the angles of `table`, (1 or B, 1, N, 2·d); the ones before have no place in the image.

    `half` pairs channel j with j + d/2 (DINOv3), otherwise with its neighbour (EVA). The product is taken in the finer
    of the two types and given back in that of `x`.
    """
    prefix = x_BhTd.shape[2] - table.shape[2]
    turned = apply_rot_embed_cat(x_BhTd[:, :, prefix:], table, half=half)
    return torch.cat([x_BhTd[:, :, :prefix], turned], dim=2).type_as(x_BhTd)


def attend(q: list[Tensor], k: list[Tensor], v: list[Tensor], seeing: Layout, seen: Layout, dropout: float) -> Tensor:
    """softmax(q kᵀ / √d) v of each image, (S, heads · d): one kernel for all sizes where there is one."""
    if seeing.ends is not None and seen.ends is not None and not dropout and has_kernel(v[0]):
        return varlen(q, k, v, seeing.ends, seen.ends)
    out = [_attend(*qkv, dropout) for qkv in zip(q, k, v, strict=True)]
    return pack([rearrange(x, "b h t d -> b t (h d)") for x in out])


def as_products(x: Tensor) -> bool:
    """Whether attention on `x` is written as products of matrices. On CPUs torch's fused kernel makes slow work of
    bfloat16, its backward pass above all: plain products take half its time at 197 tokens, a fifth at 37."""
    if x.device.type != "cpu":
        return False
    return (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype) == torch.bfloat16


def _attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """(B, heads, T, d) of images of one size."""
    if as_products(q) and not dropout and k.shape[2] <= MATERIALISED:
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def has_kernel(v: Tensor) -> bool:
    """Whether torch's variable-length kernel takes values of this type and head_dim."""
    return v.dtype in HALF and v.shape[-1] % 8 == 0 and v.shape[-1] <= 256


def varlen(q: list[Tensor], k: list[Tensor], v: list[Tensor], ends_q: Tensor, ends_k: Tensor) -> Tensor:
    """`attend` by torch's variable-length kernel, which is there on CUDA and for 16-bit floats."""
    longest_q, longest_k = (max(x.shape[2] for x in parts) for parts in (q, k))
    # Autocast gives norms of queries and keys back in float32, and does not know this kernel.
    q_Shd, k_Shd, v_Shd = (pack([x.transpose(1, 2) for x in parts]).type_as(v[0]) for parts in (q, k, v))
    out = kernel.varlen_attn(q_Shd, k_Shd, v_Shd, ends_q, ends_k, longest_q, longest_k)
    assert isinstance(out, Tensor)
    return out.flatten(1)
