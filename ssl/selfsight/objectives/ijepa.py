"""I-JEPA: an image-based joint-embedding predictive architecture (Assran et al. 2023, "Self-Supervised Learning from
Images with a Joint-Embedding Predictive Architecture", arXiv:2301.08243).

From the tokens of one context block a narrow ViT predicts, at the places of four target blocks, what an EMA encoder
makes of them when it sees the whole image. No pixels are predicted and no colours augmented.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from selfsight import encoders
from selfsight.collective import Collective
from selfsight.encoders.heads import init_linear
from selfsight.encoders.positions import fix_sincos, sincos_table
from selfsight.errors import UserError, check_range
from selfsight.objectives.base import Objective, Outcome, Progress
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import CropSpec, NoiseSpec, ViewSpec


@dataclass
class IJEPAConfig:
    num_targets: int = 4  # M blocks
    target_scale: list[float] = field(default_factory=lambda: [0.15, 0.2])  # fraction of the patches, for each block
    target_aspect: list[float] = field(default_factory=lambda: [0.75, 1.5])  # height / width
    context_scale: list[float] = field(default_factory=lambda: [0.85, 1.0])  # of a square block, less the targets
    context_keep: float = 0.25  # of all patches, what the context encoder sees of that: the paper's mean (table 6)
    pred_emb_dim: int = 384
    pred_depth: int = 6
    pred_num_heads: int = 12
    momentum_teacher: float = 0.996  # rises to 1 in a straight line
    crop_size: int = 224  # pixels; equals encoder.img_size, for whose grid the position tables are made
    crop_scale: list[float] = field(default_factory=lambda: [0.3, 1.0])  # fraction of the image's area
    flip: float = 0.0  # probability; the official recipe flips nothing


class IJEPA(Objective):
    Config = IJEPAConfig
    predictor_pos_embed: Tensor

    def __init__(self, config: IJEPAConfig, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(config, encoder, collective)
        self.config = c = _checked(config, encoder)
        self.student = encoders.build(encoder)
        self.side = self.student.grid(c.crop_size)
        self.n_context = int(self.side**2 * c.context_keep)
        if not 0 < self.n_context < self.side**2:
            raise UserError(f"objective.context_keep={c.context_keep} shows all or nothing: choose another one")
        self.n_target = _most_patches(self.side, c.target_scale, c.target_aspect)
        fix_sincos(self.student)
        self.teacher = encoders.build(encoder, drop_path=False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

        dim = c.pred_emb_dim
        self.predictor_embed = nn.Linear(self.student.embed_dim, dim)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, 1, dim), std=0.02))
        self.register_buffer("predictor_pos_embed", sincos_table(dim, self.side).float(), persistent=False)
        self.predictor_blocks = nn.ModuleList(_Block(dim, c.pred_num_heads) for _ in range(c.pred_depth))
        self.predictor_norm = nn.LayerNorm(dim, eps=1e-6)
        self.predictor_proj = nn.Linear(dim, self.student.embed_dim)
        for module in (self.predictor_embed, self.predictor_blocks, self.predictor_proj):
            module.apply(init_linear)

    def views(self) -> ViewSpec:
        c = self.config
        crop = CropSpec("crop", 1, c.crop_size, (c.crop_scale[0], c.crop_scale[1]), flip=c.flip)
        return ViewSpec((crop,), (NoiseSpec("noise", 4 * (c.num_targets + 1) + 2),))

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """batch: "crop" (1, B, 3, S, S) and "noise" (B, 4·(M + 1) + 2), from which the blocks are made."""
        images = batch["crop"][0]
        context, target, predicted = self.masks(batch["noise"])
        with torch.no_grad():
            seen = self.teacher(images)
            wide = torch.promote_types(seen.patches.dtype, torch.float32)
            s_y = F.layer_norm(seen.patches.to(wide), seen.patches.shape[-1:])  # (B, N, D)
        s_x = self.student(images, keep=context).patches
        pred = self.predict(s_x, context, target, predicted)
        loss = ijepa_loss(pred, _take(s_y, target), predicted)
        return Outcome(loss, features=seen.avg)

    def masks(self, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of the context's patches (B, n_context) and of each target's (B, M, n_target), and which of the
        latter are there to be predicted (B, M, n_target), the rest being padding. Context and targets are disjoint.

        The official code draws one size of block per batch and cuts all contexts to the length of the shortest, from
        the bottom, so that an image's masks depend on its neighbours. Here each image has its own blocks, functions of
        its noise, and every context the same length: its patches nearest to a random place, then patches outside the
        context block, and, where targets cover nearly all of the image, of the targets, which then lose them.
        """
        c, side, m = self.config, self.side, self.config.num_targets
        u = rearrange(noise[:, : 4 * (m + 1)], "b (block four) -> b block four", four=4)
        targets = blocks(u[:, :m], side, c.target_scale, c.target_aspect)  # (B, M, N)
        block = blocks(u[:, m:], side, c.context_scale, [1.0, 1.0]).squeeze(1)  # (B, N)
        covered = targets.any(dim=1)
        y, x = (noise[:, -2:, None] * side - 0.5).unbind(dim=1)  # (B, 1) each: a place, in patches
        at = torch.arange(side**2, device=noise.device)
        distance = (at // side - y).square() + (at % side - x).square()  # (B, N), below 2·side²
        order = distance + 2 * side**2 * ((~block).long() + 2 * covered.long())
        context = order.argsort(dim=1, stable=True)[:, : self.n_context]
        shown = torch.zeros_like(covered).scatter(1, context, True)
        wanted = targets & ~shown.unsqueeze(1)
        target = wanted.long().argsort(dim=-1, descending=True, stable=True)[..., : self.n_target]
        return context, target, wanted.gather(-1, target)

    def predict(self, s_x: Tensor, context: Tensor, target: Tensor, predicted: Tensor) -> Tensor:
        """Context tokens (B, n_context, D) → predictions (B, M, n_target, D), each block by itself (section 3)."""
        m = target.shape[1]
        positions = self.predictor_pos_embed.expand(len(s_x), -1, -1)
        x = self.predictor_embed(s_x)
        x = repeat(x + _take(positions, context), "b n d -> (b m) n d", m=m)
        queries = rearrange(self.mask_token.unsqueeze(1) + _take(positions, target), "b m n d -> (b m) n d")
        keys = rearrange(predicted, "b m n -> (b m) n")
        keys = torch.cat([keys.new_ones(len(keys), x.shape[1]), keys], dim=1)  # padding is not attended to
        x = torch.cat([x, queries], dim=1)
        for block in self.predictor_blocks:
            x = block(x, keys)
        x = self.predictor_proj(self.predictor_norm(x[:, -self.n_target :]))
        return rearrange(x, "(b m) n d -> b m n d", m=m)

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.student, self.teacher)]

    def teacher_momentum(self, progress: Progress) -> float:
        start = self.config.momentum_teacher
        return start + (1 - start) * progress.step / progress.total_steps

    def collapse_values(self) -> dict[str, float]:
        return {"loss": 0.0}  # what is always the same is predicted without error


