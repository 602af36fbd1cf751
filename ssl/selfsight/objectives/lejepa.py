"""LeJEPA: joint embeddings kept Gaussian, with no teacher and no stop-gradient (Balestriero & LeCun 2025, "LeJEPA:
Provable and Scalable Self-Supervised Learning Without the Heuristics", arXiv:2511.08544).

The embedding z of every view should be the mean of its image's global views' (the prediction loss), and over the batch
z should be an isotropic Gaussian: SIGReg projects it on random directions and applies the Epps–Pulley test to each
(the paper's algorithms 1 and 2). One λ weighs the two.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from selfsight import encoders
from selfsight.collective import Collective
from selfsight.errors import UserError, check_range
from selfsight.objectives.base import Objective, Outcome, Photometrics, Progress, freeze_final_bias, multi_crop
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import ViewSpec


@dataclass
class LeJEPAConfig(Photometrics):
    lambd: float = 0.05  # λ: the weight of SIGReg; the prediction loss has 1 − λ
    num_slices: int = 1024  # random directions, new ones at every step
    t_max: float = 5.0  # the characteristic function is compared on [−t_max, t_max]
    knots: int = 17  # points of that interval, odd
    out_dim: int = 64  # of the embedding z
    hidden_dim: int = 2048
    head_layers: int = 3

    global_crops_number: int = 2  # V_g
    global_crops_size: int = 224  # pixels
    global_crops_scale: list[float] = field(default_factory=lambda: [0.3, 1.0])  # fraction of the image's area
    local_crops_number: int = 6
    local_crops_size: int = 96
    local_crops_scale: list[float] = field(default_factory=lambda: [0.05, 0.3])
    blur: float = 0.5  # probabilities, the same for every crop
    solarize: float = 0.2


class LeJEPA(Objective):
    Config = LeJEPAConfig
    joint = True

    def __init__(self, config: LeJEPAConfig, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(config, encoder, collective)
        self.config = c = _checked(config)
        self.collective = collective or Collective()
        self.student = encoders.build(encoder)
        freeze_final_bias(self.student)
        dims = [self.student.embed_dim, *[c.hidden_dim] * (c.head_layers - 1), c.out_dim]
        self.projector = encoders.MLP(dims, self.collective)

    def views(self) -> ViewSpec:
        c = self.config
        n, size = c.global_crops_number, c.global_crops_size
        more: dict[str, Any] = {"blur": (c.blur,) * n, "solarize": (c.solarize,) * n}
        global_crops = c.crop("global", n, size, c.global_crops_scale, **more)
        spec = multi_crop(global_crops, c, blur=c.blur, solarize=c.solarize)
        for crop in spec.crops:
            self.student.grid(crop.size)
        return spec

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """batch: "global" (V_g, B, 3, S, S) and, unless there are no local crops, "local" (n, B, 3, s, s)."""
        c = self.config
        crops = [batch[name] for name in ("global", "local") if name in batch]
        a = directions(c.out_dim, c.num_slices, progress.step).to(
            crops[0].device
        )  # now, while a GPU has nothing to do yet
        features = torch.cat(self.student.features([rearrange(crop, "v b c h w -> (v b) c h w") for crop in crops]))
        z = self.projector(features)
        z_VBD = rearrange(z, "(v b) d -> v b d", b=crops[0].shape[1])
        z_VBD = z_VBD.to(torch.promote_types(z.dtype, torch.float32))
        prediction = prediction_loss(z_VBD, c.global_crops_number)
        gaussian = sigreg(z_VBD, a.to(z_VBD), self.collective, t_max=c.t_max, knots=c.knots).mean()
        loss = (1 - c.lambd) * prediction + c.lambd * gaussian
        return Outcome(
            loss,
            features=features[: crops[0].shape[1]].detach(),
            metrics={"prediction": prediction.detach(), "sigreg": gaussian.detach()},
        )


def prediction_loss(z: Tensor, n_global: int) -> Tensor:
    """Mean squared distance, per dimension, of z (V, B, D) from the mean of its image's first `n_global` views."""
    return (z - z[:n_global].mean(dim=0)).square().mean()


def directions(dim: int, n: int, step: int) -> Tensor:
    """Columns of length 1, float32 (dim, n), on the CPU: functions of the step alone, hence equal on all ranks."""
    generator = torch.Generator().manual_seed(step)
    return torch.nn.functional.normalize(torch.randn(dim, n, generator=generator), dim=0)


def sigreg(z: Tensor, a: Tensor, collective: Collective, *, t_max: float = 5.0, knots: int = 17) -> Tensor:
    """The Epps–Pulley statistic of each view, averaged over directions: z (V, B, D), a (D, M) → (V,).

    N ∫ |φ_N(t) − e^(−t²/2)|² e^(−t²/2) dt by the trapezoid rule, where φ_N is the characteristic function of the N
    samples that the ranks have together. The integrand is even, so half of the interval is summed, twice.
    """
    t = torch.linspace(0, t_max, knots // 2 + 1, dtype=z.dtype, device=z.device)  # (T,)
    gauss = torch.exp(-0.5 * t.square())
    weights = torch.full_like(t, 2 * t_max / (knots // 2))
    weights[0] /= 2
    weights[-1] /= 2
    n = z.shape[1] * collective.world_size
    with torch.autocast(z.device.type, enabled=False):
        angle = (z @ a).unsqueeze(-1) * t  # (V, B, M, T)
        real, imaginary = collective.sum(torch.stack([angle.cos().sum(dim=1), angle.sin().sum(dim=1)])) / n
        error = (real - gauss).square() + imaginary.square()  # (V, M, T)
        return (error @ (gauss * weights)).mean(dim=-1) * n


def _checked(c: LeJEPAConfig) -> LeJEPAConfig:
    check_range("objective.lambd", c.lambd, 0, 1)
    for name in ("num_slices", "out_dim", "hidden_dim", "head_layers", "global_crops_number"):
        check_range(f"objective.{name}", getattr(c, name), 1)
    check_range("objective.local_crops_number", c.local_crops_number, 0)
    check_range("objective.knots", c.knots, 3)
    if c.knots % 2 == 0:
        raise UserError(f"objective.knots is {c.knots}: give an odd number, so that 0 is one of them")
    if not c.t_max > 0:
        raise UserError("objective.t_max should be above 0")
    for name in ("global_crops_scale", "local_crops_scale"):
        if len(getattr(c, name)) != 2:
            raise UserError(f"objective.{name} should be two numbers: from, to")
    return c
