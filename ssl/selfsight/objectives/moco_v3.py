"""MoCo v3: momentum contrast for Vision Transformers (Chen, Xie, He 2021, "An Empirical Study of Training
Self-Supervised Vision Transformers").

A query (encoder, projector, predictor) of one crop should find the key (an EMA of encoder and projector) of the other
crop among the keys of all images, on every rank, and the other way round (algorithm 1, equation 1). The patch
projection stays as it was drawn, which steadies the training (section 4.2), and positions are sine and cosine.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight import encoders
from selfsight.collective import Collective
from selfsight.encoders.positions import fix_sincos
from selfsight.errors import UserError, check_range
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
class MoCoV3Config(PairConfig):
    projector_layers: int = 3  # of the ViT models; the predictor has 2
    hidden_dim: int = 4096
    out_dim: int = 256
    temperature: float = 0.2  # τ
    momentum_teacher: float = 0.99  # m of the key encoder, rises to 1 along a cosine
    freeze_patch_embed: bool = True


class MoCoV3(Objective):
    Config = MoCoV3Config
    joint = True

    def __init__(self, config: MoCoV3Config, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(config, encoder, collective)
        self.config, self.collective = config, collective or Collective()
        for key in ("projector_layers", "hidden_dim", "out_dim"):
            check_range(f"objective.{key}", getattr(config, key), 1)
        check_range("objective.momentum_teacher", config.momentum_teacher, 0, 1)
        if not config.temperature > 0:
            raise UserError("objective.temperature should be above 0")
        self.student = encoders.build(encoder)
        freeze_final_bias(self.student)
        self._initialise(self.student)
        self.student.vit.patch_embed.requires_grad_(not config.freeze_patch_embed)
        self.student_projector = self._projector()
        self.predictor = encoders.MLP(
            [config.out_dim, config.hidden_dim, config.out_dim], self.collective, last_bn=True
        )
        self.teacher = encoders.build(encoder, drop_path=False)
        self.teacher_projector = self._projector()
        for student, teacher in self.teacher_pairs():
            teacher.load_state_dict(student.state_dict())
            teacher.requires_grad_(False)

    def _projector(self) -> encoders.MLP:
        hidden = [self.config.hidden_dim] * (self.config.projector_layers - 1)
        return encoders.MLP([self.student.embed_dim, *hidden, self.config.out_dim], self.collective, last_bn=True)

    @staticmethod
    @torch.no_grad()
    def _initialise(encoder: encoders.Encoder) -> None:
        """Xavier's throughout, for queries, keys and values each by themselves, and for the patches as a linear map."""
        vit = encoder.vit
        for name, module in vit.named_modules():
            if isinstance(module, nn.Linear):
                for part in module.weight.chunk(3 if "qkv" in name else 1):
                    nn.init.xavier_uniform_(part)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(vit.patch_embed.proj.weight.flatten(1))
        if vit.patch_embed.proj.bias is not None:
            nn.init.zeros_(vit.patch_embed.proj.bias)
        if vit.pos_embed is not None:
            if encoder.embed_dim % 4:
                raise UserError(
                    f"embed_dim={encoder.embed_dim} is not a multiple of 4, which sine-cosine positions need"
                )
            fix_sincos(encoder)

    def views(self) -> ViewSpec:
        self.student.grid(self.config.crop_size)  # refuses a size that the patch does not divide
        return self.config.views()

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """batch: "pair" (2, B, 3, S, S)."""
        y = pair_features(self.student, batch["pair"])
        q_1, q_2 = (self.predictor(self.student_projector(y_i)) for y_i in y)  # each crop with its own batch statistics
        with torch.no_grad():
            y = pair_features(self.teacher, batch["pair"])
            k_1, k_2 = (self.teacher_projector(y_i) for y_i in y)
        tau = self.config.temperature
        l_12, accuracy = contrastive_loss(q_1, k_2, tau, self.collective)
        l_21, _ = contrastive_loss(q_2, k_1, tau, self.collective)
        return Outcome(l_12 + l_21, features=y[0], metrics={"accuracy": accuracy})

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.student, self.teacher), (self.student_projector, self.teacher_projector)]

    def teacher_momentum(self, progress: Progress) -> float:
        return cosine_momentum(self.config.momentum_teacher, progress)


def contrastive_loss(
    q: Tensor, k: Tensor, temperature: float, collective: Collective | None = None
) -> tuple[Tensor, Tensor]:
    """2τ · InfoNCE of queries q and keys k (B, D), row i of both from image i; and how often it finds its key: scalars.

    A query's candidates are the B·ranks keys; the mean is over this rank's queries. Of a constant output it is
    2τ · ln(B·ranks).
    """
    collective = collective or Collective()
    with torch.autocast(q.device.type, enabled=False):
        q, k = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1) for x in (q, k))
        logits = q @ collective.gather(k).T / temperature  # (B, B·ranks)
    positive = torch.arange(len(q), device=q.device) + collective.rank * len(q)
    accuracy = (logits.detach().argmax(dim=1) == positive).float().mean()
    return 2 * temperature * F.cross_entropy(logits, positive), accuracy
