"""data2vec 2.0 for images (Baevski et al. 2022, "Efficient Self-supervised Learning with Contextualized Target
Representations for Vision, Speech and Language", arXiv:2212.07525).

An EMA teacher sees the whole image once; its contextual targets (the mean of its top K blocks) serve M masked versions
of the image. The student encodes only the patches that each version shows, in blocks (inverse masking, section 3.3);
a small convolutional decoder fills in the rest, and a squared error on the hidden patches is the loss.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from selfsight import encoders
from selfsight.collective import Collective
from selfsight.encoders.positions import fix_sincos
from selfsight.errors import UserError, check_range
from selfsight.objectives.base import Objective, Outcome, Progress
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import CropSpec, NoiseSpec, ViewSpec


@dataclass
class Data2Vec2Config:
    clone_batch: int = 16  # M masked versions of each image
    average_top_k_layers: int = 10  # K
    mask_prob: float = 0.8  # R: hidden share of the patches
    mask_prob_adjust: float = 0.07  # A: further share of shown blocks, since they overlap
    mask_length: int = 3  # B: patches along the side of a shown block
    decoder_dim: int = 768
    decoder_groups: int = 16
    decoder_kernel: int = 3
    decoder_layers: int = 6
    cls_weight: float = 2.56  # the official 0.01 is summed over a GPU's 16·M versions: so much for their mean
    ema_decay: float = 0.9998  # τ at the first step
    ema_end_decay: float = 0.99999
    ema_anneal_end_step: int = 100000  # from the one to the other in a straight line
    crop_size: int = 224  # pixels; equals encoder.img_size, for whose grid the position table is made
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])  # fraction of the image's area
    flip: float = 0.5  # probability


class Data2Vec2(Objective):
    Config = Data2Vec2Config

    def __init__(self, config: Data2Vec2Config, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(config, encoder, collective)
        self.config = c = config
        self.student = encoders.build(encoder)
        self._check(encoder)
        self.side = self.student.grid(c.crop_size)
        self.len_keep = int(self.side**2 * (1 - c.mask_prob))
        self.n_blocks = int(self.side**2 * (1 - c.mask_prob + c.mask_prob_adjust) / c.mask_length**2)
        if not 0 < self.len_keep < self.side**2:
            raise UserError(f"objective.mask_prob={c.mask_prob} hides all or nothing: choose another one")
        fix_sincos(self.student)
        self.teacher = encoders.build(encoder, drop_path=False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        widths = [self.student.embed_dim, *[c.decoder_dim] * c.decoder_layers]
        self.decoder = nn.ModuleList(
            _Convolution(a, b, c.decoder_kernel, c.decoder_groups) for a, b in pairwise(widths)
        )
        self.decoder_proj = nn.Linear(widths[-1], self.student.embed_dim)

    def views(self) -> ViewSpec:
        c = self.config
        crop = CropSpec("crop", 1, c.crop_size, (c.crop_scale[0], c.crop_scale[1]), flip=c.flip)
        return ViewSpec((crop,), (NoiseSpec("noise", c.clone_batch * (self.n_blocks + self.side**2)),))

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """batch: "crop" (1, B, 3, S, S) and "noise" (B, M·(blocks + N)), from which each version's mask is made."""
        c, images = self.config, batch["crop"][0]
        noise = rearrange(batch["noise"], "b (m n) -> (b m) n", m=c.clone_batch)
        keep = shown_patches(noise, self.side, self.n_blocks, c.mask_length, self.len_keep)  # (B·M, n_keep)
        with torch.no_grad():
            seen, outputs = self._teach(images)
            y = d2v_targets(outputs)  # (B, N, D)
        latent = self._encode(images, keep)
        hidden = torch.ones(len(keep), self.side**2, device=keep.device).scatter(1, keep, 0.0)
        y_m = repeat(y, "b n d -> (b m) n d", m=c.clone_batch)
        regression = d2v_loss(self._decode(latent[:, self.student.num_prefix :], keep), y_m, hidden)
        loss, metrics = regression, {"regression": regression.detach()}
        if self.student.vit.has_class_token:
            y_cls = repeat(y.mean(dim=1), "b d -> (b m) 1 d", m=c.clone_batch)
            cls = d2v_loss(latent[:, :1], y_cls, hidden.new_ones(len(keep), 1))
            loss, metrics = loss + c.cls_weight * cls, {**metrics, "cls": cls.detach()}
        return Outcome(loss, features=seen, metrics=metrics)

    def _teach(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Mean patch tokens (B, D), and what the feed-forward part of each of the top K blocks gave for the patches,
        before it was added to the residual: (B, N, D) each."""
        outputs: list[Tensor] = []
        vit, prefix = self.teacher.vit, self.teacher.num_prefix
        x, _ = self.teacher.prepare_tokens(images)
        first = self.teacher.depth - self.config.average_top_k_layers
        for block in vit.blocks[:first]:
            x = block(x)
        for block in vit.blocks[first:]:
            x = x + block.ls1(block.attn(block.norm1(x)))  # timm's block, opened up; a teacher drops no path
            outputs.append(block.mlp(block.norm2(x)))
            x = x + block.ls2(outputs[-1])
        return vit.norm(x)[:, prefix:].mean(dim=1), [out[:, prefix:] for out in outputs]

    def _encode(self, images: Tensor, keep: Tensor) -> Tensor:
        """Tokens (B·M, P + n_keep, D) of every version."""
        return self.student(images.repeat_interleave(self.config.clone_batch, dim=0), keep=keep).sequence

    def _decode(self, shown: Tensor, keep: Tensor) -> Tensor:
        """Tokens (B·M, n_keep, D) at the places `keep` → predictions (B·M, N, D) of all patches.

        Hidden places hold zeros; the official code lays noise of standard deviation 0.01 there.
        """
        x = shown.new_zeros(len(shown), self.side**2, shown.shape[-1])
        x = x.scatter(1, keep.unsqueeze(-1).expand(-1, -1, shown.shape[-1]), shown)
        x = rearrange(x, "b (h w) d -> b d h w", h=self.side)
        for convolution in self.decoder:
            y = convolution(x)
            x = x + y if x.shape == y.shape else y
        return self.decoder_proj(rearrange(x, "b d h w -> b (h w) d"))

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.student, self.teacher)]

    def teacher_momentum(self, progress: Progress) -> float:
        c = self.config
        done = min(progress.step / c.ema_anneal_end_step, 1.0)
        return c.ema_decay + (c.ema_end_decay - c.ema_decay) * done

    def collapse_values(self) -> dict[str, float]:
        return {"loss": 0.0}  # what is the same at every patch is normalised away: the targets are 0, and easily met

    def _check(self, encoder: EncoderConfig) -> None:
        c = self.config
        if any(type(block) is not Block for block in self.student.vit.blocks):
            raise UserError(
                f"data2vec2 looks into timm's plain blocks and {encoder.name} has others: "
                "choose vit_base_patch16_224, say"
            )
        for key in ("clone_batch", "mask_length", "decoder_dim", "decoder_groups", "decoder_layers", "decoder_kernel"):
            check_range(f"objective.{key}", getattr(c, key), 1)
        check_range("objective.ema_anneal_end_step", c.ema_anneal_end_step, 1)
        for key in ("mask_prob", "mask_prob_adjust", "ema_decay", "ema_end_decay"):
            check_range(f"objective.{key}", getattr(c, key), 0, 1)
        check_range("objective.cls_weight", c.cls_weight, 0)
        check_range("objective.average_top_k_layers", c.average_top_k_layers, 1, self.student.depth)
        if c.decoder_kernel % 2 == 0:
            raise UserError(f"objective.decoder_kernel is {c.decoder_kernel}: give an odd number")
        for width in (self.student.embed_dim, c.decoder_dim):
            if width % c.decoder_groups:
                raise UserError(f"objective.decoder_groups={c.decoder_groups} does not divide {width}")
        if c.crop_size != encoder.img_size:
            raise UserError(
                f"objective.crop_size={c.crop_size} and encoder.img_size={encoder.img_size} differ: make them equal"
            )
        if len(c.crop_scale) != 2:
            raise UserError("objective.crop_scale should be two numbers: from, to")


class _Convolution(nn.Module):
    """Grouped convolution, normalisation of each place over its channels without learnt scale, GELU: (B, D, h, w)."""

    def __init__(self, dim: int, out_dim: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel, padding=kernel // 2, groups=groups)
        self.norm = nn.LayerNorm(out_dim, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(self.conv(x), "b d h w -> b h w d")
        return rearrange(F.gelu(self.norm(x)), "b h w d -> b d h w")


def shown_patches(noise: Tensor, side: int, n_blocks: int, length: int, len_keep: int) -> Tensor:
    """noise (B, n_blocks + N) → indices (B, len_keep) of the patches that stay, in blocks of length² (section 3.3).

    The first numbers are the blocks' centres, anywhere in the grid of side²; blocks are cut at its edges. If together
    they hold more than `len_keep` patches, some of these fall away at random; if fewer, random others join them.
    """
    centre = (noise[:, :n_blocks] * side**2).long()  # (B, blocks)
    at = torch.arange(side**2, device=noise.device)
    top, left = (centre // side - length // 2).unsqueeze(-1), (centre % side - length // 2).unsqueeze(-1)
    row, column = at // side - top, at % side - left  # (B, blocks, N)
    inside = ((row >= 0) & (row < length) & (column >= 0) & (column < length)).any(dim=1)
    order = noise[:, n_blocks:] - inside.to(noise.dtype)
    return order.argsort(dim=1, stable=True)[:, :len_keep]


def d2v_targets(outputs: list[Tensor]) -> Tensor:
    """K outputs (B, N, D) → targets (B, N, D): each normalised per image and channel over its patches (instance norm),
    averaged, and the mean normalised per patch over its channels (layer norm)."""
    normed = [F.instance_norm(rearrange(_wide(out), "b n d -> b d n")) for out in outputs]
    y = rearrange(torch.stack(normed).mean(dim=0), "b d n -> b n d")
    return F.layer_norm(y, y.shape[-1:])


def d2v_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Squared error / √D, summed over the D channels and averaged over the tokens of `mask`: pred and target
    (B, N, D), mask (B, N) with 1 = counts. A scalar."""
    error = (_wide(pred) - target).square().sum(dim=-1) / math.sqrt(pred.shape[-1])
    return (error * mask).sum() / mask.sum()


def _wide(x: Tensor) -> Tensor:
    """At least float32: targets and losses leave autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
