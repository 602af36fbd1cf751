"""Blockwise masks of patches, drawn from an image's own uniform numbers, so that they follow (seed, sample, visit)
and are the same on every device and for any number of ranks (BEiT's algorithm: Bao et al. 2021, algorithm 1, as iBOT
and DINOv2 run it).
"""

import math

import torch
from einops import rearrange
from torch import Tensor

# Tries at placing a block, for which each mask has numbers. Of the masks that the official generators draw for grids of
# 8² to 37², at most one in a thousand takes more than 36; one cut short is filled a little less.
TRIES = 40
FAILURES = 10  # in a row, after which a mask stays as it is
NUMBERS = 4 * TRIES  # uniform numbers per mask: area, aspect, top and left of each try
MIN_ASPECT = 0.3


def block_masks(
    noise: Tensor, asked: Tensor, grid: tuple[int, int], *, min_area: float, max_area: float = math.inf
) -> Tensor:
    """noise (B, 4·tries) in [0, 1), asked (B,) patches → bool masks (B, rows·columns), true = masked.

    Rectangles of `min_area` to `max_area` patches and aspect 0.3 to 1/0.3 are laid at random, one upon the other, as
    long as they add something and no more than is missing. After ten failures in a row a mask is left short, which
    happens to one in ten. All masks are drawn abreast: a try is a few small operations, whatever B is.
    """
    H, W = grid
    noise = rearrange(noise.double(), "b (tries four) -> four tries b", four=4)
    low = math.log(MIN_ASPECT)
    aspect = (low - 2 * low * noise[1]).exp()
    stretch = torch.stack([aspect, 1 / aspect], dim=1)  # (tries, 2, B): of height and width, as all pairs below
    corner = torch.stack([noise[2], noise[3]], dim=1)
    size = torch.stack([noise.new_full((1,), H), noise.new_full((1,), W)])  # filled there: no copy to wait for
    line = torch.arange(max(H, W), device=noise.device)
    free = torch.ones(len(asked), H, W, dtype=torch.bool, device=noise.device)
    count = torch.zeros(len(asked), dtype=torch.int64, device=noise.device)
    failures = torch.zeros_like(count)
    for u, r, uv in zip(noise[0], stretch, corner, strict=True):
        room = (asked - count).clamp(max=max_area)
        area = min_area + (room - min_area) * u  # may be less than min_area, as in the official codes
        side = (area * r).sqrt().round()  # (2, B)
        begin = (uv * (size - side + 1)).floor()
        offset = line - begin.unsqueeze(-1)  # (2, B, S)
        rows, columns = (offset >= 0) & (offset < side.unsqueeze(-1))
        new = rows[:, :H, None] & columns[:, None, :W] & free
        added = new.sum(dim=(1, 2))
        fits = (side < size).all(dim=0) & (added > 0) & (added <= room)
        laid = fits & (room > 0) & (failures < FAILURES)
        free ^= new & laid.view(-1, 1, 1)
        count += added * laid
        failures = torch.where(laid, 0, failures + 1)
    return ~free.flatten(1)


def top_up(masks: Tensor, asked: Tensor, keys: Tensor) -> Tensor:
    """masks (B, N) of at most `asked` (B,) patches → of exactly that many: the patches of the smallest keys join.

    keys (B, N) in [0, 1). DINOv3 does so, which makes the number of masked patches of a batch the same at every step.
    """
    keys = keys.masked_fill(masks, -1.0)
    place = keys.argsort(dim=1, stable=True).argsort(dim=1)
    return place < asked.unsqueeze(1)
