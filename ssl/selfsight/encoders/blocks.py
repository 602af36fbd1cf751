"""One transformer block on a pack of images, and stochastic depth that skips the images it drops.

Huang et al., "Deep Networks with Stochastic Depth", 2016. Above a rate of 0.1 the residual branch runs on a subset of
the batch only (DINOv2, appendix; `drop_add_residual_stochastic_depth`), so that dropped images cost nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers.drop import DropPath
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from selfsight.encoders.attention import Asked, Group, Layout, as_products, attention, each, has_heads, layout, pack

SUBSET_ABOVE = 0.1 + 1e-6  # DINOv2's threshold; timm's rates are float32, in which 0.1 is a little more than 0.1


class Drop(NamedTuple):
    """What stochastic depth does to one residual branch in one step."""

    scale: Tensor  # (S, 1) factor of the branch's rows: 0 for dropped images, so that the expectation stays
    rows: Tensor | None = None  # (S',) the rows that the branch runs on; None: all. `scale` is then of these
    layout: Layout | None = None  # of these rows


Drops = tuple[Drop | None, Drop | None]  # of the attention and of the MLP


def step(block: nn.Module, x_SD: Tensor, layout: Layout, drops: Drops, asked: Asked | None = None) -> Tensor:
    """A block on a pack, (S, D) → (S, D). With `asked`, what becomes of these rows only, (S', D): the others are
    normalised and projected to queries, keys and values, no more, which in the last block spares most of the work."""
    alone = asked is None and len(layout.groups) == 1 and drops == (None, None) and not as_products(x_SD)
    if alone or not is_residual(block):
        x_SD = each(block, x_SD, layout)  # timm's block as it is; the rarer ones with their own stochastic depth
    elif asked is not None and _narrows(block, drops):
        rows = [None if drop is None else Drop(drop.scale[asked.rows]) for drop in drops]
        x_SD = _through(x_SD[asked.rows], _attention(block, x_SD, layout, asked), rows[0])
        return _add(x_SD, block, _mlp, asked.layout, rows[1])
    else:
        x_SD = _add(x_SD, block, _attention, layout, drops[0])
        x_SD = _add(x_SD, block, _mlp, layout, drops[1])
    return x_SD if asked is None else x_SD[asked.rows]


def _narrows(block: Any, drops: Drops) -> bool:
    """Whether a block can be run for some rows; one of which stochastic depth has chosen images is run for all."""
    return has_heads(block.attn) and all(drop is None or drop.rows is None for drop in drops)


def is_residual(block: nn.Module) -> bool:
    """Whether it is x + attention(norm(x)), then x + mlp(norm(x)), and so can be taken apart."""
    return type(block) in (Block, EvaBlock)


def draw(block: Any, groups: Sequence[Group], like: Tensor) -> Drops:
    """Draws for both branches of a block, from torch's generator of the device that `like` is on."""
    if not block.training or not is_residual(block):
        return None, None
    attention, mlp = (_draw(path, groups, like) for path in (block.drop_path1, block.drop_path2))
    return attention, mlp


def _draw(path: nn.Module, groups: Sequence[Group], like: Tensor) -> Drop | None:
    if not isinstance(path, DropPath) or not path.drop_prob:
        return None
    keep = 1 - path.drop_prob
    if path.drop_prob <= SUBSET_ABOVE:
        kept = [like.new_empty(g.count).bernoulli_(keep) / keep for g in groups]
        return Drop(pack([k[:, None, None].expand(-1, g.length, 1) for k, g in zip(kept, groups, strict=True)]))
    scales, rows, smaller, start = [], [], [], 0
    for g in groups:
        count = max(int(g.count * keep), 1)
        chosen = torch.randperm(g.count, device=like.device)[:count]
        scales.append(like.new_full((count * g.length, 1), g.count / count))
        rows.append((start + chosen[:, None] * g.length + torch.arange(g.length, device=like.device)).flatten())
        table = g.rope[chosen] if g.rope is not None and len(g.rope) > 1 else g.rope
        smaller.append(Group(count, g.length, table))
        start += g.size
    return Drop(torch.cat(scales), torch.cat(rows), layout(smaller, like))


def _add(x_SD: Tensor, block: nn.Module, branch: Callable, layout: Layout, drop: Drop | None) -> Tensor:
    """x + branch(x), as far as `drop` lets it through."""
    if drop is None or drop.rows is None:
        return _through(x_SD, branch(block, x_SD, layout), drop)
    residual = branch(block, x_SD[drop.rows], drop.layout) * drop.scale
    return x_SD.index_add(0, drop.rows, residual.to(x_SD.dtype))


def _through(x_SD: Tensor, residual: Tensor, drop: Drop | None) -> Tensor:
    return x_SD + (residual if drop is None else residual * drop.scale)


def _attention(block: Any, x_SD: Tensor, layout: Layout, asked: Asked | None = None) -> Tensor:
    y_SD = attention(block.attn, block.norm1(x_SD), layout, asked)
    return block.ls1(y_SD) if isinstance(block, Block) else _scaled(block.gamma_1, y_SD)


def _mlp(block: Any, x_SD: Tensor, layout: Layout) -> Tensor:
    y_SD = block.mlp(block.norm2(x_SD))
    return block.ls2(y_SD) if isinstance(block, Block) else _scaled(block.gamma_2, y_SD)


def _scaled(gamma: Tensor | None, y_SD: Tensor) -> Tensor:
    """EVA's LayerScale, which is a parameter of the block and not a module."""
    return y_SD if gamma is None else gamma * y_SD
