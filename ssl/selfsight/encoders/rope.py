"""Rotary positions: where each patch lies in the image, as the angles that its queries and keys are turned by.

DINOv3 (2025, §3.2) places patch centres in [-1, 1] along each axis and, in training, shifts, stretches (jitter, per
axis) and scales (rescale, both axes) all of them by one random draw per block and resolution. The angles are timm's.
"""

from typing import Any

import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3
from torch import Tensor, nn

KINDS = (RotaryEmbeddingDinoV3, RotaryEmbeddingCat)
AUGMENTATIONS = ("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords")  # as arguments of timm's Eva


class Rotations:
    """The tables of one encoder. They depend on the grid only, so each is made once, unless training draws them."""

    def __init__(self) -> None:
        self._tables: dict[tuple, Tensor] = {}

    @staticmethod
    def drawn(rope: Any) -> bool:
        """Whether the next table will be another one than the last."""
        return rope is not None and rope.training and bool(getattr(rope, "aug_active", False))

    def table(self, rope: nn.Module, grid: tuple[int, int], keep: Tensor | None = None) -> Tensor:
        """Sines, then cosines: (1, 1, N, 2·d), or (B, 1, n_keep, 2·d) of the patches in `keep` (B, n_keep)."""
        table_Nd = self._table(rope, grid)
        if keep is None:
            return table_Nd[None, None]
        return table_Nd[keep].unsqueeze(1)

    def _table(self, rope: Any, grid: tuple[int, int]) -> Tensor:
        periods = next(rope.buffers())
        if self.drawn(rope):
            return self._made(rope, grid, periods)
        key = (*grid, periods.device, periods.dtype)
        if key not in self._tables:
            with torch.inference_mode(False):  # a table first needed for inference may be needed for training later
                self._tables[key] = self._made(rope, grid, periods)
        return self._tables[key]

    @staticmethod
    def _made(rope: Any, grid: tuple[int, int], periods: Tensor) -> Tensor:
        with torch.autocast(periods.device.type, enabled=False):
            return rope.get_embed(list(grid)).to(device=periods.device, dtype=periods.dtype)

