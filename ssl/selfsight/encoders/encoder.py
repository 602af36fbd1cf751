"""`Encoder`: a timm VisionTransformer seen as tokens. Images of any size that the patch divides go in, optionally with
the patches to keep; named tokens come out. Its state dict is timm's, name by name, under `vit.`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from selfsight.encoders.positions import resampling_matrix
from selfsight.errors import UserError

PosInterpolation = Literal["dino", "timm"]


@dataclass(frozen=True)
class Tokens:
    """What an encoder says about B images: R registers and N patches (or the n_keep kept ones) of D dimensions."""

    cls: Tensor | None  # (B, D); None if the architecture has no class token
    registers: Tensor  # (B, R, D)
    patches: Tensor  # (B, N, D), row-major, or in the order of `keep`
    grid: tuple[int, int] | None  # rows and columns of the patches; None when only some were kept

    @property
    def avg(self) -> Tensor:
        """Mean of the patch tokens, (B, D)."""
        return self.patches.mean(dim=1)

    @property
    def sequence(self) -> Tensor:
        """All tokens as timm orders them: class token, registers, patches; (B, T, D)."""
        cls = [] if self.cls is None else [self.cls.unsqueeze(1)]
        return torch.cat([*cls, self.registers, self.patches], dim=1)


class Encoder(nn.Module):
    """Owns the path from pixels to tokens around timm's blocks, so that position tables and masks are ours to say.

    `pos_interpolation` says how the position table is resampled to other sizes than its own: "dino" as the DINO code
    does, "timm" as timm does. At its own size both leave it as it is.
    """

    def __init__(self, vit: VisionTransformer, *, pos_interpolation: PosInterpolation = "timm") -> None:
        super().__init__()
        self.vit = vit
        self.pos_interpolation: PosInterpolation = pos_interpolation
        self.embed_dim: int = vit.embed_dim
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.depth = len(vit.blocks)
        self.num_prefix: int = vit.num_prefix_tokens  # class token and registers
        self.table_grid: tuple[int, int] = tuple(vit.patch_embed.grid_size)  # of the position table
        self._matrices: dict[tuple, Tensor] = {}

    def forward(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tokens:
        """images (B, 3, H, W) float, normalised; keep (B, n_keep) int64 indices of the patches that the blocks see.

        Where mask (B, N) is true, mask_token (1, D) stands for the patch's content (BEiT, iBOT, DINOv2): the blocks
        see where the patch is, not what it shows. Raises UserError if H or W is not a multiple of the patch size.
        """
        x_BTD, grid = self.prepare_tokens(images, keep, mask=mask, mask_token=mask_token)
        for block in self.vit.blocks:
            x_BTD = block(x_BTD)
        return self._split(self.vit.norm(x_BTD), grid if keep is None else None)

    def intermediate(self, images: Tensor, n: int = 1, norm: bool = True) -> list[Tokens]:
        """The tokens after each of the last `n` blocks, oldest first, through the final norm if `norm`."""
        if not 1 <= n <= self.depth:
            raise UserError(f"this encoder has {self.depth} blocks: ask for 1 to {self.depth} of them, not {n}")
        x_BTD, grid = self.prepare_tokens(images)
        found = []
        for i, block in enumerate(self.vit.blocks):
            x_BTD = block(x_BTD)
            if i >= self.depth - n:
                found.append(self._split(self.vit.norm(x_BTD) if norm else x_BTD, grid))
        return found

    def last_attention(self, images: Tensor) -> Tensor:
        """Attention probabilities of the last block, (B, heads, T, T): rows are queries."""
        x_BTD, _ = self.prepare_tokens(images)
        *before, last = self.vit.blocks
        for block in before:
            x_BTD = block(x_BTD)
        assert isinstance(last, Block)
        if type(last.attn) is not Attention:
            raise UserError("attention maps are there for plain attention only")
        qkv = rearrange(
            last.attn.qkv(last.norm1(x_BTD)), "b t (three h d) -> three b h t d", three=3, d=last.attn.head_dim
        )
        q, k = last.attn.q_norm(qkv[0]), last.attn.k_norm(qkv[1])
        return ((q * last.attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1)

    def prepare_tokens(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        """What the first block sees, (B, T, D), and the grid of the patches before any were left out."""
        vit = self.vit
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"an image of {height}×{width} pixels cannot be cut into patches of {self.patch_size}: "
                f"resize or crop it to multiples of {self.patch_size}"
            )
        x_BhwD = vit.patch_embed(images)
        grid = (x_BhwD.shape[1], x_BhwD.shape[2])
        x_BND = rearrange(x_BhwD, "b h w d -> b (h w) d")
        if mask is not None and mask_token is not None:
            x_BND = torch.where(mask.unsqueeze(-1), mask_token.to(x_BND.dtype), x_BND)
        prefix_BPD = self._prefix()
        positions = self.position_table(grid)
        if positions is not None:
            x_BND = x_BND + positions[:, -x_BND.shape[1] :]
            if not vit.no_embed_class:
                prefix_BPD = prefix_BPD + positions[:, : self.num_prefix]
        if keep is not None:
            x_BND = x_BND.gather(1, keep.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))
        x_BTD = torch.cat([prefix_BPD.expand(len(images), -1, -1), x_BND], dim=1)
        return vit.norm_pre(vit.pos_drop(x_BTD)), grid

    def position_table(self, grid: tuple[int, int]) -> Tensor | None:
        """The position table for a grid of patches, (1, P + rows·columns, D) with P = 0 if prefix tokens have none."""
        table = self.vit.pos_embed
        if table is None or grid == self.table_grid:
            return table
        patches = self.table_grid[0] * self.table_grid[1]
        prefix_1PD, table_1ND = table[:, :-patches], table[:, -patches:]
        with torch.autocast(table.device.type, enabled=False):
            return torch.cat([prefix_1PD, self._matrix(grid, table) @ table_1ND], dim=1)

    def grid(self, img_size: int) -> int:
        """Patches along the side of a square image. Raises UserError if the patch does not divide it."""
        if img_size % self.patch_size:
            raise UserError(
                f"a size of {img_size} pixels is not a multiple of the patch size {self.patch_size}: "
                f"use {max(img_size // self.patch_size, 1) * self.patch_size}"
            )
        return img_size // self.patch_size

    def _prefix(self) -> Tensor:
        vit = self.vit
        tokens: list[Tensor] = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        return torch.cat(tokens, dim=1) if tokens else vit.patch_embed.proj.weight.new_empty(1, 0, self.embed_dim)

    def _split(self, x_BTD: Tensor, grid: tuple[int, int] | None) -> Tokens:
        first = int(self.vit.has_class_token)
        return Tokens(
            cls=x_BTD[:, 0] if first else None,
            registers=x_BTD[:, first : self.num_prefix],
            patches=x_BTD[:, self.num_prefix :],
            grid=grid,
        )

    def _matrix(self, grid: tuple[int, int], table: Tensor) -> Tensor:
        # Few sizes come up in a run (global and local crops), so each matrix is made once and kept, outside the state.
        key = (self.pos_interpolation, *grid, table.device, table.dtype)
        if key not in self._matrices:
            with torch.inference_mode(False):  # a matrix first needed for inference may be needed for training later
                matrix = resampling_matrix(self.table_grid, grid, self.pos_interpolation)
                self._matrices[key] = matrix.to(device=table.device, dtype=table.dtype)
        return self._matrices[key]
