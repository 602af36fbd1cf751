"""DINO: self-distillation with no labels (Caron et al. 2021, "Emerging Properties in Self-Supervised Vision
Transformers").

The student sees every crop, the teacher (an EMA of the student) only the two global ones; on each pair of different
crops the student's distribution over K prototypes should match the teacher's, which is centred and sharpened.
Equal to facebookresearch/dino, main_dino.py, in its numbers.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from selfsight import encoders
from selfsight.collective import Collective
from selfsight.errors import UserError, check_range
from selfsight.losses import PrototypeUse
from selfsight.objectives.base import (
    Objective,
    Outcome,
    ParameterRule,
    Photometrics,
    Progress,
    Scale,
    cosine_momentum,
    multi_crop,
)
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import ViewSpec


@dataclass
class DINOConfig(Photometrics):
    out_dim: int = 65536  # K prototypes
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    head_layers: int = 3
    norm_last_layer: bool = True  # prototypes of length 1; the official code turns it off for ViT-S and ViT-Ti
    freeze_last_layer: int = 1  # epochs in which the prototypes do not move

    student_temp: float = 0.1
    warmup_teacher_temp: float = 0.04
    teacher_temp: float = 0.04
    warmup_teacher_temp_epochs: int = 0  # linear from the one to the other, a step per epoch
    center_momentum: float = 0.9
    momentum_teacher: float = 0.996  # rises to 1 along a cosine

    global_crops_size: int = 224  # pixels
    global_crops_scale: list[float] = field(default_factory=lambda: [0.4, 1.0])  # fraction of the image's area
    local_crops_number: int = 8
    local_crops_size: int = 96
    local_crops_scale: list[float] = field(default_factory=lambda: [0.05, 0.4])
    blur: list[float] = field(default_factory=lambda: [1.0, 0.1, 0.5])  # probability: first, second global, local crops
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])  # pixels
    solarize: float = 0.2  # probability, of the second global crop only


class DINO(Objective):
    Config = DINOConfig
    weight_norm: ClassVar[bool] = True  # of the prototypes
    center: Tensor
    pending_sum: Tensor
    pending_rows: Tensor

    def __init__(self, config: DINOConfig, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(config, encoder, collective)
        self.config = _checked(config)
        self.collective = collective or Collective()
        self.student = encoders.build(encoder, pos_interpolation="dino")
        cls_token = self.student.vit.cls_token
        if cls_token is None:
            raise UserError(f"dino compares class tokens and {encoder.name} has none: choose another encoder")
        nn.init.trunc_normal_(cls_token, std=0.02)  # the one place where timm's initialisation is another
        self.student_head = self._head()

        self.teacher = encoders.build(encoder, drop_path=False, pos_interpolation="dino")
        self.teacher_head = self._head()
        for student, teacher in DINO.teacher_pairs(self):
            teacher.load_state_dict(student.state_dict())
            teacher.requires_grad_(False)

        self.use = PrototypeUse(config.out_dim)
        self.register_buffer("center", torch.zeros(config.out_dim))
        self.register_buffer("pending_sum", torch.zeros(config.out_dim), persistent=False)
        self.register_buffer("pending_rows", torch.zeros(1), persistent=False)

    def _head(self, out_dim: int | None = None) -> encoders.DINOHead:
        c = self.config
        return encoders.DINOHead(
            self.student.embed_dim,
            out_dim or c.out_dim,
            hidden_dim=c.hidden_dim,
            bottleneck_dim=c.bottleneck_dim,
            nlayers=c.head_layers,
            norm_last_layer=c.norm_last_layer,
            weight_norm=self.weight_norm,
        )

    @classmethod
    def auto(cls, scale: Scale) -> dict[str, tuple[float, str]]:
        """Between the published values for small and for large runs, along the logarithm of their size."""
        steps, epochs = f"this run has {scale.total_steps:,}", scale.total_steps / scale.steps_per_epoch
        prototypes = 2 ** round(math.log2(min(max(scale.images / 16, 1024), 65536)))
        warm = _between(scale.total_steps, (2500, 0.03), (10_000, 0.04))
        final = _between(scale.total_steps, (10_000, warm), (300_000, 0.07))
        frozen = max(min(round(1250 / scale.steps_per_epoch), int(epochs / 10)), 0)
        memory = min(max(scale.total_steps / 40, 50), 250)
        rise = (int(epochs / 10), f"a tenth of {epochs:.3g} epochs") if final > warm else (0, "the temperature stays")
        return {
            "out_dim": (prototypes, f"a power of two near a sixteenth of {scale.images:,} images; 1,024 to 65,536"),
            "warmup_teacher_temp": (warm, f"0.03 for up to 2,500 steps, 0.04 from 10,000; {steps}"),
            "teacher_temp": (final, f"the first one for up to 10,000 steps, 0.07 from 300,000; {steps}"),
            "warmup_teacher_temp_epochs": rise,
            "momentum_teacher": (round(1 - 1 / memory, 4), f"averages a fortieth of the steps, 50 to 250; {steps}"),
            "freeze_last_layer": (frozen, f"epochs: about 1,250 steps, a tenth of {epochs:.3g} epochs at most"),
        }

    def views(self) -> ViewSpec:
        c = self.config
        first, second, local = c.blur
        global_crops = c.crop(
            "global",
            2,
            c.global_crops_size,
            c.global_crops_scale,
            blur=(first, second),
            blur_sigma=(c.blur_sigma[0], c.blur_sigma[1]),
            solarize=(0.0, c.solarize),
        )
        spec = multi_crop(global_crops, c, blur=local)
        for crop in spec.crops:
            self.student.grid(crop.size)  # refuses a size that the patch does not divide before any image is read
        return spec

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """batch: "global" (2, B, 3, S, S) and, unless there are no local crops, "local" (n, B, 3, s, s)."""
        crops = [batch[name] for name in ("global", "local") if name in batch]
        with torch.no_grad():
            cls_t, logits_t = self._project(self.teacher, self.teacher_head, crops[:1])
        _, logits_s = self._project(self.student, self.student_head, crops)
        loss, metrics = self.compare(logits_s, logits_t, progress)
        return Outcome(loss, features=cls_t[: len(cls_t) // 2], metrics=metrics)

    def compare(self, logits_s: Tensor, logits_t: Tensor, progress: Progress) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of student logits (V, B, K) and teacher logits (2, B, K), which join the next centre."""
        with torch.no_grad():
            log_q = F.log_softmax((logits_t - self.center) / self.teacher_temperature(progress), dim=-1)
            q = log_q.exp()  # (2, B, K)
            entropy = -(q * log_q).sum(dim=-1).mean()
            if self.training:
                self.use.add(q)
                self.pending_sum += logits_t.sum(dim=(0, 1))
                self.pending_rows += logits_t.shape[0] * logits_t.shape[1]
        loss = dino_loss(logits_s, q, self.config.student_temp)
        return loss, {
            "teacher_entropy": entropy,  # 0: one prototype takes all; ln K: all alike
            "kl": loss.detach() - entropy,  # of teacher and student: what training can still remove
        }

    def _project(self, encoder: encoders.Encoder, head: nn.Module, crops: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class tokens (V·B, D) and logits (V, B, K) of all crops: one forward of all resolutions, then of the head."""
        batch = crops[0].shape[1]
        cls = torch.cat(encoder.features([rearrange(crop, "v b c h w -> (v b) c h w") for crop in crops]))
        logits = rearrange(head(cls), "(v b) k -> v b k", b=batch)
        return cls, logits.to(torch.promote_types(logits.dtype, torch.float32))  # softmax and loss leave autocast here

    def teacher_temperature(self, progress: Progress) -> float:
        """τ_t of this epoch; the warm-up includes its end point, as numpy's linspace does."""
        c, epoch, n = self.config, progress.epoch, self.config.warmup_teacher_temp_epochs
        if epoch >= n:
            return c.teacher_temp
        return c.warmup_teacher_temp + (c.teacher_temp - c.warmup_teacher_temp) * epoch / max(n - 1, 1)

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.student, self.teacher), (self.student_head, self.teacher_head)]

    def teacher_momentum(self, progress: Progress) -> float:
        return cosine_momentum(self.config.momentum_teacher, progress)

    def parameter_rules(self) -> list[ParameterRule]:
        frozen = self.config.freeze_last_layer
        return [ParameterRule("student_head.last_layer.", lambda progress: float(progress.epoch >= frozen))]

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves the centre towards the mean teacher logits of this step's micro-batches on all ranks (equation 4)."""
        total = self.collective.all_reduce_sum(torch.cat([self.pending_sum, self.pending_rows]))
        m = self.config.center_momentum
        self.center.copy_(self.center * m + total[:-1] / total[-1] * (1 - m))
        self.discard_step()

    def discard_step(self) -> None:
        self.pending_sum.zero_()
        self.pending_rows.zero_()

    def prototype_counts(self) -> Tensor:
        return self.use.counts

    def collapse_values(self) -> dict[str, float]:
        ln_k = math.log(self.config.out_dim)
        return {
            "loss": ln_k,
            "teacher_entropy": ln_k,
        }  # the loss is that of a uniform student, whatever the teacher says


