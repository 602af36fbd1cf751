"""`Encoder`: a timm Vision Transformer seen as tokens. Images of any size that the patch divides go in, optionally with
the patches to keep; named tokens come out. Its state dict is timm's, name by name, under `vit.`.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfsight.encoders.attention import Asked, Group, Layout, asked, has_heads, heads, layout, pack, unpack
from selfsight.encoders.blocks import draw, is_residual
from selfsight.encoders.execution import Checkpointing, Step, make_step
from selfsight.encoders.positions import resampling_matrix
from selfsight.encoders.rope import Rotations
from selfsight.errors import UserError

PosInterpolation = Literal["dino", "timm"]


class Tokens(NamedTuple):  # a tuple, in which DeepSpeed finds the tensors that ZeRO-3's backward pass begins at
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
    does, "timm" as timm does. At its own size both leave it as it is. `checkpointing` and `compile` (None: on a GPU)
    say how the blocks are run, and change neither numbers, beyond rounding, nor names.
    """

    def __init__(
        self,
        vit: VisionTransformer | Eva,
        *,
        pos_interpolation: PosInterpolation = "timm",
        checkpointing: Checkpointing = "none",
        compile: bool | None = False,
    ) -> None:
        super().__init__()
        self.vit: Any = vit
        self.pos_interpolation: PosInterpolation = pos_interpolation
        self.checkpointing: Checkpointing = checkpointing
        self.compile_blocks = compile
        self.embed_dim: int = vit.embed_dim
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        self.depth = len(vit.blocks)
        self.num_prefix: int = self.vit.num_prefix_tokens  # class token and registers
        self.table_grid: tuple[int, int] = tuple(self.vit.patch_embed.grid_size)  # of the position table
        self._matrices: dict[tuple, Tensor] = {}
        self._rotations = Rotations()
        self._steps: dict[bool, Step] = {}

    @property
    def has_class_token(self) -> bool:
        return self.vit.cls_token is not None

    @property
    def rope(self) -> nn.Module | None:
        return getattr(self.vit, "rope", None)

    def forward(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        prefix_norm: nn.Module | None = None,
        prefix_only: bool = False,
    ) -> Tokens:
        """images (B, 3, H, W) float, normalised; keep (B, n_keep) int64 indices of the patches that the blocks see.

        Where mask (B, N) is true, mask_token (1, D) stands for the patch's content (BEiT, iBOT, DINOv2): the blocks
        see where the patch is, not what it shows. `prefix_norm` is the last norm of the class token and the registers,
        if it is another than that of the patches (DINOv3's untied norms). With `prefix_only` the patches are not wanted
        (they come back as none): the last block attends to them and does nothing else with them, unless stochastic
        depth runs it on a subset. Raises UserError if H or W is not a multiple of the patch size.
        """
        return self.forward_list(
            [images],
            keeps=[keep],
            masks=[mask],
            mask_token=mask_token,
            prefix_norms=[prefix_norm],
            prefix_only=[prefix_only],
        )[0]

    def forward_list(
        self,
        images: Sequence[Tensor],
        *,
        keeps: Sequence[Tensor | None] | None = None,
        masks: Sequence[Tensor | None] | None = None,
        mask_token: Tensor | None = None,
        prefix_norms: Sequence[nn.Module | None] | None = None,
        prefix_only: Sequence[bool] | None = None,
    ) -> list[Tokens]:
        """`forward` on batches of several sizes, packed into one pass without padding: Tokens for each of them.

        `keeps`, `masks`, `prefix_norms` and `prefix_only` have one entry for each batch, or are None: nothing for all.
        """
        none = [None] * len(images)
        keeps, masks, prefix_only = keeps or none, masks or none, prefix_only or [False] * len(images)
        batches, grids = [], []
        for batch, keep, mask in zip(images, keeps, masks, strict=True):
            x_BTD, grid = self.prepare_tokens(batch, keep, mask=mask, mask_token=mask_token)
            batches.append(x_BTD)
            grids.append(grid)
        wanted = [self.num_prefix if only else None for only in prefix_only]
        (last,) = deque(self._layers(batches, grids, keeps, wanted=wanted), maxlen=1)
        whole = [keep is None and n is None for keep, n in zip(keeps, wanted, strict=True)]
        return [
            self._split(self._norm(x_BTD, prefix_norm), grid if has_grid else None)
            for x_BTD, grid, has_grid, prefix_norm in zip(last, grids, whole, prefix_norms or none, strict=True)
        ]

    def features(self, images: Sequence[Tensor], *, keeps: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """A vector for each image of batches of several sizes, (B, D): its class token, or the mean of its patches
        where there is none. As `forward_list`, without what is not asked for."""
        tokens = self.forward_list(images, keeps=keeps, prefix_only=[self.has_class_token] * len(images))
        return [t.avg if t.cls is None else t.cls for t in tokens]

    def intermediate(self, images: Tensor, n: int = 1, norm: bool = True) -> list[Tokens]:
        """The tokens after each of the last `n` blocks, oldest first, through the final norm if `norm`."""
        if not 1 <= n <= self.depth:
            raise UserError(f"this encoder has {self.depth} blocks: ask for 1 to {self.depth} of them, not {n}")
        x_BTD, grid = self.prepare_tokens(images)
        layers = deque(self._layers([x_BTD], [grid]), maxlen=n)
        return [self._split(self._norm(x_BTD) if norm else x_BTD, grid) for (x_BTD,) in layers]

    @property
    def has_attention_maps(self) -> bool:
        """Whether `last_attention` knows how the last block computes its attention."""
        return is_residual(self.vit.blocks[-1]) and has_heads(self.vit.blocks[-1].attn)

    def last_attention(self, images: Tensor) -> Tensor:
        """Attention probabilities of the last block, (B, heads, T, T): rows are queries."""
        if not self.has_attention_maps:
            raise UserError("attention maps are there for plain attention only")
        last = self.vit.blocks[-1]
        x_BTD, grid = self.prepare_tokens(images)
        for (after_BTD,) in self._layers([x_BTD], [grid], blocks=self.depth - 1):
            x_BTD = after_BTD
        groups = self._layout([x_BTD], [grid], [None]).groups
        (q,), (k,), _ = heads(last.attn, last.norm1(pack([x_BTD])), groups)
        return ((q * last.attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1)

    def _layers(
        self,
        batches: list[Tensor],
        grids: list[tuple[int, int]],
        keeps: Sequence[Tensor | None] | None = None,
        blocks: int | None = None,
        wanted: Sequence[int | None] | None = None,
    ) -> Iterator[list[Tensor]]:
        """The batches after each of the first `blocks` blocks (None: all). `wanted`: how many first tokens of each are
        of interest after the last of all (None: every one)."""
        keeps = keeps or [None] * len(batches)
        where = self._layout(batches, grids, keeps)
        x_SD = pack(batches)
        step = self.block_step(x_SD)
        for block in self.vit.blocks[:blocks]:
            if self._rotations.drawn(self.rope):  # anew for every block, as DINOv3 does
                where = self._layout(batches, grids, keeps)
            of_interest: Asked | None = None
            if block is self.vit.blocks[-1] and wanted is not None and any(n is not None for n in wanted):
                of_interest = asked(where.groups, wanted, x_SD)
            x_SD = step(block, x_SD, where, draw(block, where.groups, x_SD), of_interest)
            yield unpack(x_SD, (where if of_interest is None else of_interest.layout).groups)

    def _layout(self, batches: list[Tensor], grids: list[tuple[int, int]], keeps: Sequence[Tensor | None]) -> Layout:
        rope = self.rope
        groups = [
            Group(x.shape[0], x.shape[1], None if rope is None else self._rotations.table(rope, grid, keep))
            for x, grid, keep in zip(batches, grids, keeps, strict=True)
        ]
        return layout(groups, batches[0])

    def block_step(self, x: Tensor) -> Step:
        """How a block is run on `x`: also for the blocks that a method puts behind its encoder."""
        # In evaluation mode come single images and odd sizes, for which compiling does not pay.
        compiled = self.training and (x.is_cuda if self.compile_blocks is None else self.compile_blocks)
        if compiled not in self._steps:
            self._steps[compiled] = make_step(self.checkpointing, compiled=compiled)
        return self._steps[compiled]

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
        grid = (height // self.patch_size, width // self.patch_size)
        x_BND = self._embed(images, keep)
        if mask is not None and mask_token is not None:
            mask = mask if keep is None else mask.gather(1, keep)
            x_BND = torch.where(mask.unsqueeze(-1), mask_token.to(x_BND.dtype), x_BND)
        prefix_BPD = self._prefix()
        positions = self.position_table(grid)
        if positions is not None:
            positions_1ND = positions[:, -grid[0] * grid[1] :]
            x_BND = x_BND + (positions_1ND if keep is None else take(positions_1ND.expand(len(keep), -1, -1), keep))
            if not vit.no_embed_class:
                prefix_BPD = prefix_BPD + positions[:, : self.num_prefix]
        x_BTD = torch.cat([prefix_BPD.expand(len(images), -1, -1), x_BND], dim=1)
        return vit.norm_pre(vit.pos_drop(x_BTD)), grid

    def _embed(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """What the patches, or those to keep, show: (B, N, D). The convolution sees each patch by itself, so those that
        nobody keeps need not be in it."""
        embed = self.vit.patch_embed
        if keep is None:
            return rearrange(embed(images), "b h w d -> b (h w) d")
        pixels = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch_size, q=self.patch_size)
        column = rearrange(take(pixels, keep), "b n (c p q) -> b c (n p) q", p=self.patch_size, q=self.patch_size)
        return embed.norm(rearrange(embed.proj(column), "b d n 1 -> b n d"))

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

    def _norm(self, x_BTD: Tensor, prefix_norm: nn.Module | None = None) -> Tensor:
        if prefix_norm is None:
            return self.vit.norm(x_BTD)
        prefix_BPD, patches_BND = x_BTD[:, : self.num_prefix], x_BTD[:, self.num_prefix :]
        return torch.cat([prefix_norm(prefix_BPD), self.vit.norm(patches_BND)], dim=1)

    def _split(self, x_BTD: Tensor, grid: tuple[int, int] | None) -> Tokens:
        first = int(self.has_class_token)
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


def take(tokens: Tensor, ids: Tensor) -> Tensor:
    """tokens (B, N, D), ids (B, n) → (B, n, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
