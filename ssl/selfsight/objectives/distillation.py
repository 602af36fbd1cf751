"""Distillation of a large teacher into a small student (DINOv2, Oquab et al. 2023, §5; DINOv3, Siméoni et al. 2025).

The loop of DINOv2 with another teacher. The student matches the large model's assignments to its prototypes, of class
tokens and of patches, and sees everything: no masks (they say only which patches are compared), no stochastic depth. A
spare EMA of the student is what training hands out. The large teacher is one of

- frozen with heads: a checkpoint folder of a dino, ibot, dinov2 or dinov3 run;
- frozen without heads, an export or timm's folder of a model: its class and patch tokens themselves are the targets, of
  a linear map of the student's (AM-RADIO's losses);
- live: a DINOv2 of its own, trained beside the student on the same crops.
"""

from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from selfsight import encoders
from selfsight.collective import Collective
from selfsight.encoders import Tokens
from selfsight.errors import UserError
from selfsight.losses import spatial_loss, summary_loss
from selfsight.losses.ibot import masked_rows
from selfsight.objectives.base import Outcome, ParameterRule, Progress
from selfsight.objectives.dinov2 import DINOv2, DINOv2Config
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import ViewSpec


@dataclass
class DistillationConfig(DINOv2Config):
    teacher: str | None = None  # folder of the frozen teacher; null = a live one, described by the next two
    teacher_name: str = "vit_large_patch16_224"  # as encoder.name
    teacher_args: dict[str, Any] = field(default_factory=dict)  # as encoder.args
    teacher_drop_path_rate: float = 0.0  # as encoder.drop_path_rate, of the model that trains beside
    shared_head: bool = False
    momentum_teacher: float = 0.994