def dino_loss(logits_s: Tensor, q: Tensor, student_temp: float) -> Tensor:
    """Cross-entropy H(q_t, p_s), averaged over images and over all pairs of different crops; a scalar.

    logits_s (V, B, K) of the student, crops 0 and 1 being the teacher's; q (2, B, K) probabilities of the teacher.
    The sum over pairs is the product of the sums, less the pairs of a crop with itself: no loop over 2·V of them.
    """
    log_p = F.log_softmax(logits_s / student_temp, dim=-1)
    all_pairs = (q.sum(dim=0) * log_p.sum(dim=0)).sum()
    same_crop = (q * log_p[: len(q)]).sum()
    n_pairs = len(q) * (len(log_p) - 1)
    return (same_crop - all_pairs) / (n_pairs * q.shape[1])


def _checked(c: DINOConfig) -> DINOConfig:
    if len(c.blur) != 3:
        raise UserError("objective.blur should be three probabilities: first global, second global, local crops")
    for name in ("global_crops_scale", "local_crops_scale", "blur_sigma"):
        if len(getattr(c, name)) != 2:
            raise UserError(f"objective.{name} should be two numbers: from, to")
    for name in ("student_temp", "teacher_temp", "warmup_teacher_temp"):
        if not 0 < getattr(c, name) < math.inf:
            raise UserError(f"objective.{name} should be above 0")
    for name in ("out_dim", "hidden_dim", "bottleneck_dim", "head_layers"):
        check_range(f"objective.{name}", getattr(c, name), 1)
    for name in ("local_crops_number", "warmup_teacher_temp_epochs", "freeze_last_layer"):
        check_range(f"objective.{name}", getattr(c, name), 0)
    for name in ("center_momentum", "momentum_teacher"):
        check_range(f"objective.{name}", getattr(c, name), 0, 1)
    return c


def _between(x: float, low: tuple[float, float], high: tuple[float, float]) -> float:
    """Linear in log x between two points (x, y), constant beyond them; to three decimals."""
    share = math.log(x / low[0]) / math.log(high[0] / low[0])
    return round(low[1] + (high[1] - low[1]) * min(max(share, 0.0), 1.0), 3)
