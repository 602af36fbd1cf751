"""VICReg: variance-invariance-covariance regularisation (Bardes, Ponce, LeCun 2022, "VICReg: Variance-Invariance-
Covariance Regularization for Self-Supervised Learning").

The embeddings of an image's two crops should agree, each of their dimensions should vary over the batch, and no two
dimensions should say the same. Variances and covariances are those of the joined batch of all ranks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight import encoders
from selfsight.collective import Collective
from selfsight.errors import check_range
from selfsight.objectives.base import Objective, Outcome, PairConfig, Progress, freeze_final_bias, pair_features
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import ViewSpec

GAMMA = 1.0  # the standard deviation that every dimension should reach (equation 1)
EPSILON = 1e-4  # under the square root of equation 2


@dataclass
class VICRegConfig(PairConfig):
    expander_layers: int = 3
    hidden_dim: int = 8192
    out_dim: int = 8192
    invariance_weight: float = 25.0  # λ, of s(Z, Z')
    variance_weight: float = 25.0  # μ, of v(Z) + v(Z'); the official code takes their mean: there, half as much
    covariance_weight: float = 1.0  # ν, of c(Z) + c(Z')


class VICReg(Objective):
    Config = VICRegConfig
    joint = True

    def __init__(self, config: VICRegConfig, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(config, encoder, collective)
        self.config, self.collective = config, collective or Collective()
        for key in ("expander_layers", "hidden_dim", "out_dim"):
            check_range(f"objective.{key}", getattr(config, key), 1)
        for key in ("invariance_weight", "variance_weight", "covariance_weight"):
            check_range(f"objective.{key}", getattr(config, key), 0)
        self.student = encoders.build(encoder)
        freeze_final_bias(self.student)
        hidden = [config.hidden_dim] * (config.expander_layers - 1)
        widths = [self.student.embed_dim, *hidden, config.out_dim]
        # The loss does not see a shift of all embeddings.
        self.expander = encoders.MLP(widths, self.collective, last_bias=False)

    def views(self) -> ViewSpec:
        self.student.grid(self.config.crop_size)  # refuses a size that the patch does not divide
        return self.config.views()

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """batch: "pair" (2, B, 3, S, S)."""
        y = pair_features(self.student, batch["pair"])
        z_a, z_b = (self.expander(y_i) for y_i in y)  # each crop with its own batch statistics
        terms = vicreg_terms(z_a, z_b, self.collective)
        c = self.config
        loss = (
            c.invariance_weight * terms.invariance
            + c.variance_weight * terms.variance
            + c.covariance_weight * terms.covariance
        )
        return Outcome(loss, features=y[0].detach(), metrics={k: v.detach() for k, v in terms._asdict().items()})

    def collapse_values(self) -> dict[str, float]:
        variance = 2 * (GAMMA - EPSILON**0.5)
        return {"loss": self.config.variance_weight * variance, "variance": variance}  # the two other terms are 0


class Terms(NamedTuple):
    """The three scalars of equation 6, not yet weighted."""

    invariance: Tensor  # s(Z, Z'), the mean squared difference, as algorithm 1 has it
    variance: Tensor  # v(Z) + v(Z')
    covariance: Tensor  # c(Z) + c(Z')


def vicreg_terms(z_a: Tensor, z_b: Tensor, collective: Collective | None = None) -> Terms:
    """Equations 1 to 5 of the embeddings z_a and z_b (B, D), row i of both from image i, over the joined batch."""
    collective = collective or Collective()
    with torch.autocast(z_a.device.type, enabled=False):
        z_a, z_b = (collective.gather(z.to(torch.promote_types(z.dtype, torch.float32))) for z in (z_a, z_b))
        return Terms(F.mse_loss(z_a, z_b), variance(z_a) + variance(z_b), covariance(z_a) + covariance(z_b))


def variance(z: Tensor) -> Tensor:
    """v(Z) of z (N, D): how far each dimension's standard deviation stays below γ, averaged (equation 1); a scalar."""
    return F.relu(GAMMA - (z.var(dim=0) + EPSILON).sqrt()).mean()


def covariance(z: Tensor) -> Tensor:
    """c(Z) of z (N, D): the squared covariances of different dimensions, summed, over D (equations 3, 4); a scalar."""
    n, d = z.shape
    z = z - z.mean(dim=0)
    c = z.T @ z / (n - 1)  # (D, D)
    return (c.square().sum() - c.diagonal().square().sum()) / d