class Distillation(DINOv2):
    Config = DistillationConfig
    config: DistillationConfig

    def __init__(self, config: DistillationConfig, encoder: EncoderConfig, collective: Collective | None = None):
        super().__init__(config, encoder, collective)
        self.mask_token.requires_grad_(False)  # nothing is hidden from the student
        self.large: DINOv2 | None = None
        self.frozen: nn.ModuleDict | None = None
        if config.teacher is None:
            its_encoder = EncoderConfig(
                name=config.teacher_name,
                img_size=encoder.img_size,
                drop_path_rate=config.teacher_drop_path_rate,
                drop_path_uniform=config.teacher_drop_path_rate > 0,
                args=config.teacher_args,
            )
            self.large = DINOv2(config, its_encoder, collective)
        else:
            self._freeze(encoders.read_frozen(config.teacher))

    def _freeze(self, teacher: encoders.Frozen) -> None:
        c, dim = self.config, teacher.encoder.embed_dim
        if teacher.encoder.vit.cls_token is None:
            raise UserError(f"distillation compares class tokens and the teacher in {c.teacher} has none")
        self.frozen = nn.ModuleDict({"encoder": teacher.encoder})
        if teacher.head is None:
            del self.student_head, self.teacher_head
            self.student_head, self.teacher_head = _linear_pair(self.student.embed_dim, dim)
            if not c.shared_head:
                del self.student_patch_head, self.teacher_patch_head
                self.student_patch_head, self.teacher_patch_head = _linear_pair(self.student.embed_dim, dim)
            return
        assert teacher.patch_head is not None
        self.frozen["head"] = teacher.head
        if teacher.patch_head is not teacher.head:
            self.frozen["patch_head"] = teacher.patch_head
        asked = {"out_dim": c.out_dim, "patch_out_dim": c.patch_out_dim or c.out_dim}
        for (key, ours), head in zip(asked.items(), (teacher.head, teacher.patch_head), strict=True):
            if ours != head.out_dim:
                raise UserError(f"the head in {c.teacher} has {head.out_dim} prototypes: set objective.{key} to that")

    @property
    def matches_features(self) -> bool:
        """Whether the teacher has no heads, so that its tokens are the targets."""
        return self.frozen is not None and "head" not in self.frozen

    def views(self) -> ViewSpec:
        spec = super().views()
        if self.frozen is not None:
            cast(encoders.Encoder, self.frozen["encoder"]).grid(self.config.global_crops_size)
        return ViewSpec(spec.crops[:1]) if self.matches_features else spec

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """batch: as DINOv2's; "global" alone where features are matched."""
        masked = None if self.matches_features else masked_rows(self.masks(batch["mask"]))
        s, cls_s = self.see_as_student(batch, mask=None)
        t, beside = self.see_as_teacher(batch, progress)
        assert s.grid is not None
        assert t.grid is not None
        t = t._replace(patches=encoders.resize_patches(t.patches, t.grid, s.grid), grid=s.grid)
        outcome = self.match(t, s) if masked is None else self.judge(batch, t, s, cls_s, masked, progress)
        loss, metrics = outcome.loss, outcome.metrics
        if beside is not None:
            loss = loss + beside.loss
            metrics = {**metrics, **{f"large_{name}": value for name, value in beside.metrics.items()}}
        return Outcome(loss, cls_s[: batch["global"].shape[1]].detach(), metrics)

    def see_as_teacher(self, batch: dict[str, Tensor], progress: Progress) -> tuple[Tokens, Outcome | None]:
        """The large teacher's tokens of the global crops and, if it is live, what its own training step gives."""
        if self.large is not None:
            mask = self.large.masks(batch["mask"])
            masked, seen = masked_rows(mask), self.large.see(batch, mask)
            return seen[0], self.large.judge(batch, *seen, masked, progress)
        assert self.frozen is not None
        with torch.no_grad():
            return self.frozen["encoder"](rearrange(batch["global"], "v b c h w -> (v b) c h w")), None

    def match(self, t: Tokens, s: Tokens) -> Outcome:
        """The loss of features, of each global crop against itself."""
        assert t.cls is not None
        cls = summary_loss(self.student_head(s.cls), t.cls)
        patches = spatial_loss(super().patch_heads()[0](s.patches), t.patches)
        loss = self.config.dino_weight * cls + self.config.ibot_weight * patches
        return Outcome(loss, t.cls, {"cls": cls.detach(), "patches": patches.detach()})

    def cls_heads(self) -> tuple[nn.Module, nn.Module]:
        return self.student_head, self._its_heads()[0]

    def patch_heads(self) -> tuple[nn.Module, nn.Module]:
        return super().patch_heads()[0], self._its_heads()[1]

    def _its_heads(self) -> tuple[nn.Module, nn.Module]:
        """The large teacher's heads, for class and for patch tokens."""
        if self.large is not None:
            return self.large.teacher_head, self.large.patch_heads()[1]
        assert self.frozen is not None
        _, head, *patch_head = self.frozen.values()
        return head, patch_head[0] if patch_head else head

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        pairs = [(self.student, self.teacher), (self.student_head, self.teacher_head)]
        if not self.config.shared_head:
            pairs.append((self.student_patch_head, self.teacher_patch_head))
        return pairs + (self.large.teacher_pairs() if self.large is not None else [])

    def parameter_rules(self) -> list[ParameterRule]:
        rules = super().parameter_rules()
        its = [] if self.large is None else self.large.parameter_rules()
        return rules + [replace(rule, prefix=f"large.{rule.prefix}") for rule in its]

    def after_step(self) -> None:
        super().after_step()
        if self.large is not None:
            self.large.after_step()

    def discard_step(self) -> None:
        super().discard_step()
        if self.large is not None:
            self.large.discard_step()

    def collapse_values(self) -> dict[str, float]:
        if self.matches_features:
            return {}  # they depend on the teacher's tokens
        own = super().collapse_values()
        its = {} if self.large is None else self.large.collapse_values()
        loss = own.pop("loss") + its.pop("loss", 0.0)
        return {"loss": loss, **own, **{f"large_{name}": value for name, value in its.items()}}


def _linear_pair(in_dim: int, out_dim: int) -> tuple[nn.Linear, nn.Linear]:
    """A linear map of the student's tokens, and its EMA."""
    student, teacher = nn.Linear(in_dim, out_dim), nn.Linear(in_dim, out_dim)
    teacher.load_state_dict(student.state_dict())
    return student, teacher.requires_grad_(False)
