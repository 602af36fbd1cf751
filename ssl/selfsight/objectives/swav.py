"""SwAV: swapping assignments between views (Caron et al. 2020, "Unsupervised Learning of Visual Features by
Contrasting Cluster Assignments", arXiv:2006.09882).

Each crop's embedding z is compared with K prototypes. The codes q of the two large crops, made equally frequent by
Sinkhorn–Knopp over the joined batch (section 3.1), are what every other crop of the image should predict (equation 2
and its multi-crop form, equation 6). Small batches borrow earlier embeddings from a queue.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from selfsight import encoders
from selfsight.collective import Collective
from selfsight.errors import UserError, check_range
from selfsight.losses import PrototypeUse, sinkhorn_knopp
from selfsight.objectives.base import (
    Objective,
    Outcome,
    ParameterRule,
    Photometrics,
    Progress,
    freeze_final_bias,
    multi_crop,
)
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import ViewSpec


@dataclass
class SwAVConfig(Photometrics):
    nmb_prototypes: int = 3000  # K
    out_dim: int = 128  # of z
    hidden_dim: int = 2048
    temperature: float = 0.1  # τ
    epsilon: float = 0.05  # ε: how soft the codes are
    sinkhorn_iterations: int = 3
    freeze_prototypes_niters: int = 313  # first steps in which the prototypes do not move
    queue_length: int = 0  # embeddings kept of each large crop; the paper takes 3840 for batches of 256
    queue_start_epoch: int = 15  # before it the queue fills, but is not used

    global_crops_size: int = 224  # pixels
    global_crops_scale: list[float] = field(default_factory=lambda: [0.14, 1.0])  # fraction of the image's area
    local_crops_number: int = 6
    local_crops_size: int = 96
    local_crops_scale: list[float] = field(default_factory=lambda: [0.05, 0.14])
    brightness: float = 0.8  # this and the next: SimCLR's, which are stronger
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    blur: float = 0.5  # probability, the same for every crop


class SwAV(Objective):
    Config = SwAVConfig
    joint = True
    queue: Tensor

    def __init__(self, config: SwAVConfig, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(config, encoder, collective)
        self.config = c = _checked(config)
        self.collective = collective or Collective()
        self.student = encoders.build(encoder)
        freeze_final_bias(self.student)
        self.projector = encoders.MLP([self.student.embed_dim, c.hidden_dim, c.out_dim], self.collective)
        self.prototypes = nn.Parameter(nn.Linear(c.out_dim, c.nmb_prototypes, bias=False).weight.detach())  # C, (K, D)
        self.use = PrototypeUse(c.nmb_prototypes)
        self.register_buffer("queue", torch.zeros(2, c.queue_length, c.out_dim))  # newest first, equal on all ranks
        self._pending: list[Tensor] = []  # (2, n, D): what this step's micro-batches will add to it

    def views(self) -> ViewSpec:
        c = self.config
        global_crops = c.crop("global", 2, c.global_crops_size, c.global_crops_scale, blur=(c.blur,) * 2)
        spec = multi_crop(global_crops, c, blur=c.blur)
        for crop in spec.crops:
            self.student.grid(crop.size)
        return spec

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """batch: "global" (2, B, 3, S, S) and, unless there are no local crops, "local" (n, B, 3, s, s)."""
        c = self.config
        crops = [batch[name] for name in ("global", "local") if name in batch]
        n = crops[0].shape[1]
        features = torch.cat(self.student.features([rearrange(crop, "v b c h w -> (v b) c h w") for crop in crops]))
        z = self.projector(features)
        with torch.autocast(z.device.type, enabled=False):
            # The official code sets the prototypes back to length 1 before every step. Dividing by the length here
            # says the same of the function, and needs no hand on weights of which the optimiser keeps its own copy.
            prototypes = F.normalize(self.prototypes, dim=-1)
            z_VBD = rearrange(F.normalize(z.to(prototypes.dtype), dim=-1), "(v b) d -> v b d", b=n)
            scores = z_VBD @ prototypes.T  # (V, B, K)
            with torch.no_grad():
                older = self._older(n, progress) @ prototypes.T  # (2, rows, K)
                q = codes(scores[:2], older, c.epsilon, c.sinkhorn_iterations, self.collective)
                self._remember(z_VBD[:2])
                if self.training:
                    self.use.add(q)
            loss = swapped_prediction_loss(scores, q, c.temperature)
        entropy = torch.special.entr(q).sum(dim=-1).mean()
        return Outcome(loss, features=features[:n].detach(), metrics={"code_entropy": entropy})

    def _older(self, n: int, progress: Progress) -> Tensor:
        """This rank's share of the queue, (2, rows, D): the ranks together count each entry once.

        None before the queue is full, which is arithmetic on the step, so that no value has to leave the device.
        """
        steps_to_fill = math.ceil(self.config.queue_length / (n * self.collective.world_size))
        start = max(self.config.queue_start_epoch * progress.steps_per_epoch, steps_to_fill)
        share = self.queue[:, self.collective.rank :: self.collective.world_size]
        return share if progress.step >= start else share[:, :0]

    def _remember(self, z: Tensor) -> None:
        if self.config.queue_length and self.training:
            everyone = self.collective.gather(rearrange(z, "v b d -> b v d"))
            self._pending.append(rearrange(everyone, "b v d -> v b d"))

    @torch.no_grad()
    def after_step(self) -> None:
        """The embeddings of this step enter the queue, the oldest leave it."""
        self.queue.copy_(torch.cat([*self._pending, self.queue], dim=1)[:, : self.config.queue_length])
        self.discard_step()

    def discard_step(self) -> None:
        self._pending.clear()

    def parameter_rules(self) -> list[ParameterRule]:
        frozen = self.config.freeze_prototypes_niters
        return [ParameterRule("prototypes", lambda progress: float(progress.step >= frozen))]

    def prototype_counts(self) -> Tensor:
        return self.use.counts

    def collapse_values(self) -> dict[str, float]:
        # Of equal scores: uniform predictions, whatever the codes say.
        return {"loss": math.log(self.config.nmb_prototypes)}


def codes(scores: Tensor, older: Tensor, epsilon: float, iterations: int, collective: Collective) -> Tensor:
    """q (2, B, K) of the two large crops' scores (2, B, K), each balanced by itself together with its queue's scores
    `older` (2, rows, K) (equation 3)."""
    joined = torch.cat([scores, older], dim=1)
    return torch.stack([sinkhorn_knopp(one, epsilon, collective, iterations) for one in joined])[:, : scores.shape[1]]


def swapped_prediction_loss(scores: Tensor, q: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the codes q (2, B, K) of the two large crops and the predictions softmax(scores / τ), scores
    (V, B, K), of all other crops; averaged over images and over the 2·(V − 1) pairs. A scalar."""
    log_p = F.log_softmax(scores / temperature, dim=-1)
    all_pairs = (q.sum(dim=0) * log_p.sum(dim=0)).sum()  # the sum over pairs is the product of the sums
    same_crop = (q * log_p[: len(q)]).sum()
    return (same_crop - all_pairs) / (len(q) * (len(log_p) - 1) * q.shape[1])


def _checked(c: SwAVConfig) -> SwAVConfig:
    for name in ("nmb_prototypes", "out_dim", "hidden_dim", "sinkhorn_iterations"):
        check_range(f"objective.{name}", getattr(c, name), 1)
    for name in ("freeze_prototypes_niters", "queue_length", "queue_start_epoch", "local_crops_number"):
        check_range(f"objective.{name}", getattr(c, name), 0)
    for name in ("temperature", "epsilon"):
        if not 0 < getattr(c, name) < math.inf:
            raise UserError(f"objective.{name} should be above 0")
    for name in ("global_crops_scale", "local_crops_scale"):
        if len(getattr(c, name)) != 2:
            raise UserError(f"objective.{name} should be two numbers: from, to")
    return c
