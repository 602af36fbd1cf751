"""The contract of an objective: one file per method, found by its name, knowing neither DeepSpeed nor ranks nor files.

In: a batch of views, already on the device and normalised, and how far training has come. Out: the loss, metrics and
features of this micro-batch. The trainer owns every side effect: optimiser, EMA, schedules, checkpoints.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from einops import rearrange
from torch import Tensor, nn

from selfsight.collective import Collective
from selfsight.encoders import Encoder
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import CropSpec, ViewSpec


@dataclass(frozen=True)
class Progress:
    """Where training stands. `step` counts optimiser steps from 0; an epoch is `steps_per_epoch` of them."""

    step: int
    steps_per_epoch: int
    total_steps: int

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch


class Outcome(NamedTuple):  # a tuple, in which DeepSpeed finds the tensors that ZeRO-3's backward pass begins at
    """What a forward pass gives. `loss` is a scalar with a graph; the rest is detached."""

    loss: Tensor  # ()
    features: Tensor  # (B, D) global features of this micro-batch, from which the monitors tell collapse
    metrics: Mapping[str, Tensor] = {}  # scalars, left on the device


@dataclass(frozen=True)
class ParameterRule:
    """Treats the parameters whose name starts with `prefix` in their own way; the first rule that matches holds."""

    prefix: str
    lr_scale: Callable[[Progress], float]  # 0 means frozen at that step: neither gradient nor weight decay moves it


@dataclass(frozen=True)
class Scale:
    """How large a run is: what values that say "auto" follow from."""

    images: int  # of an epoch
    steps_per_epoch: int
    total_steps: int


@dataclass
class Photometrics:
    """How crops are flipped and coloured: as in BYOL (Grill et al. 2020, appendix B), which most methods took over."""

    flip: float = 0.5  # this and the next: probabilities
    jitter: float = 0.8
    brightness: float = 0.4  # strengths of the colour jitter
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2

    def crop(self, name: str, count: int, size: int, scale: list[float], **more: Any) -> CropSpec:
        """`count` crops of `size` pixels and `scale` of the image's area; `more` are other fields of CropSpec."""
        return CropSpec(
            name=name,
            count=count,
            size=size,
            scale=(scale[0], scale[1]),
            flip=self.flip,
            jitter=self.jitter,
            brightness=self.brightness,
            contrast=self.contrast,
            saturation=self.saturation,
            hue=self.hue,
            grayscale=self.grayscale,
            **more,
        )


@dataclass
class PairConfig(Photometrics):
    """Two random crops of each image (BYOL; MoCo v3 does the same)."""

    crop_size: int = 224  # pixels
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # fraction of the image's area
    blur: list[float] = field(default_factory=lambda: [1.0, 0.1])  # probability, of the first and the second crop
    solarize: list[float] = field(default_factory=lambda: [0.0, 0.2])  # likewise

    def views(self) -> ViewSpec:
        """One entry "pair" of two crops. Raises UserError for values that make none."""
        for name in ("crop_scale", "blur", "solarize"):
            if len(getattr(self, name)) != 2:
                raise UserError(f"objective.{name} should be two numbers")
        more: dict[str, Any] = {"blur": tuple(self.blur), "solarize": tuple(self.solarize)}
        pair = self.crop("pair", 2, self.crop_size, self.crop_scale, **more)
        return ViewSpec((pair,))


def freeze_final_bias(encoder: Encoder) -> None:
    """Leaves the bias of the final norm as it is, for heads that begin with a batch-normalised linear map.

    Such a head takes off again what the bias adds, so its gradient is rounding noise; AdamW would make of that steps of
    full size, and the features that training hands out would walk at random with it. The other part of an encoder
    without a gradient, the key third of a qkv bias (not with rotary positions or a norm of the keys), is left to walk,
    as in all official codes: it is a third of a tensor, and softmax takes off what it adds, so no feature moves.
    """
    if (bias := getattr(encoder.vit.norm, "bias", None)) is not None:
        bias.requires_grad_(False)


def pair_features(encoder: Encoder, pair: Tensor) -> Tensor:
    """pair (2, B, 3, S, S) → (2, B, D) in one forward: the class token, or the mean patch where there is none."""
    (features,) = encoder.features([rearrange(pair, "v b c h w -> (v b) c h w")])
    return rearrange(features, "(v b) d -> v b d", v=len(pair))


def multi_crop(global_crops: CropSpec, config, *, blur: float, solarize: float = 0.0) -> ViewSpec:
    """The global crops and, unless `config.local_crops_number` is 0, as many local ones, "local": smaller parts of the
    image, of `config.local_crops_size` and `_scale`, augmented alike but for the probabilities given."""
    n = config.local_crops_number
    if not n:
        return ViewSpec((global_crops,))
    local_crops = replace(
        global_crops,
        name="local",
        count=n,
        size=config.local_crops_size,
        scale=(config.local_crops_scale[0], config.local_crops_scale[1]),
        blur=(blur,) * n,
        solarize=(solarize,) * n if solarize else (),
    )
    return ViewSpec((global_crops, local_crops))


def cosine_momentum(start: float, progress: Progress, end: float = 1.0) -> float:
    """The teacher's m on a cosine from `start` to `end` over training (BYOL, DINO, MoCo v3)."""
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * progress.step / progress.total_steps))


class Objective(nn.Module, ABC):
    """Base of all objectives. A subclass puts its encoders in `self.student` and, if it has one, `self.teacher`."""

    Config: ClassVar[type]  # a dataclass: the objective's section of the recipe
    # Whether the loss of an image depends on the others of its micro-batch (negatives, batch statistics): then two
    # micro-batches are not one large batch, and accumulation means what it says.
    joint: ClassVar[bool] = False
    # Names of parameters outside the student that enter below its first block, for layer-wise rates.
    encoder_inputs: ClassVar[tuple[str, ...]] = ()
    student: Encoder

    @abstractmethod
    def __init__(self, config, encoder: EncoderConfig, collective: Collective | None = None) -> None:
        super().__init__()

    @classmethod
    def auto(cls, scale: Scale) -> dict[str, tuple[float, str]]:
        """Values, with their reasons, for keys of its Config that may say "auto"."""
        return {}

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

    def inherit(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state to start with, given that of an earlier run, or the encoders' alone where only an export is given.
        Students have their teachers' values in it. Here belongs what a later phase derives or leaves behind."""
        return state

    def after_step(self) -> None:
        """Called once after the optimiser really moved: commits the batch statistics (a centre, say) that the forward
        passes of this step gathered, so that accumulation equals one large batch and a skipped step leaves no trace."""

    def discard_step(self) -> None:
        """Called instead of `after_step` when the step was not taken: forgets those statistics."""

    def prototype_counts(self) -> Tensor | None:
        """How often the targets of this rank chose each prototype: (K,) on the device, which the trainer reads and
        zeroes. None where there are no prototypes. See `losses.PrototypeUse`."""
        return None

    def collapse_values(self) -> dict[str, float]:
        """What "loss" and metrics are for a model to which all images and all prototypes are alike, where that is
        known: the monitors take values that stay there for collapse. A total can hide which of its terms collapsed, so
        terms that are metrics are worth naming. "teacher_entropy" is then at its largest, ln K."""
        return {}
