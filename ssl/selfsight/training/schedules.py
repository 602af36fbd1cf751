"""Values of the learning rate and weight decay at a step: pure functions of the step, in float64.

In: an optimiser's section of the recipe and how far training has come. Out: floats. Each published curve is here under
its own name, since they differ: DINO's warm-up includes its end point and its cosine does not, MAE's neither, DINOv3's
cosine does; what they share is that the values are those of the official code, to the last bits.
"""

import math
from functools import partial

from selfsight.errors import UserError, check_range
from selfsight.objectives import Progress
from selfsight.recipe import OptimizerConfig

SCHEDULES = ("dino_cosine", "mae_cosine", "truncated_cosine", "linear_warmup_cosine", "constant")
SCALINGS = ("linear", "sqrt", "none")


def dino_cosine(step: int, total_steps: int, base: float, final: float, warmup_steps: int = 0, start: float = 0.0):
    """DINO's `cosine_scheduler` at `step`: `linspace(start, base, warmup_steps)`, then a cosine from `base` to `final`.

    The warm-up ends on `base` and the cosine starts there, so `base` comes twice; `final` is approached, not reached.
    """
    if step < warmup_steps:
        return start + step * (base - start) / max(warmup_steps - 1, 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


def truncated_cosine(step: int, total_steps: int, base: float, final: float, warmup_steps: int = 0, extra: float = 0.0):
    """DINOv3's `CosineScheduler` with `trunc_extra`: DINO's warm-up, then the beginning of a cosine that is drawn for
    (1 + extra) times as many steps, stretched so that it reaches `final` all the same, and not flatly."""
    if step < warmup_steps:
        return dino_cosine(step, total_steps, base, final, warmup_steps)
    steps = total_steps - warmup_steps
    drawn = max(int((1 + extra) * steps) - 1, 1)
    now, last = (0.5 * (1 + math.cos(math.pi * i / drawn)) for i in (step - warmup_steps, steps - 1))
    return final + (base - final) * (now - last) / (1 - last) if last < 1 else base


def mae_cosine(epoch: float, epochs: float, base: float, final: float, warmup_epochs: float = 0.0) -> float:
    """MAE's `adjust_learning_rate` at a fractional `epoch`: from 0 in proportion, then a cosine to `final`."""
    if epoch < warmup_epochs:
        return base * epoch / warmup_epochs
    return final + (base - final) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def linear_warmup_cosine(step: int, base: float, final: float, warmup_steps: int, cosine_steps: int) -> float:
    """DINOv3's `linear_warmup_cosine_decay`: from 0 in proportion, a cosine of `cosine_steps` that reaches `final`, and
    `final` ever after."""
    if step < warmup_steps:
        return base * step / warmup_steps
    turn = min((step - warmup_steps) / max(cosine_steps - 1, 1), 1.0)
    return final + (base - final) * 0.5 * (1 + math.cos(math.pi * turn))


def scaled_lr(config: OptimizerConfig, batch_size: int) -> float:
    """The peak learning rate of a global batch: `base_lr` times its ratio to the reference batch (linear: Goyal et al.
    2017, as in DINO and MAE), or times the root of that (sqrt: DINOv2 and DINOv3; LAMB), or as it is (none)."""
    ratio = batch_size / config.reference_batch
    return config.base_lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[config.scaling]


def learning_rate(config: OptimizerConfig, batch_size: int, progress: Progress) -> float:
    """The learning rate of this step, before a parameter group's own factor."""
    peak, step, total = scaled_lr(config, batch_size), progress.step, progress.total_steps
    if config.schedule == "mae_cosine":
        per_epoch = progress.steps_per_epoch
        return mae_cosine(step / per_epoch, total / per_epoch, peak, config.min_lr, config.warmup_epochs)
    warmup = int(config.warmup_epochs * progress.steps_per_epoch)
    if config.schedule == "linear_warmup_cosine":
        rest = total - warmup
        cosine = rest if config.cosine_epochs is None else int(config.cosine_epochs * progress.steps_per_epoch)
        return linear_warmup_cosine(step, peak, config.min_lr, warmup, cosine)
    if config.schedule == "constant":
        return linear_warmup_cosine(step, peak, peak, warmup, 1)
    return _cosine(config)(step, total, peak, config.min_lr, warmup)


def weight_decay(config: OptimizerConfig, progress: Progress) -> float:
    """The weight decay of this step, for the groups that are decayed."""
    if config.weight_decay_end is None:
        return config.weight_decay
    return _cosine(config)(progress.step, progress.total_steps, config.weight_decay, config.weight_decay_end)


def _cosine(config: OptimizerConfig):
    if config.schedule == "truncated_cosine":
        return partial(truncated_cosine, extra=config.trunc_extra)
    return dino_cosine


def check(config: OptimizerConfig, epochs: float) -> None:
    """Raises UserError for schedules that cannot be drawn."""
    for key, choices in (("schedule", SCHEDULES), ("scaling", SCALINGS)):
        if getattr(config, key) not in choices:
            raise UserError(
                f"optimizer.{key} is {getattr(config, key)!r}: choose {', '.join(choices[:-1])} or {choices[-1]}"
            )
    for key in ("base_lr", "min_lr", "warmup_epochs", "trunc_extra", "weight_decay"):
        check_range(f"optimizer.{key}", getattr(config, key), 0)
    check_range("optimizer.reference_batch", config.reference_batch, 1)
    for key in ("weight_decay_end", "cosine_epochs"):
        if getattr(config, key) is not None:
            check_range(f"optimizer.{key}", getattr(config, key), 0)
    if config.warmup_epochs > epochs:
        raise UserError(
            f"the warm-up of {config.warmup_epochs:g} epochs is longer than the run of {epochs:g}: "
            "lower optimizer.warmup_epochs or raise epochs"
        )
