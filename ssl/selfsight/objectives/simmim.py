"""SimMIM: a simple framework for masked image modelling (Xie et al. 2022, arXiv:2111.09886).

Large squares of the image are hidden: their patches enter the encoder as one learnt mask token, at their places. One
linear layer predicts the pixels of each patch from its token; the loss is ℓ1 on the hidden pixels (equation 1).
"""

import math
from dataclasses import dataclass, field

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from selfsight import encoders
from selfsight.collective import Collective
from selfsight.errors import UserError, check_range
from selfsight.objectives.base import Objective, Outcome, Progress
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import CropSpec, NoiseSpec, ViewSpec


@dataclass
class SimMIMConfig:
    mask_patch_size: int = 32  # pixels: the side of the squares that are hidden or shown as one
    mask_ratio: float = 0.6  # of these squares
    crop_size: int = 224  # pixels; equals encoder.img_size
    crop_scale: list[float] = field(default_factory=lambda: [0.67, 1.0])  # fraction of the image's area
    flip: float = 0.5  # probability


class SimMIM(Objective):
    Config = SimMIMConfig
    encoder_inputs = ("mask_token",)

    def __init__(self, config: SimMIMConfig, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(config, encoder, collective)
        self.config = c = config
        check_range("objective.mask_ratio", c.mask_ratio, 0, 1)
        check_range("objective.mask_patch_size", c.mask_patch_size, 1)
        self.student = encoders.build(encoder)
        p = self.student.patch_size
        if len(c.crop_scale) != 2:
            raise UserError("objective.crop_scale should be two numbers: from, to")
        if c.mask_patch_size % p or c.crop_size % c.mask_patch_size:
            raise UserError(
                f"objective.mask_patch_size={c.mask_patch_size} should be a multiple of the patch size {p} "
                f"and divide objective.crop_size={c.crop_size}"
            )
        self.scale = c.mask_patch_size // p  # patches along the side of a hidden square
        self.squares = (c.crop_size // c.mask_patch_size) ** 2
        self.n_hidden = math.ceil(self.squares * c.mask_ratio)
        if self.n_hidden == 0:
            raise UserError(f"objective.mask_ratio={c.mask_ratio} hides nothing: choose a larger one")
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, 1, self.student.embed_dim), std=0.02))
        self.decoder = nn.Linear(self.student.embed_dim, p**2 * 3)

    def views(self) -> ViewSpec:
        c = self.config
        crop = CropSpec("crop", 1, c.crop_size, (c.crop_scale[0], c.crop_scale[1]), flip=c.flip)
        return ViewSpec((crop,), (NoiseSpec("noise", self.squares),))

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """batch: "crop" (1, B, 3, S, S) and "noise" (B, squares), whose smallest entries say what is hidden."""
        images = batch["crop"][0]
        mask = hidden_patches(batch["noise"], self.n_hidden, self.scale)  # (B, N)
        tokens = self.student(images, mask=mask.bool(), mask_token=self.mask_token).patches
        loss = simmim_loss(self.decoder(tokens), patchify(images, self.student.patch_size), mask)
        return Outcome(loss, features=tokens.mean(dim=1).detach())


def hidden_patches(noise: Tensor, n_hidden: int, scale: int) -> Tensor:
    """noise (B, squares) → mask (B, N), 1 = hidden: the `n_hidden` squares of least noise, of scale² patches."""
    rank = noise.argsort(dim=1, stable=True).argsort(dim=1)
    mask = (rank < n_hidden).to(noise.dtype)
    side = math.isqrt(noise.shape[1])
    return repeat(mask, "b (h w) -> b (h i w j)", h=side, i=scale, j=scale)


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, 3, H, W) → (B, N, 3·patch²), row-major over patches; within a patch: channel, row, column."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def simmim_loss(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """‖y_M − x_M‖₁ / Ω(x_M): mean absolute error over the hidden pixels' channel values, as the encoder sees them,
    that is normalised by ImageNet's channel statistics. pred and target (B, N, 3·patch²), mask (B, N); a scalar."""
    error = (pred.to(torch.promote_types(pred.dtype, torch.float32)) - target).abs().mean(dim=-1)
    return (error * mask).sum() / mask.sum()
