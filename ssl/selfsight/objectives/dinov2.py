"""DINOv2: learning robust visual features without supervision (Oquab et al. 2023, arXiv:2304.07193, §4).

iBOT with a few changes that make it stable at scale: teacher targets by Sinkhorn–Knopp (or still by a centre), heads
of their own for class and patch tokens (or still one), KoLeo on the class tokens, masks whose ratios are spread evenly
over the batch, and learning rates that fall towards the image. Registers (Darcet et al. 2023) are the encoder's:
`encoder.args.reg_tokens`. Equal to facebookresearch/dinov2, train/ssl_meta_arch.py, in its numbers.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from selfsight.collective import Collective
from selfsight.encoders import Tokens
from selfsight.errors import UserError, check_range
from selfsight.losses import ibot_loss, koleo, sinkhorn_knopp
from selfsight.losses.ibot import Masked, masked_rows
from selfsight.losses.koleo import EPSILON
from selfsight.masks import block_masks
from selfsight.objectives.base import Outcome, Progress
from selfsight.objectives.ibot import IBOT, IBOTConfig
from selfsight.recipe import EncoderConfig

MIN_AREA = 4  # patches, of a masked block


@dataclass
class DINOv2Config(IBOTConfig):
    out_dim: int = 65536
    norm_last_layer: bool = False  # the official head never fixes the prototypes' length
    freeze_last_layer: int = 2  # this and the next in passes over ImageNet-1k, two to each of the code's own epochs
    warmup_teacher_temp_epochs: int = 60  # linear per step, unlike DINO's
    teacher_temp: float = 0.07
    momentum_teacher: float = 0.992
    global_crops_scale: list[float] = field(default_factory=lambda: [0.32, 1.0])
    local_crops_scale: list[float] = field(default_factory=lambda: [0.05, 0.32])
    centering: str = "sinkhorn_knopp"  # or centering: DINO's, here of the masked patches only
    koleo_weight: float = 0.1


class DINOv2(IBOT):
    Config = DINOv2Config
    joint = True  # KoLeo, Sinkhorn and the spread of the mask ratios
    token_std: ClassVar[float] = 1e-6  # of the class token's and the registers' initial values
    config: DINOv2Config

    def __init__(self, config: DINOv2Config, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(_checked(config), encoder, collective)
        for tokens in (self.student.vit.cls_token, self.student.vit.reg_token):
            if tokens is not None:
                nn.init.normal_(tokens, std=self.token_std)
        self.teacher.load_state_dict(self.student.state_dict())

    def masks(self, noise: Tensor) -> Tensor:
        """As iBOT's, but of all ranks' crops exactly the given share is masked, and the i-th of them, in random order,
        draws its ratio from the i-th of equal parts of `mask_ratio`. So where and in what order the blocks lie follows
        from an image's own numbers, how many there are from the whole batch's, whatever ranks it is shared out to.
        """
        grid = self.student.grid(self.config.global_crops_size)
        noise = rearrange(noise, "b (v n) -> (v b) n", v=2)
        low, high = self.ratio_bounds(noise[:, 0])
        asked = (grid**2 * (low + (high - low) * noise[:, 1].float())).int()
        return self.blocks(noise[:, 2:], asked)

    def ratio_bounds(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """order (2·B,), of this rank's crops, random → from which to which share of each is to be masked, 0 for those
        that are not: float32 (2·B,) each.
        """
        c = self.config
        everyone = self.collective.gather(order)
        place = (everyone < order.unsqueeze(1)).sum(dim=1)  # of each crop among all, from 0
        n = int(len(everyone) * c.mask_probability)
        bounds = torch.linspace(c.mask_ratio[0], c.mask_ratio[1], n + 1).to(order.device)
        low, high = bounds[place.clamp(max=n)], bounds[(place + 1).clamp(max=n)]
        return torch.where(place < n, low, 0.0), torch.where(place < n, high, 0.0)

    def blocks(self, noise: Tensor, asked: Tensor) -> Tensor:
        """Masks of about `asked` (2·B,) patches each, from noise (2·B, NUMBERS): bool (2·B, N)."""
        size, p = self.config.global_crops_size, self.student.patch_size
        max_area = 0.5 * size // p * size // p  # in the official order of operations
        return block_masks(noise, asked, (size // p, size // p), min_area=MIN_AREA, max_area=max_area)

    def distil(self, batch: dict[str, Tensor], mask: Tensor, progress: Progress) -> Outcome:
        masked = masked_rows(mask)  # how many is asked here, while a GPU has nothing else to do yet
        return self.judge(batch, *self.see(batch, mask), masked, progress)

    def judge(
        self, batch: dict[str, Tensor], t: Tokens, s: Tokens, cls_s: Tensor, masked: Masked, progress: Progress
    ) -> Outcome:
        """`distil` once the crops were seen: what `see` returns goes in."""
        assert t.cls is not None
        student_head, teacher_head = self.cls_heads()
        with torch.no_grad():
            logits_t = self.per_crop(teacher_head(t.cls), batch)
            q = self.cls_targets(logits_t, self.teacher_temperature(progress))  # (2, B, K)
            entropy = torch.special.entr(q).sum(dim=-1).mean()
            if self.training:
                self.use.add(q)
        l_local, l_global = dino_losses(self.per_crop(student_head(cls_s), batch), q, self.config.student_temp)
        first, second = cls_s[: len(t.cls)].chunk(2)  # of the global crops, before the head; each crop by itself
        terms = {
            "dino_local": l_local,
            "dino_global": l_global,
            "ibot": self.ibot(t, s, masked, progress),
            "koleo": self.koleo(first) + self.koleo(second),
            **self.further_terms(batch, s, progress),
        }
        weights = self.weights()
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        metrics = {name: term.detach() for name, term in terms.items()}
        kl = (l_local + l_global).detach() - entropy
        return Outcome(loss, t.cls[: len(t.cls) // 2], {**metrics, "teacher_entropy": entropy, "kl": kl})

    def weights(self) -> dict[str, float]:
        """Of each term in the loss."""
        c = self.config
        dino = {"dino_local": c.dino_weight, "dino_global": c.dino_weight}
        return {**dino, "ibot": c.ibot_weight, "koleo": c.koleo_weight}

    def ibot(self, t: Tokens, s: Tokens, masked: Masked, progress: Progress) -> Tensor:
        """L_iBOT of the masked patches, a scalar."""
        at, weight = masked
        student_head, teacher_head = self.patch_heads()
        with torch.no_grad():
            logits_t = teacher_head(t.patches.flatten(0, 1)[at])
            q = self.patch_targets(logits_t, self.teacher_temperature(progress))  # (M, K)
        logits_s = student_head(s.patches.flatten(0, 1)[at])
        return ibot_loss(logits_s, q, weight, len(t.patches), self.config.student_temp)

    def koleo(self, cls: Tensor) -> Tensor:
        """L_KoLeo of class tokens (B, D), a scalar."""
        return koleo(cls, self.collective)

    def further_terms(self, batch: dict[str, Tensor], s: Tokens, progress: Progress) -> dict[str, Tensor]:
        """What a method that builds on this one adds, by names that have a weight; s: the student's global crops."""
        return {}

    def cls_targets(self, logits: Tensor, temp: float) -> Tensor:
        """Teacher logits (2, B, K) → probabilities; both crops of all ranks are one batch to Sinkhorn."""
        if self.config.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(logits.flatten(0, 1), temp, self.collective).view_as(logits)
        if self.training:
            self.pending_sum += logits.sum(dim=(0, 1))
            self.pending_rows += logits.shape[0] * logits.shape[1]
        return ((logits - self.center) / temp).softmax(dim=-1)

    def patch_targets(self, logits: Tensor, temp: float) -> Tensor:
        """Teacher logits (M, K) of the masked patches → probabilities."""
        if self.config.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(logits, temp, self.collective)
        if self.training:
            self.patch_center.add(logits)
        return self.center_softmax(logits, self.patch_center, temp)

    def teacher_temperature(self, progress: Progress) -> float:
        """τ_t of this step; the warm-up includes its end point, as numpy's linspace does."""
        c, n = self.config, self.config.warmup_teacher_temp_epochs * progress.steps_per_epoch
        if progress.step >= n:
            return c.teacher_temp
        return c.warmup_teacher_temp + (c.teacher_temp - c.warmup_teacher_temp) * progress.step / max(n - 1, 1)

    def after_step(self) -> None:
        if self.config.centering == "centering":
            super().after_step()

    def collapse_values(self) -> dict[str, float]:
        """A uniform student, whatever the targets; and neighbours at no distance but KoLeo's epsilon.

        That holds while the share of crops to mask is a whole number of crops, and none of their masks falls empty.
        """
        c = self.config
        ln_k, ln_k_patch = math.log(c.out_dim), math.log(c.patch_out_dim or c.out_dim)
        ln_d = math.log((math.sqrt(self.student.embed_dim) + 1) * EPSILON)
        local = c.local_crops_number / (c.local_crops_number + 1)  # share of the pairs
        terms = {
            "dino_local": local * ln_k,
            "dino_global": (1 - local) * ln_k,
            "ibot": c.mask_probability * ln_k_patch,
            "koleo": -2 * ln_d,
        }
        weights = self.weights()
        loss = sum(weights[name] * value for name, value in terms.items())
        return {"loss": loss, **terms, "teacher_entropy": ln_k}


