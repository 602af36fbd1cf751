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

HALF = (torch.float16, torch.bfloat16)


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


def layout(groups: Sequence[Group], like: Tensor) -> Layout:
    """Of a pack on the device of `like`."""
    if len(groups) == 1 or not like.is_cuda:
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


def attention(attn: Any, x_SD: Tensor, layout: Layout) -> Tensor:
    """timm's attention module `attn` on a pack, (S, D) → (S, D): no token sees another image's."""
    if not has_heads(attn):  # one of timm's rarer ones: it runs itself, group by group
        return each(attn, x_SD, layout)
    q, k, v = heads(attn, x_SD, layout.groups)
    out_SD = attn.norm(attend(q, k, v, layout, attn.attn_drop.p if attn.training else 0.0))
    if attn.gate is not None:
        out_SD = out_SD * attn.gate(x_SD).sigmoid()
    return attn.proj_drop(attn.proj(out_SD))


def each(module: nn.Module, x_SD: Tensor, layout: Layout) -> Tensor:
    """timm's module on one group after the other, with the rotary table as an argument if there is one."""
    batches = zip(unpack(x_SD, layout.groups), layout.groups, strict=True)
    return pack([module(x) if g.rope is None else module(x, rope=g.rope) for x, g in batches])


def has_heads(attn: nn.Module) -> bool:
    return type(attn) in (Attention, AttentionRope, EvaAttention) and attn.qkv is not None


def heads(attn: Any, x_SD: Tensor, groups: Sequence[Group]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Queries, keys and values, each (B, heads, T, head_dim) for every group, queries and keys rotated."""
    if getattr(attn, "q_bias", None) is None:
        qkv_SD = attn.qkv(x_SD)
    else:  # EVA's keys have a bias that is always zero
        qkv_SD = F.linear(x_SD, attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))
    qkv = rearrange(qkv_SD, "s (three h d) -> three s h d", three=3, h=attn.num_heads)
    q, k, v = (
        [part.transpose(1, 2) for part in unpack(x, groups)] for x in (attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2])
    )
    rotated = [
        [x if g.rope is None else rotate(x, g.rope, attn.rotate_half) for x, g in zip(parts, groups, strict=True)]
        for parts in (q, k)
    ]
    return rotated[0], rotated[1], v


def rotate(x_BhTd: Tensor, table: Tensor, half: bool) -> Tensor:
    """Turns the last tokens by the angles of `table`, (1 or B, 1, N, 2·d); the ones before have no place in the image.

    `half` pairs channel j with j + d/2 (DINOv3), otherwise with its neighbour (EVA). The product is taken in the finer
    of the two types and given back in that of `x`.
    """
    prefix = x_BhTd.shape[2] - table.shape[2]
    turned = apply_rot_embed_cat(x_BhTd[:, :, prefix:], table, half=half)
    return torch.cat([x_BhTd[:, :, :prefix], turned], dim=2).type_as(x_BhTd)


def attend(q: list[Tensor], k: list[Tensor], v: list[Tensor], layout: Layout, dropout: float) -> Tensor:
    """softmax(q kᵀ / √d) v of each image, (S, heads · d): one kernel for all sizes where there is one."""
    if layout.ends is not None and v[0].dtype in HALF and not dropout:
        return varlen(q, k, v, layout.ends)
    out = [F.scaled_dot_product_attention(*qkv, dropout_p=dropout) for qkv in zip(q, k, v, strict=True)]
    return pack([rearrange(x, "b h t d -> b t (h d)") for x in out])


def varlen(q: list[Tensor], k: list[Tensor], v: list[Tensor], ends: Tensor) -> Tensor:
    """`attend` by torch's variable-length kernel, which is there on CUDA and for 16-bit floats."""
    from torch.nn.attention import varlen as kernel

    longest = max(x.shape[2] for x in q)
    q_Shd, k_Shd, v_Shd = (pack([x.transpose(1, 2) for x in parts]) for parts in (q, k, v))
    out = kernel.varlen_attn(q_Shd, k_Shd, v_Shd, ends, ends, longest, longest)
    assert isinstance(out, Tensor)
    return out.flatten(1)
