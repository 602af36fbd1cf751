"""SimCLR: contrastive learning of two crops (Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual
Representations").

Each crop should find the other crop of its image among all crops of the batch, on every rank. The loss is NT-Xent, the
normalised temperature-scaled cross-entropy of equation 1; the projection g(·) is left behind after training.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight import encoders
from selfsight.collective import Collective
from selfsight.errors import UserError, check_range
from selfsight.objectives.base import Objective, Outcome, PairConfig, Progress, freeze_final_bias, pair_features
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import ViewSpec


@dataclass
class SimCLRConfig(PairConfig):
    projection_layers: int = 2  # of g; 3 in SimCLR v2 (Chen et al. 2020b)
    hidden_dim: int = 2048
    out_dim: int = 128
    temperature: float = 0.1  # τ
    freeze_patch_embed: bool = False  # a fixed random one steadies a ViT at large batches (MoCo v3, section 4.2)
    # Its augmentation (appendix A): a stronger jitter than BYOL's, blur half of the time, no solarisation.
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    blur: list[float] = field(default_factory=lambda: [0.5, 0.5])
    solarize: list[float] = field(default_factory=lambda: [0.0, 0.0])


class SimCLR(Objective):
    Config = SimCLRConfig
    joint = True

    def __init__(self, config: SimCLRConfig, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(config, encoder, collective)
        self.config, self.collective = config, collective or Collective()
        for key in ("projection_layers", "hidden_dim", "out_dim"):
            check_range(f"objective.{key}", getattr(config, key), 1)
        if not config.temperature > 0:
            raise UserError("objective.temperature should be above 0")
        self.student = encoders.build(encoder)
        freeze_final_bias(self.student)
        self.student.vit.patch_embed.requires_grad_(not config.freeze_patch_embed)
        hidden = [config.hidden_dim] * (config.projection_layers - 1)
        self.projector = encoders.MLP([self.student.embed_dim, *hidden, config.out_dim], self.collective, last_bn=True)

    def views(self) -> ViewSpec:
        self.student.grid(self.config.crop_size)  # refuses a size that the patch does not divide
        return self.config.views()

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """batch: "pair" (2, B, 3, S, S)."""
        h = pair_features(self.student, batch["pair"])
        z_a, z_b = self.projector(h.flatten(0, 1)).chunk(2)  # one batch of 2B: both crops share the statistics
        loss, accuracy = nt_xent(z_a, z_b, self.config.temperature, self.collective)
        return Outcome(loss, features=h[0].detach(), metrics={"accuracy": accuracy})


def nt_xent(
    z_a: Tensor, z_b: Tensor, temperature: float, collective: Collective | None = None
) -> tuple[Tensor, Tensor]:
    """NT-Xent of z_a and z_b (B, D), row i of both from image i: the loss and how often the positive wins; scalars.

    A row's candidates are the 2·B·ranks − 1 other crops; the mean is over this rank's 2·B rows. Of a constant output it
    is ln(2·B·ranks − 1).
    """
    collective = collective or Collective()
    with torch.autocast(z_a.device.type, enabled=False):
        a, b = (F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1) for z in (z_a, z_b))
        all_a, all_b = collective.gather(a), collective.gather(b)
        logits = torch.cat([a, b]) @ torch.cat([all_a, all_b]).T / temperature  # (2·B, 2·B·ranks)
    own = torch.arange(len(a), device=a.device) + collective.rank * len(a)
    in_a, in_b = own, own + len(all_a)  # where this rank's crops stand among all
    logits = logits.scatter(1, torch.cat([in_a, in_b]).unsqueeze(1), -torch.inf)  # no crop is its own negative
    positive = torch.cat([in_b, in_a])
    accuracy = (logits.detach().argmax(dim=1) == positive).float().mean()
    return F.cross_entropy(logits, positive), accuracy
