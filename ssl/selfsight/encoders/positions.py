"""Position tables: MAE's fixed sine-cosine one, and resampling a table to another grid of patches.

Resampling is linear in the table, so it is written as a matrix: `matrix @ table` is one product per forward pass, and
its gradient on a GPU is the same at every run, which that of bicubic interpolation is not.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from selfsight.encoders.encoder import Encoder


def resampling_matrix(old: tuple[int, int], new: tuple[int, int], how: str) -> Tensor:
    """float64 (new rows·columns, old rows·columns), row-major: takes a table of grid `old` to grid `new`. Bicubic.

    "dino": the coordinates are mapped by the scale factor (n + 0.1) / √N and not by the ratio of the sizes, without
    antialiasing (facebookresearch/dino, vision_transformer.py, interpolate_pos_encoding). "timm": by the ratio of the
    sizes, antialiased (timm.layers.resample_abs_pos_embed).
    """
    rows, columns = (_along(o, n, how) for o, n in zip(old, new, strict=True))
    return torch.kron(rows, columns)


def _along(old: int, new: int, how: str) -> Tensor:
    """One axis of it, (new, old): bicubic interpolation is separable."""
    # One channel per old place. Two equal columns, since torch's antialiased kernel errs where the new width is 1.
    unit = torch.eye(old, dtype=torch.float64)[None, :, :, None].expand(-1, -1, -1, 2)
    if how == "dino":
        resampled = F.interpolate(unit, scale_factor=((new + 0.1) / old, 1.0), mode="bicubic")
    else:
        resampled = F.interpolate(unit, size=(new, 2), mode="bicubic", antialias=True)
    assert resampled.shape[2] == new, "the 0.1 keeps the product from rounding down"
    return resampled[0, :, :, 0].T.contiguous()


def resize_patches(patches: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Patch tokens (B, N, D) of grid `old` → of grid `new`, bicubic without antialiasing, in fp32 or wider: targets of
    a teacher that sees more, or other, patches than the student (DINOv3's gram teacher; AM-RADIO).
    """
    patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
    if old == new:
        return patches
    grid = rearrange(patches, "b (h w) d -> b d h w", h=old[0])
    return rearrange(F.interpolate(grid, new, mode="bicubic"), "b d h w -> b (h w) d")


@torch.no_grad()
def fix_sincos(encoder: "Encoder") -> None:
    """Puts the fixed sine-cosine table in the place of the learnt one (MAE, I-JEPA, data2vec 2.0, MoCo v3); an encoder
    that has none, because it rotates, stays as it is."""
    vit = encoder.vit
    if vit.pos_embed is not None:
        rows = 0 if vit.no_embed_class else encoder.num_prefix
        vit.pos_embed.copy_(sincos_table(encoder.embed_dim, encoder.table_grid[0], rows))
        vit.pos_embed.requires_grad_(False)


def sincos_table(dim: int, grid: int, prefix: int = 0) -> Tensor:
    """MAE's fixed 2-D table, float64 (prefix + grid², dim), the rows of `prefix` tokens zero (util/pos_embed.py).

    The first half of the channels encodes the column, the second the row; each half is [sin | cos] with the
    frequencies 10000^(−i / (dim/4)). `dim` must be a multiple of 4.
    """
    assert dim % 4 == 0, "half the channels for columns, half for rows, each half sine and cosine"
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    place = torch.arange(grid, dtype=torch.float64)
    angle = place[:, None] * omega  # (grid, dim/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, dim/2)
    columns = axis[None, :, :].expand(grid, grid, -1)
    rows = axis[:, None, :].expand(grid, grid, -1)
    table = rearrange(torch.cat([columns, rows], dim=-1), "h w d -> (h w) d")
    return torch.cat([table.new_zeros(prefix, dim), table])
