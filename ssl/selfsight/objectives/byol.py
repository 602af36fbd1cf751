"""BYOL: bootstrap your own latent (Grill et al. 2020, "Bootstrap Your Own Latent: A New Approach to Self-Supervised
Learning").

The online network (encoder f_θ, projector g_θ, predictor q_θ) of one crop predicts the target network's projection
(f_ξ, g_ξ, an EMA) of the other, and the other way round. There are no negatives: a constant output that predicts
itself scores 0, so a loss that falls is no proof of learning; the monitors look at the features.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight import encoders
from selfsight.collective import Collective
from selfsight.errors import check_range
from selfsight.objectives.base import (
    Objective,
    Outcome,
    PairConfig,
    Progress,
    cosine_momentum,
    freeze_final_bias,
    pair_features,
)
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import ViewSpec


@dataclass
class BYOLConfig(PairConfig):
    hidden_dim: int = 4096  # of projector and predictor, two layers each (section 3.3)
    out_dim: int = 256
    momentum_teacher: float = 0.996  # τ_base of the target network, rises to 1 along a cosine
    freeze_patch_embed: bool = False  # a fixed random one steadies a ViT at large batches (MoCo v3, section 4.2)


class BYOL(Objective):
    Config = BYOLConfig
    joint = True

    def __init__(self, config: BYOLConfig, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(config, encoder, collective)
        self.config, self.collective = config, collective or Collective()
        for key in ("hidden_dim", "out_dim"):
            check_range(f"objective.{key}", getattr(config, key), 1)
        check_range("objective.momentum_teacher", config.momentum_teacher, 0, 1)
        self.student = encoders.build(encoder)
        freeze_final_bias(self.student)
        self.student.vit.patch_embed.requires_grad_(not config.freeze_patch_embed)
        self.student_projector = self._mlp(self.student.embed_dim)
        self.predictor = self._mlp(config.out_dim)
        self.teacher = encoders.build(encoder, drop_path=False)
        self.teacher_projector = self._mlp(self.student.embed_dim)
        for student, teacher in self.teacher_pairs():
            teacher.load_state_dict(student.state_dict())
            teacher.requires_grad_(False)

    def _mlp(self, in_dim: int) -> encoders.MLP:
        widths = [in_dim, self.config.hidden_dim, self.config.out_dim]
        return encoders.MLP(widths, self.collective, last_bias=False)  # as in the official code

    def views(self) -> ViewSpec:
        self.student.grid(self.config.crop_size)  # refuses a size that the patch does not divide
        return self.config.views()

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """batch: "pair" (2, B, 3, S, S)."""
        y = pair_features(self.student, batch["pair"])
        q_1, q_2 = (self.predictor(self.student_projector(y_i)) for y_i in y)  # each crop with its own batch statistics
        with torch.no_grad():
            y = pair_features(self.teacher, batch["pair"])
            z_1, z_2 = (self.teacher_projector(y_i) for y_i in y)
        loss = byol_loss(q_1, z_2) + byol_loss(q_2, z_1)
        return Outcome(loss, features=y[0])

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.student, self.teacher), (self.student_projector, self.teacher_projector)]

    def teacher_momentum(self, progress: Progress) -> float:
        return cosine_momentum(self.config.momentum_teacher, progress)


def byol_loss(q: Tensor, z: Tensor) -> Tensor:
    """Equation 2: ‖q̄ − z̄‖² = 2 − 2·cos(q, z) of predictions q and target projections z (B, D), averaged; a scalar.

    z stands outside the graph (sg in the paper).
    """
    q, z = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, z.detach()))
    return 2 - 2 * (F.normalize(q, dim=1) * F.normalize(z, dim=1)).sum(dim=1).mean()