def dino_losses(logits_s: Tensor, q: Tensor, student_temp: float) -> tuple[Tensor, Tensor]:
    """DINO's loss in two parts, of the local crops and of the global ones: scalars, whose sum is the mean over
    the 2·V − 2 pairs of different crops. Student logits (V, B, K), crops 0 and 1 being the teacher's; q (2, B, K).
    """
    n_pairs = 2 * len(logits_s) - 2
    local = pair_cross_entropy(logits_s[2:], q, student_temp)
    swapped = pair_cross_entropy(logits_s[:2].flatten(0, 1)[None], q.flip(0).flatten(0, 1)[None], student_temp)
    return local / n_pairs, 2 * swapped / n_pairs


def pair_cross_entropy(logits_s: Tensor, q: Tensor, student_temp: float) -> Tensor:
    """Σ over all (student crop, teacher crop) of the batch mean of H(q, p_s); (V, B, K) and (T, B, K) → a scalar."""
    log_p = F.log_softmax(logits_s / student_temp, dim=-1)
    return -(q.sum(dim=0) * log_p.sum(dim=0)).sum(dim=-1).mean()


def _checked(c: DINOv2Config) -> DINOv2Config:
    if c.centering not in ("sinkhorn_knopp", "centering"):
        raise UserError(f"objective.centering is {c.centering!r}: choose sinkhorn_knopp or centering")
    check_range("objective.koleo_weight", c.koleo_weight, 0)
    return c
