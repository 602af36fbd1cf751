"""One optimiser step under DeepSpeed: forward, backward, norms, clipping, the step or its refusal, the teacher.

In: the micro-batches of a step. Out: what happened. Weights, moments and teacher are fp32 under ZeRO 0 and 1; bf16 is
autocast around the forward pass, never DeepSpeed's own bf16 mode, which rounds the master weights and, at stage 0,
takes a hidden step at start-up.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfsight.objectives import Objective, Progress
from selfsight.recipe import Recipe
from selfsight.training import noise, optim, schedules
from selfsight.training.cluster import Cluster
from selfsight.training.teacher import Teacher

STATE = "deepspeed"  # DeepSpeed's folder inside a checkpoint


@dataclass
class Step:
    """What one optimiser step did, the same on every rank but for what is this rank's."""

    taken: bool  # False: the loss or a gradient was not finite, nothing has moved
    loss: float  # mean over the global batch
    lr: float
    weight_decay: float
    momentum: float  # of the teacher
    grad_norms: list[float]  # before clipping, per parameter group, over all ranks
    grad_signal: float  # |G|² and tr(Σ) as far as one step tells them, after clipping; NaN where not asked for: `noise`
    grad_noise: float
    losses: Tensor  # (accumulation,) of this rank's micro-batches, on the device
    metrics: dict[str, Tensor]  # of this rank, averaged over its micro-batches, on the device
    features: Tensor  # (B / ranks, D) of this rank, on the device
    stop: bool  # some rank was asked to stop

    @property
    def grad_norm(self) -> float:
        """The global l2 norm of the gradient before clipping."""
        return sum(n * n for n in self.grad_norms) ** 0.5


class Engine:
    """An objective in training. The teacher is part of the module but not of the optimiser."""

    def __init__(self, objective: Objective, recipe: Recipe, cluster: Cluster) -> None:
        import deepspeed

        self.objective, self.recipe, self.cluster = objective, recipe, cluster
        self.rules = objective.parameter_rules()
        config = recipe.optimizer
        groups = optim.parameter_groups(objective, self.rules, config)
        self.clip_units = optim.clip_units(groups, config.clip_per)
        objective.to(cluster.device)
        self.optimizer: Any = optim.build(config, groups, fused=cluster.device.type == "cuda")
        self.engine: Any = deepspeed.initialize(
            model=objective, optimizer=self.optimizer, config=deepspeed_config(recipe, cluster.world_size)
        )[0]
        self.teacher = Teacher(objective.teacher_pairs())

    def step(
        self,
        batches: Sequence[dict[str, Tensor]],
        progress: Progress,
        *,
        asked_to_stop: Callable[[], bool] = lambda: False,
        measure: bool = False,
    ) -> Step:
        """One optimiser step over micro-batches that are on the device and normalised; `measure` asks for the noise of
        its gradient."""
        config = self.recipe.optimizer
        lr = schedules.learning_rate(config, self.recipe.batch_size, progress)
        decay = schedules.weight_decay(config, progress)
        momentum = self.objective.teacher_momentum(progress)
        optim.set_schedule(self.optimizer, self.rules, progress, lr=lr, weight_decay=decay)
        bf16 = self.recipe.training.precision == "bf16"

        losses, metrics, features = [], [], []
        for i, batch in enumerate(batches):
            with torch.autocast(self.cluster.device.type, torch.bfloat16) if bf16 else nullcontext():
                outcome = self.engine(batch, progress)
            losses.append(outcome.loss.detach().float())
            metrics.append(outcome.metrics)
            features.append(outcome.features.detach())
            self.engine.backward(outcome.loss)
            if i < len(batches) - 1:
                self.engine.step()  # not a boundary: counts the micro-batch, moves nothing

        gradients = optim.averaged_gradients(self.engine)
        own = torch.stack(losses)
        loss, stop, norms = self._agree(own.mean(), asked_to_stop(), gradients)
        taken = isfinite(loss) and all(isfinite(n) for n in norms)
        if taken and config.clip > 0:
            optim.clip(gradients, norms, config.clip, self.clip_units)
        if taken:
            self.optimizer.prepare(optim.held(self.engine, gradients), self._total)
        spread = self._spread(gradients, progress) if taken and measure else (nan, nan)
        del gradients  # the step frees them
        self.optimizer.skip = not taken
        self.engine.step()
        if taken:
            self.teacher.follow(momentum)
            self.objective.after_step()
        else:
            self.objective.discard_step()
        averaged = {k: torch.stack([m[k].detach().float() for m in metrics]).mean() for k in metrics[0]}
        return Step(taken, loss, lr, decay, momentum, norms, *spread, own, averaged, torch.cat(features), stop)

    def _agree(self, loss: Tensor, stop: bool, gradients: list[list[Tensor]]) -> tuple[float, bool, list[float]]:
        """Mean loss, whether anyone stops, and whole gradient norms: one reduction, one transfer to the host."""
        device = self.cluster.device
        squares = optim.squared_norms(gradients, device)
        if self.recipe.training.zero == 0:  # every rank has the whole gradient
            squares = squares / self.cluster.world_size
        head = torch.stack([loss / self.cluster.world_size, torch.full((), float(stop), device=device)])
        mean, stops, *squared = self.cluster.sum(torch.cat([head, squares])).tolist()
        return mean, stops > 0, [s**0.5 for s in squared]

    def _spread(self, gradients: list[list[Tensor]], progress: Progress) -> tuple[float, float]:
        measured = noise.measure(self.optimizer, optim.held(self.engine, gradients), progress.step)
        power, signal = self._total(measured.to(self.cluster.device)).tolist()
        return (signal, self.recipe.batch_size * (power - signal)) if power else (nan, nan)

    def _total(self, x: Tensor) -> Tensor:
        """What ranks hold of a sum over whole tensors, added up; under ZeRO-0 each has all of it."""
        return x if self.recipe.training.zero == 0 else self.cluster.sum(x)

    def save(self, folder: Path) -> None:
        """Every rank writes its optimiser state below `folder`. The frozen teacher is not in it."""
        self.engine.save_checkpoint(str(folder), tag=STATE, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path, weights: dict[str, Any]) -> None:
        """Takes up what `save` wrote, which DeepSpeed un-pickles, and the objective's whole state."""
        self.engine.load_checkpoint(str(folder), tag=STATE, load_module_strict=False)
        self.objective.load_state_dict(weights)


def deepspeed_config(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero: dict[str, Any] = {"stage": recipe.training.zero}
    if recipe.training.zero and "compute_grad_norm" in DeepSpeedZeroConfig.model_fields:
        zero["compute_grad_norm"] = False  # ours is computed in one reduction; theirs takes one per group
    return {
        "train_batch_size": recipe.batch_size,
        "train_micro_batch_size_per_gpu": recipe.batch_size // (world_size * recipe.training.accumulation),
        "gradient_accumulation_steps": recipe.training.accumulation,
        "gradient_clipping": 0.0,  # absent means 1.0; `optim.clip` does it
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
