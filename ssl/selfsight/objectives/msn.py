"""MSN: masked siamese networks (Assran et al. 2022, "Masked Siamese Networks for Label-Efficient Learning",
arXiv:2204.07141), and its variant with another cluster prior (PMSN, Assran et al. 2023, arXiv:2210.07277).

Anchor views, one with patches dropped at random and ten small "focal" crops, should be assigned to the prototypes as
the unmasked target view is by an EMA teacher, sharpened and balanced (equation 1). The mean assignment of the anchors
is pushed to maximal entropy (me-max), or to a power law over the prototypes.
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
from selfsight.objectives.base import Objective, Outcome, Photometrics, Progress, freeze_final_bias
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import NoiseSpec, ViewSpec


@dataclass
class MSNConfig(Photometrics):
    num_proto: int = 1024  # K
    output_dim: int = 256  # of z
    hidden_dim: int = 2048
    temperature: float = 0.1  # τ
    sharpen: float = 0.25  # T: targets are p^(1/T), normalised
    sinkhorn_iterations: int = 3  # on the targets; 0 leaves them as they are
    memax_weight: float = 1.0  # λ
    prior_exponent: float | None = None  # null: me-max; PMSN: the k-th prototype should get k^−exponent (0.25 there)
    momentum_teacher: float = 0.996  # rises to 1 in a straight line
    patch_drop: float = 0.15  # of the random anchor's patches

    rand_views: int = 1  # anchors of the target's size
    rand_size: int = 224  # pixels
    rand_scale: list[float] = field(default_factory=lambda: [0.3, 1.0])  # fraction of the image's area
    focal_views: int = 10  # anchors that show a small part, whole
    focal_size: int = 96
    focal_scale: list[float] = field(default_factory=lambda: [0.05, 0.3])
    saturation: float = 0.4  # of the colour jitter, stronger than BYOL's
    blur: float = 0.5  # probability, the same for every crop


class MSN(Objective):
    Config = MSNConfig
    joint = True

    def __init__(self, config: MSNConfig, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(config, encoder, collective)
        self.config = c = _checked(config)
        self.collective = collective or Collective()
        self.student = encoders.build(encoder)
        freeze_final_bias(self.student)
        self.student_head = self._head()
        self.teacher = encoders.build(encoder, drop_path=False)
        self.teacher_head = self._head()
        for student, teacher in self.teacher_pairs():
            teacher.load_state_dict(student.state_dict())
            teacher.requires_grad_(False)
        self.prototypes = nn.Parameter(nn.Linear(c.output_dim, c.num_proto, bias=False).weight.detach())  # q, (K, D)
        self.use = PrototypeUse(c.num_proto)
        self.num_patches = self.student.grid(c.rand_size) ** 2
        self.len_keep = int(self.num_patches * (1 - c.patch_drop))
        if self.len_keep < 1:
            raise UserError(f"objective.patch_drop={c.patch_drop} leaves no patch: choose a smaller one")

    def views(self) -> ViewSpec:
        c = self.config
        kinds = [
            ("random", 1 + c.rand_views, c.rand_size, c.rand_scale),
            ("focal", c.focal_views, c.focal_size, c.focal_scale),
        ]
        crops = tuple(c.crop(name, n, size, scale, blur=(c.blur,) * n) for name, n, size, scale in kinds if n)
        for crop in crops:
            self.student.grid(crop.size)
        return ViewSpec(crops, (NoiseSpec("mask", c.rand_views * self.num_patches),))

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """batch: "random" (1 + rand_views, B, 3, S, S), the first of which is the target; "focal" (n, B, 3, s, s),
        unless there are none; "mask" (B, rand_views·L), whose smallest entries say which patches an anchor keeps."""
        c = self.config
        target, anchors = batch["random"][0], batch["random"][1:]
        with torch.no_grad():
            (cls_t,) = self.teacher.features([target])
            z_t = self.teacher_head(cls_t)  # (B, D)
        noise = rearrange(batch["mask"], "b (v l) -> (v b) l", v=c.rand_views)
        keep = noise.argsort(dim=1, stable=True)[:, : self.len_keep]
        crops = [anchors, *([batch["focal"]] if "focal" in batch else [])]
        keeps = [keep, None][: len(crops)]
        features = self.student.features([rearrange(x, "v b c h w -> (v b) c h w") for x in crops], keeps=keeps)
        z = rearrange(self.student_head(torch.cat(features)), "(v b) d -> v b d", b=len(target))
        loss, metrics = self.compare(z, z_t)
        return Outcome(loss, features=cls_t, metrics=metrics)

    def compare(self, z: Tensor, z_t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (equation 1) and metrics of anchor embeddings z (V, B, D) and target embeddings z_t (B, D)."""
        c = self.config
        with torch.autocast(z.device.type, enabled=False):
            dtype = self.prototypes.dtype
            log_p = F.log_softmax(cosines(z.to(dtype), self.prototypes) / c.temperature, dim=-1)  # (V, B, K)
            with torch.no_grad():
                scores = cosines(z_t.to(dtype), self.prototypes)
                q = targets(scores, c.temperature, c.sharpen, c.sinkhorn_iterations, self.collective)
                if self.training:
                    self.use.add(q)
            match = -(q * log_p).sum(dim=-1).mean()
            with log_p.device:  # made there, not brought there
                prior = power_law(c.num_proto, c.prior_exponent).to(log_p) if c.prior_exponent is not None else None
            balance = balance_loss(log_p.exp(), prior, self.collective)
        return match + c.memax_weight * balance, {
            "match": match.detach(),
            "balance": balance.detach(),
            "teacher_entropy": torch.special.entr(q).sum(dim=-1).mean(),  # 0: one prototype each; ln K: all alike
        }

    def _head(self) -> nn.Sequential:
        c, width = self.config, self.student.embed_dim
        layers: list[nn.Module] = []
        for d in (width, c.hidden_dim):
            norm = encoders.BatchNorm(c.hidden_dim, self.collective)
            layers += [nn.Linear(d, c.hidden_dim, bias=False), norm, nn.GELU()]
        return nn.Sequential(*layers, nn.Linear(c.hidden_dim, c.output_dim))

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.student, self.teacher), (self.student_head, self.teacher_head)]

    def teacher_momentum(self, progress: Progress) -> float:
        start = self.config.momentum_teacher
        return start + (1 - start) * progress.step / progress.total_steps

    def prototype_counts(self) -> Tensor:
        return self.use.counts

    def collapse_values(self) -> dict[str, float]:
        """Of equal scores: uniform predictions cost ln K and me-max nothing; a power law lies away from them."""
        c = self.config
        ln_k, away = math.log(c.num_proto), 0.0
        if c.prior_exponent is not None:
            away = ln_k - torch.special.entr(power_law(c.num_proto, c.prior_exponent)).sum().item()
        loss = ln_k + c.memax_weight * away
        return {"loss": loss, "match": ln_k, "balance": away, "teacher_entropy": ln_k}


