"""DINOv3 (Siméoni et al. 2025, arXiv:2508.10104, §3 and §4): DINOv2 at scale, and dense features that stay sharp.

What changes in the first phase: Sinkhorn–Knopp only, heads of their own whose prototypes are a plain linear layer, a
class-token norm of the student's own for local crops, exactly as many masked patches as asked, KoLeo within groups of
16, and schedules that end where they begin. The second phase adds Gram anchoring (L_Ref, §4.2): the cosines between the
student's patches are held to those of the gram teacher, an EMA teacher of earlier, which sees the same crops larger.
RoPE and registers are the encoder's: choose one of timm's `vit_*_dinov3`.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from selfsight import encoders
from selfsight.collective import Collective, own_part
from selfsight.encoders import Tokens
from selfsight.errors import UserError, check_range
from selfsight.losses import gram_loss, koleo
from selfsight.losses.gram import NEGATIVES
from selfsight.masks import NUMBERS, top_up
from selfsight.objectives.base import Outcome, Progress, cosine_momentum
from selfsight.objectives.dinov2 import DINOv2, DINOv2Config
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import CropSpec, NoiseSpec, ViewSpec


@dataclass
class DINOv3Config(DINOv2Config):
    shared_head: bool = False  # and no other: the heads are untied
    momentum_teacher: float = 0.994
    final_momentum_teacher: float = 0.994  # along a cosine; constant where the two are the same
    global_crops_size: int = 256  # pixels
    local_crops_size: int = 112
    local_weight: float = 1.0  # of the pairs with a local crop in L_DINO; 0.5 in the paper's second phase
    local_cls_norm: bool = True  # the student's class tokens of local crops have a final norm of their own
    koleo_topk: int = 1  # neighbours
    koleo_group: int | None = 16  # samples among which they are sought; null = the joined batch
    gram_start: int | None = None  # step from which L_Gram counts, 1 000 000 in the paper; null = never
    gram_weight: float = 2.0  # w_Gram
    gram_refresh_every: int = 10_000  # steps from one copy of the EMA teacher to the next
    gram_refreshes: int | None = 3  # how often, after the first copy; null = to the end
    gram_crops_size: int = 512  # pixels: the gram teacher sees the global crops undistorted at this size
    gram_negatives: str = "keep"  # cosines below 0: keep, drop, or drop_teacher (the teacher's alone)


class DINOv3(DINOv2):
    Config = DINOv3Config
    weight_norm = False
    token_std: ClassVar[float] = 0.02
    config: DINOv3Config

    def __init__(self, config: DINOv3Config, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__(_checked(config), encoder, collective)
        self.local_norm: nn.Module | None = copy.deepcopy(self.student.vit.norm) if config.local_cls_norm else None
        self.gram_teacher: encoders.Encoder | None = None
        self.copies = 0  # of the EMA teacher that the gram teacher has taken
        self._next_step: int | None = None
        if config.gram_start is not None:
            self.gram_teacher = encoders.build(encoder, drop_path=False, pos_interpolation="dino")
            self.gram_teacher.requires_grad_(False)
            self._refresh(self.copies_due(0))

    def views(self) -> ViewSpec:
        """Beside DINOv2's, the global crops once more for the gram teacher: their boxes and flips, nothing else."""
        c, grid = self.config, self.student.grid(self.config.global_crops_size)
        crops = super().views().crops
        if self.gram_teacher is not None:
            first = crops[0]
            self.student.grid(c.gram_crops_size)
            crops += (CropSpec("gram", 2, c.gram_crops_size, first.scale, first.ratio, first.flip, like=first.name),)
        return ViewSpec(crops, (NoiseSpec("mask", 2 * (1 + NUMBERS + grid**2)),))

    def masks(self, noise: Tensor) -> Tensor:
        """As DINOv2's, but a crop has the highest ratio of its part, and blocks that fall short are topped up."""
        noise = rearrange(noise, "b (v n) -> (v b) n", v=2)
        _, ratio = self.ratio_bounds(noise[:, 0])
        asked = (self.student.grid(self.config.global_crops_size) ** 2 * ratio).int()
        return top_up(self.blocks(noise[:, 1 : 1 + NUMBERS], asked), asked, noise[:, 1 + NUMBERS :])

    def local_prefix_norm(self) -> nn.Module | None:
        return self.local_norm if self.training else None

    def weights(self) -> dict[str, float]:
        c = self.config
        return {**super().weights(), "dino_local": c.dino_weight * c.local_weight, "gram": c.gram_weight}

    def koleo(self, cls: Tensor) -> Tensor:
        return koleo(cls, self.collective, topk=self.config.koleo_topk, group=self.config.koleo_group)

    def distil(self, batch: dict[str, Tensor], mask: Tensor, progress: Progress) -> Outcome:
        self._next_step = progress.step + 1
        return super().distil(batch, mask, progress)

    def further_terms(self, batch: dict[str, Tensor], s: Tokens, progress: Progress) -> dict[str, Tensor]:
        if not self.copies:  # of a gram teacher that does not exist, or not yet
            return {}
        return {"gram": gram_loss(s.patches, self.gram_tokens(batch["gram"], s), negatives=self.config.gram_negatives)}

    @torch.no_grad()
    def gram_tokens(self, crops: Tensor, s: Tokens) -> Tensor:
        """The gram teacher's patches of crops (2, B, 3, S, S), bicubic to the student's grid: (2·B, N, D)."""
        assert self.gram_teacher is not None
        assert s.grid is not None
        t = self.gram_teacher(rearrange(crops, "v b c h w -> (v b) c h w"))
        assert t.grid is not None
        return encoders.resize_patches(t.patches, t.grid, s.grid)

    def teacher_momentum(self, progress: Progress) -> float:
        return cosine_momentum(self.config.momentum_teacher, progress, end=self.config.final_momentum_teacher)

    def after_step(self) -> None:
        super().after_step()
        if self.gram_teacher is not None and self._next_step is not None:
            self._refresh(self.copies_due(self._next_step))
        self._next_step = None

    def discard_step(self) -> None:
        super().discard_step()
        self._next_step = None

    def copies_due(self, step: int) -> int:
        """How many copies of the EMA teacher the gram teacher should have taken when `step` begins."""
        c = self.config
        if c.gram_start is None or step < c.gram_start:
            return 0
        refreshes = (step - c.gram_start) // c.gram_refresh_every
        return 1 + (refreshes if c.gram_refreshes is None else min(refreshes, c.gram_refreshes))

    @torch.no_grad()
    def _refresh(self, due: int) -> None:
        # Counted, not timed: one that was due at a step that was refused comes after the next that is taken.
        if self.gram_teacher is not None and due > self.copies:
            for p, copy_of_p in zip(self.teacher.parameters(), self.gram_teacher.parameters(), strict=True):
                own_part(copy_of_p).copy_(own_part(p))
            self.copies = due

    def inherit(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gram teacher begins as the EMA teacher of the earlier phase, whose own one has done its work; a norm for
        the local crops that was not there begins as that of the global ones."""
        state = {name: x for name, x in state.items() if not name.startswith("gram_teacher.")}
        if self.local_norm is not None:
            state = _renamed(state, "student.vit.norm.", "local_norm.") | state
        if self.gram_teacher is not None:
            state |= _renamed(state, "teacher.", "gram_teacher.")
        return {**state, "_extra_state": torch.tensor(self.copies_due(0), device="cpu")}

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.copies, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.copies = int(state)


def _renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new + name.removeprefix(old): x for name, x in state.items() if name.startswith(old)}


def _checked(c: DINOv3Config) -> DINOv3Config:
    if c.centering != "sinkhorn_knopp":
        raise UserError("dinov3 knows Sinkhorn-Knopp only: leave objective.centering out, or choose dinov2")
    if c.shared_head:
        raise UserError("dinov3 has heads of their own: leave objective.shared_head out, or choose dinov2")
    if c.norm_last_layer:
        raise UserError("dinov3's prototypes have no norm: leave objective.norm_last_layer out, or choose dinov2")
    if c.gram_negatives not in NEGATIVES:
        raise UserError(f"objective.gram_negatives is {c.gram_negatives!r}: choose {', '.join(NEGATIVES)}")
    check_range("objective.final_momentum_teacher", c.final_momentum_teacher, 0, 1)
    for name, low in {"local_weight": 0, "gram_weight": 0, "koleo_topk": 1, "gram_refresh_every": 1}.items():
        check_range(f"objective.{name}", getattr(c, name), low)
    least = {"koleo_group": c.koleo_topk + 1, "gram_start": 0, "gram_refreshes": 0}
    for name, low in least.items():
        if getattr(c, name) is not None:
            check_range(f"objective.{name}", getattr(c, name), low)
    return c
