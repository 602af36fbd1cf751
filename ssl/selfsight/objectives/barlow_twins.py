"""Barlow Twins: redundancy reduction (Zbontar et al. 2021, "Barlow Twins: Self-Supervised Learning via Redundancy
Reduction").

The correlations, over the joined batch of all ranks, of the embeddings of the first crops with those of the second
should be the identity: each dimension agrees with itself in both crops (ones) and says nothing of the others (zeros).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from selfsight import encoders
from selfsight.collective import Collective
from selfsight.errors import check_range
from selfsight.objectives.base import Objective, Outcome, PairConfig, Progress, freeze_final_bias, pair_features
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import ViewSpec


@dataclass
class BarlowTwinsConfig(PairConfig):
    projector_layers: int = 3
    hidden_dim: int = 8192
    out_dim: int = 8192
    redundancy_weight: float = 0.005  # λ


class BarlowTwins(Objective):
    Config = BarlowTwinsConfig
    joint = True

    def __init__(self, config: BarlowTwinsConfig, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(config, encoder, collective)
        self.config, self.collective = config, collective or Collective()
        for key in ("projector_layers", "hidden_dim", "out_dim"):
            check_range(f"objective.{key}", getattr(config, key), 1)
        check_range("objective.redundancy_weight", config.redundancy_weight, 0)
        self.student = encoders.build(encoder)
        freeze_final_bias(self.student)
        hidden = [config.hidden_dim] * (config.projector_layers - 1)
        widths = [self.student.embed_dim, *hidden, config.out_dim]
        # The loss does not see a shift of all embeddings.
        self.projector = encoders.MLP(widths, self.collective, last_bias=False)

    def views(self) -> ViewSpec:
        self.student.grid(self.config.crop_size)  # refuses a size that the patch does not divide
        return self.config.views()

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """batch: "pair" (2, B, 3, S, S)."""
        y = pair_features(self.student, batch["pair"])
        z_a, z_b = (self.projector(y_i) for y_i in y)  # each crop with its own batch statistics
        c = cross_correlation(z_a, z_b, self.collective)
        loss = barlow_twins_loss(c, self.config.redundancy_weight)
        return Outcome(loss, features=y[0].detach(), metrics={"correlation": c.detach().diagonal().mean()})

    def collapse_values(self) -> dict[str, float]:
        return {"loss": float(self.config.out_dim)}  # no dimension correlates with anything


def cross_correlation(z_a: Tensor, z_b: Tensor, collective: Collective | None = None) -> Tensor:
    """Equation 2: (D, D) correlations over the joined batch of the dimensions of z_a with those of z_b (B, D).

    The embeddings are standardised as batch normalisation does it, with its 1e-5 beside the variance.
    """
    collective = collective or Collective()
    with torch.autocast(z_a.device.type, enabled=False):
        a, b = (encoders.BatchNorm(z.shape[1], collective, affine=False)(z) for z in (z_a, z_b))
        return collective.sum(a.T @ b) / (len(a) * collective.world_size)


def barlow_twins_loss(c: Tensor, redundancy_weight: float) -> Tensor:
    """Equation 1 of the correlations c (D, D): Σ (1 − c_ii)² + λ · Σ_{i≠j} c_ij²; a scalar."""
    diagonal = c.diagonal()
    off_diagonal = c.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + redundancy_weight * off_diagonal
