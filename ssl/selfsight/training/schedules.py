"""Values of the learning rate and weight decay at a step: pure functions of the step, in float64.

In: an optimiser's section of the recipe and how far training has come. Out: floats. Both published warm-ups are here,
since they differ: DINO's (utils.py `cosine_scheduler`) includes its end point, MAE's (util/lr_sched.py) does not.
"""

import math

from selfsight.errors import UserError, check_range
from selfsight.objectives import Progress
from selfsight.recipe import OptimizerConfig

REFERENCE_BATCH = 256  # images: `base_lr` is for this many


def dino_cosine(step: int, total_steps: int, base: float, final: float, warmup_steps: int = 0, start: float = 0.0):
    """DINO's `cosine_scheduler` at `step`: `linspace(start, base, warmup_steps)`, then a cosine from `base` to `final`.

    The warm-up ends on `base` and the cosine starts there, so `base` comes twice; `final` is approached, not reached.
    """
    if step < warmup_steps:
        return start + step * (base - start) / max(warmup_steps - 1, 1)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))


def mae_cosine(epoch: float, epochs: float, base: float, final: float, warmup_epochs: float = 0.0) -> float:
    """MAE's `adjust_learning_rate` at a fractional `epoch`: from 0 in proportion, then a cosine to `final`."""
    if epoch < warmup_epochs:
        return base * epoch / warmup_epochs
    return final + (base - final) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def scaled_lr(config: OptimizerConfig, batch_size: int) -> float:
    """The peak learning rate: `base_lr · batch_size / 256` (Goyal et al. 2017, as DINO and MAE use it)."""
    return config.base_lr * batch_size / REFERENCE_BATCH


def learning_rate(config: OptimizerConfig, batch_size: int, progress: Progress) -> float:
    """The learning rate of this step, before a parameter group's own factor."""
    peak, steps_per_epoch = scaled_lr(config, batch_size), progress.steps_per_epoch
    if config.warmup == "mae":
        epochs = progress.total_steps / steps_per_epoch
        return mae_cosine(progress.step / steps_per_epoch, epochs, peak, config.min_lr, config.warmup_epochs)
    warmup_steps = int(config.warmup_epochs * steps_per_epoch)
    return dino_cosine(progress.step, progress.total_steps, peak, config.min_lr, warmup_steps)


def weight_decay(config: OptimizerConfig, progress: Progress) -> float:
    """The weight decay of this step, for the groups that are decayed."""
    if config.weight_decay_end is None:
        return config.weight_decay
    return dino_cosine(progress.step, progress.total_steps, config.weight_decay, config.weight_decay_end)


def check(config: OptimizerConfig, epochs: float) -> None:
    """Raises UserError for schedules that cannot be drawn."""
    if config.warmup not in ("dino", "mae"):
        raise UserError(f"optimizer.warmup is {config.warmup!r}: choose dino or mae")
    for key in ("base_lr", "min_lr", "warmup_epochs", "weight_decay", "clip"):
        check_range(f"optimizer.{key}", getattr(config, key), 0)
    if config.weight_decay_end is not None:
        check_range("optimizer.weight_decay_end", config.weight_decay_end, 0)
    if config.warmup_epochs > epochs:
        raise UserError(
            f"the warm-up of {config.warmup_epochs:g} epochs is longer than the run of {epochs:g}: "
            "lower optimizer.warmup_epochs or raise epochs"
        )
    if config.clip_per not in ("global", "tensor"):
        raise UserError(f"optimizer.clip_per is {config.clip_per!r}: choose global or tensor")