def cosines(z: Tensor, prototypes: Tensor) -> Tensor:
    """z (…, D), prototypes (K, D) → (…, K)."""
    return F.normalize(z, dim=-1) @ F.normalize(prototypes, dim=-1).T


def targets(scores: Tensor, temperature: float, sharpen: float, iterations: int, collective: Collective) -> Tensor:
    """Cosines (B, K) → the anchors' targets (B, K): softmax at τ, sharpened to p^(1/T), balanced over the ranks."""
    log_p = F.log_softmax(scores / (temperature * sharpen), dim=-1)
    return sinkhorn_knopp(log_p, 1.0, collective, iterations) if iterations else log_p.exp()


def balance_loss(p: Tensor, prior: Tensor | None, collective: Collective) -> Tensor:
    """Of anchor probabilities p (V, B, K), whose mean over all ranks is p̄: ln K − H(p̄) for me-max, which is never
    negative; KL(prior ‖ p̄) if there is a prior (K,). A scalar."""
    views, n, k = p.shape
    mean = collective.sum(p.sum(dim=(0, 1))) / (views * n * collective.world_size)
    if prior is None:
        return math.log(k) - torch.special.entr(mean).sum()
    return F.kl_div(mean.log(), prior, reduction="sum")


def power_law(k: int, exponent: float) -> Tensor:
    """float64 (k,): proportional to 1, 2^−exponent, 3^−exponent, …, of sum 1."""
    weights = torch.arange(1, k + 1, dtype=torch.float64) ** -exponent
    return weights / weights.sum()


def _checked(c: MSNConfig) -> MSNConfig:
    for name in ("num_proto", "output_dim", "hidden_dim", "rand_views"):
        check_range(f"objective.{name}", getattr(c, name), 1)
    for name in ("sinkhorn_iterations", "memax_weight", "focal_views"):
        check_range(f"objective.{name}", getattr(c, name), 0)
    for name in ("momentum_teacher", "patch_drop"):
        check_range(f"objective.{name}", getattr(c, name), 0, 1)
    if c.prior_exponent is not None:
        check_range("objective.prior_exponent", c.prior_exponent, 0)
    for name in ("temperature", "sharpen"):
        if not 0 < getattr(c, name) < math.inf:
            raise UserError(f"objective.{name} should be above 0")
    for name in ("rand_scale", "focal_scale"):
        if len(getattr(c, name)) != 2:
            raise UserError(f"objective.{name} should be two numbers: from, to")
    return c
