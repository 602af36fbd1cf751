"""The contract of an objective: one file per method, found by its name, knowing neither DeepSpeed nor ranks nor files.

In: a batch of views, already on the device and normalised, and how far training has come. Out: the loss, metrics and
features of this micro-batch. The trainer owns every side effect: optimiser, EMA, schedules, checkpoints.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from selfsight.collective import Collective
from selfsight.encoders import Encoder
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import ViewSpec


@dataclass(frozen=True)
class Progress:
    """Where training stands. `step` counts optimiser steps from 0; an epoch is `steps_per_epoch` of them."""

    step: int
    steps_per_epoch: int
    total_steps: int

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch


@dataclass
class Outcome:
    """What a forward pass gives. `loss` is a scalar with a graph; the rest is detached."""

    loss: Tensor  # ()
    features: Tensor  # (B, D) global features of this micro-batch, from which the monitors tell collapse
    metrics: dict[str, Tensor] = field(default_factory=dict)  # scalars, left on the device


@dataclass(frozen=True)
class ParameterRule:
    """Treats the parameters whose name starts with `prefix` in their own way; the first rule that matches holds."""

    prefix: str
    lr_scale: Callable[[Progress], float]  # 0 means frozen at that step: neither gradient nor weight decay moves it


class Objective(nn.Module, ABC):
    """Base of all objectives. A subclass puts its encoders in `self.student` and, if it has one, `self.teacher`."""

    Config: ClassVar[type]  # a dataclass: the objective's section of the recipe
    student: Encoder

    @abstractmethod
    def __init__(self, config, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__()

    @abstractmethod
    def views(self) -> ViewSpec:
        """What each image becomes."""

    @abstractmethod
    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        """Crops are float32, normalised, (count, B, 3, H, W). Must not change state: see `after_step`."""

    def teacher_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(student, teacher) modules whose parameters the trainer joins by an exponential moving average."""
        return []

    def teacher_momentum(self, progress: Progress) -> float:
        """The EMA's m in teacher ← m·teacher + (1 − m)·student."""
        return 1.0

    def parameter_rules(self) -> list[ParameterRule]:
        return []

    def after_step(self) -> None:
        """Called once after the optimiser really moved: commits the batch statistics (a centre, say) that the forward
        passes of this step gathered, so that accumulation equals one large batch and a skipped step leaves no trace."""

    def discard_step(self) -> None:
        """Called instead of `after_step` when the step was not taken: forgets those statistics."""

    def collapse_loss(self) -> float | None:
        """The loss of a model that maps every image to the same output, if that is known."""
        return None
