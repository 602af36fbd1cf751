"""MAE: masked autoencoders (He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021).

The encoder sees a random quarter of an image's patches; a small decoder gets its tokens, mask tokens for the rest, and
predicts the missing patches' pixels. Reads like facebookresearch/mae, models_mae.py, and equals it in its numbers.
"""

from dataclasses import dataclass, field

import torch
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from selfsight import encoders
from selfsight.collective import Collective
from selfsight.encoders.encoder import take
from selfsight.encoders.execution import through
from selfsight.encoders.positions import fix_sincos, sincos_table
from selfsight.errors import UserError, check_range
from selfsight.objectives.base import Objective, Outcome, Progress
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import CropSpec, NoiseSpec, ViewSpec


@dataclass
class MAEConfig:
    mask_ratio: float = 0.75  # of the patches, hidden from the encoder
    norm_pix_loss: bool = True  # targets are normalised patch by patch
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    crop_size: int = 224  # pixels; equals encoder.img_size, for whose grid the position tables are made
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])  # fraction of the image's area
    flip: float = 0.5  # probability


class MAE(Objective):
    Config = MAEConfig
    decoder_pos_embed: Tensor

    def __init__(self, config: MAEConfig, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(config, encoder, collective)
        self.config = config
        for key in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads"):
            check_range(f"objective.{key}", getattr(config, key), 1)
        check_range("objective.mask_ratio", config.mask_ratio, 0, 1)
        self.student = encoders.build(encoder)
        p = self.student.patch_size
        grid = self.student.grid(config.crop_size)
        dim, prefix = config.decoder_embed_dim, self.student.num_prefix
        self.num_patches = grid**2
        self.len_keep = kept(self.num_patches, config.mask_ratio)
        self._check(encoder)

        self.decoder_embed = nn.Linear(self.student.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, prefix + grid**2, dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(dim, config.decoder_num_heads, mlp_ratio=4.0, qkv_bias=True) for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, p**2 * 3)
        self._initialise(grid)

    @torch.no_grad()
    def _initialise(self, grid: int) -> None:
        vit = self.student.vit
        fix_sincos(self.student)
        self.decoder_pos_embed.copy_(sincos_table(self.config.decoder_embed_dim, grid, self.student.num_prefix))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(vit.patch_embed.proj.weight.flatten(1))  # the convolution as the linear map that it is
        for token in (vit.cls_token, vit.reg_token, self.mask_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def views(self) -> ViewSpec:
        c = self.config
        crop = CropSpec("crop", 1, c.crop_size, (c.crop_scale[0], c.crop_scale[1]), flip=c.flip)
        return ViewSpec((crop,), (NoiseSpec("noise", self.num_patches),))

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """batch: "crop" (1, B, 3, S, S) and "noise" (B, L), whose smallest entries say which patches are kept."""
        images = batch["crop"][0]
        ids_keep, ids_hidden, ids_restore = random_masking(batch["noise"], self.len_keep)
        latent = self.student(images, keep=ids_keep)
        pred = self.forward_decoder(latent.sequence, ids_restore, ids_hidden)
        target = take(patchify(images, self.student.patch_size), ids_hidden)
        loss = mae_loss(pred, target, self.config.norm_pix_loss)
        return Outcome(loss, features=latent.avg.detach())

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor, ids: Tensor) -> Tensor:
        """latent (B, P + n_keep, D) → predicted pixels (B, n, patch²·3) of the patches `ids` (B, n)."""
        prefix = self.student.num_prefix
        x = self.decoder_embed(latent)
        mask_tokens = self.mask_token.expand(len(x), self.num_patches - self.len_keep, -1).to(x.dtype)
        patches = torch.cat([x[:, prefix:], mask_tokens], dim=1)
        patches = take(patches, ids_restore)  # unshuffle
        x = torch.cat([x[:, :prefix], patches], dim=1) + self.decoder_pos_embed
        x = through(self.decoder_blocks, x, prefix + ids, self.student.block_step(x))
        return self.decoder_pred(self.decoder_norm(x))

    def collapse_values(self) -> dict[str, float]:
        """What predicting each patch's mean scores: all of the normalised, unbiased variance."""
        n = self.student.patch_size**2 * 3
        return {"loss": (n - 1) / n} if self.config.norm_pix_loss else {}

    def _check(self, encoder: EncoderConfig) -> None:
        c = self.config
        if c.crop_size != encoder.img_size:
            raise UserError(
                f"objective.crop_size={c.crop_size} and encoder.img_size={encoder.img_size} differ: make them equal"
            )
        if not 0 < self.len_keep < self.num_patches:
            raise UserError(
                f"objective.mask_ratio={c.mask_ratio} keeps {self.len_keep} of {self.num_patches} patches: "
                "choose one that keeps some and hides some"
            )
        for key, dim in (("objective.decoder_embed_dim", c.decoder_embed_dim), ("embed_dim", self.student.embed_dim)):
            if dim % 4:
                raise UserError(f"{key}={dim} is not a multiple of 4, which sine-cosine positions need")
        if c.decoder_embed_dim % c.decoder_num_heads:
            raise UserError(
                f"objective.decoder_embed_dim={c.decoder_embed_dim} is not a multiple of "
                f"objective.decoder_num_heads={c.decoder_num_heads}"
            )
        if len(c.crop_scale) != 2:
            raise UserError("objective.crop_scale should be two numbers: from, to")


def kept(num_patches: int, mask_ratio: float) -> int:
    """How many patches the encoder sees: truncated as in the official code, so 0.9 of 100 hides 91 of them."""
    return int(num_patches * (1 - mask_ratio))


def random_masking(noise: Tensor, len_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """noise (B, L) → ids_keep (B, len_keep) by ascending noise, ids_hidden (B, L − len_keep), ids_restore (B, L)."""
    ids_shuffle = noise.argsort(dim=1, stable=True)  # stable: equal noise means the same mask on every device
    return ids_shuffle[:, :len_keep], ids_shuffle[:, len_keep:], ids_shuffle.argsort(dim=1)


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, 3, H, W) → (B, L, patch²·3); within a patch the order is row, column, channel."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def mae_loss(pred: Tensor, target: Tensor, norm_pix_loss: bool) -> Tensor:
    """Mean squared error of the hidden patches; pred and target (B, L − len_keep, patch²·3); a scalar.

    With `norm_pix_loss` each target patch is normalised by its mean and its unbiased variance.
    """
    if norm_pix_loss:
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1e-6).sqrt()
    return (pred.to(torch.promote_types(pred.dtype, torch.float32)) - target).square().mean()