class _Block(Block):
    """timm's block, with keys (B, T) that say which tokens may be attended to."""

    attn: Attention

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=nn.LayerNorm)

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:  # type: ignore[override]
        qkv = self.attn.qkv(self.norm1(x))
        q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.attn.num_heads)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[:, None, None, :])
        x = x + self.attn.proj(rearrange(attended, "b h t d -> b t (h d)"))
        return x + self.mlp(self.norm2(x))


def blocks(u: Tensor, side: int, scale: list[float], aspect: list[float]) -> Tensor:
    """Uniform numbers (B, n, 4) → rectangles (B, n, N) of a grid of side², True inside: the first number says the
    area within `scale`, the second height / width within `aspect`, the others the place, uniform over all that fit."""
    area = (side**2 * (scale[0] + u[..., 0] * (scale[1] - scale[0]))).floor()
    ratio = aspect[0] + u[..., 1] * (aspect[1] - aspect[0])
    at = torch.arange(side, device=u.device)

    def along(length: Tensor, place: Tensor) -> Tensor:
        length = length.round().clamp(1, max(side - 1, 1))  # no block spans the image, as in the official code
        start = (place * (side - length + 1)).floor().unsqueeze(-1)
        return (at >= start) & (at < start + length.unsqueeze(-1))  # (B, n, side)

    rows, columns = along((area * ratio).sqrt(), u[..., 2]), along((area / ratio).sqrt(), u[..., 3])
    return (rows.unsqueeze(-1) & columns.unsqueeze(-2)).flatten(-2)


def ijepa_loss(pred: Tensor, target: Tensor, predicted: Tensor) -> Tensor:
    """Smooth ℓ1 of pred and target (B, M, n, D) where `predicted` (B, M, n); averaged over each block, then over all
    blocks, so that a large block does not outweigh a small one and images do not depend on each other. A scalar."""
    error = F.smooth_l1_loss(pred.to(target.dtype), target, reduction="none").mean(dim=-1)
    weight = predicted.to(error.dtype)
    return ((error * weight).sum(dim=-1) / weight.sum(dim=-1).clamp(min=1)).mean()


def _take(tokens: Tensor, indices: Tensor) -> Tensor:
    """tokens (B, N, D), indices (B, …) → (B, …, D)."""
    flat = indices.flatten(1)
    return tokens.gather(1, flat.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])).unflatten(1, indices.shape[1:])


def _most_patches(side: int, scale: list[float], aspect: list[float]) -> int:
    """The largest block there can be."""
    ratios = torch.linspace(0, 1, 1001, device="cpu")  # whatever the default device is, meta say
    zeros = torch.zeros_like(ratios)
    u = torch.stack([zeros + 1, ratios, zeros, zeros], dim=-1)
    return int(blocks(u.unsqueeze(0), side, scale, aspect).sum(dim=-1).max())


def _checked(c: IJEPAConfig, encoder: EncoderConfig) -> IJEPAConfig:
    for key in ("num_targets", "pred_emb_dim", "pred_depth", "pred_num_heads"):
        check_range(f"objective.{key}", getattr(c, key), 1)
    for key in ("context_keep", "momentum_teacher"):
        check_range(f"objective.{key}", getattr(c, key), 0, 1)
    for key in ("target_scale", "target_aspect", "context_scale", "crop_scale"):
        if len(getattr(c, key)) != 2 or not 0 < getattr(c, key)[0] <= getattr(c, key)[1]:
            raise UserError(f"objective.{key} should be two numbers: 0 < from ≤ to")
    for key in ("target_scale", "context_scale"):
        check_range(f"objective.{key}", getattr(c, key)[1], 0, 1)
    if c.crop_size != encoder.img_size:
        raise UserError(
            f"objective.crop_size={c.crop_size} and encoder.img_size={encoder.img_size} differ: make them equal"
        )
    if c.pred_emb_dim % 4 or c.pred_emb_dim % c.pred_num_heads:
        raise UserError(
            f"objective.pred_emb_dim={c.pred_emb_dim} should be a multiple of 4 "
            f"and of objective.pred_num_heads={c.pred_num_heads}"
        )
    return c
