"""One optimiser step under DeepSpeed: forward, backward, norms, clipping, the step or its refusal, the teacher.

In: the micro-batches of a step. Out: what happened. Weights, moments and teacher are fp32 under every ZeRO stage; bf16
is autocast around the forward pass, never DeepSpeed's own bf16 mode, which rounds the master weights and, at stage 0,
takes a hidden step at start-up.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor

from selfsight.objectives import Objective, Progress
from selfsight.recipe import Recipe
from selfsight.training import noise, optim, schedules, sharding
from selfsight.training.cluster import Cluster
from selfsight.training.teacher import Teacher


@dataclass
class Step:
    """What one optimiser step did, the same on every rank but for what is this rank's."""

    taken: bool  # False: the loss or a gradient was not finite, nothing has moved
    loss: float  # mean over the global batch
    lr: float
    weight_decay: float
    momentum: float  # of the teacher
    grad_norms: list[float]  # before clipping, per parameter group, over all ranks
    grad_signal: float  # |G|², as far as one step tells, before clipping; NaN where not asked for: `noise`
    grad_noise: float  # tr(Σ), likewise
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
        self.trained = [p for group in groups for p in group["params"]]
        self.clip_units = optim.clip_units(groups, config.clip_per)
        objective.to(cluster.device)
        self.optimizer: Any = optim.build(config, groups, fused=True)
        with sharding.frugal_linear(recipe.training.zero):
            settings = sharding.deepspeed_config(recipe, cluster.world_size, sum(p.numel() for p in self.trained))
            self.engine: Any = deepspeed.initialize(model=objective, optimizer=self.optimizer, config=settings)[0]
        sharding.clear_padding(self.engine)
        if cluster.world_size == 1 and recipe.training.zero == 0:  # nobody to average with: spares two copies
            self.engine.enable_backward_allreduce = False
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

        several = len(batches) * self.cluster.world_size
        few = self.recipe.batch_size // several
        squares: list[Tensor] = []  # of the gradients of so few images
        if measure and several == 1 and self.recipe.training.zero < 3:
            bf16 = self.recipe.training.precision == "bf16"
            part, few = noise.part_of(batches[0])
            with torch.autocast(self.cluster.device.type, torch.bfloat16, enabled=bf16):
                squares = noise.squares_of(self.objective, self.trained, part, progress)

        losses, metrics, features = [], [], []
        watched = noise.watched(self.trained, squares) if measure and several > 1 else nullcontext()
        with sharding.frugal_linear(self.recipe.training.zero), watched:
            for i, batch in enumerate(batches):
                outcome = self.engine(batch, progress)
                losses.append(outcome.loss.detach().float())
                metrics.append(outcome.metrics)
                features.append(outcome.features.detach())
                self.engine.backward(outcome.loss)  # divides by the number of micro-batches
                if i < len(batches) - 1:
                    self.engine.step()  # not a boundary: counts the micro-batch, moves nothing

        gradients = sharding.averaged_gradients(self.engine)
        own = torch.stack(losses)
        small = torch.stack(squares).sum() * len(batches) if squares else torch.zeros_like(own[0])
        loss, small, stop, norms = self._agree(own.mean(), small, asked_to_stop(), gradients)
        taken = isfinite(loss) and all(isfinite(n) for n in norms)
        if taken and config.clip > 0:
            optim.clip(gradients, norms, config.clip, self.clip_units)
        if taken:
            self.optimizer.prepare(sharding.held(self.engine, gradients), self._total)
        del gradients  # the step frees them
        self.optimizer.skip = not taken
        self.engine.step()
        sharding.forget_gradients(self.engine)
        if taken:
            self.teacher.follow(momentum)
            self.objective.after_step()
        else:
            self.objective.discard_step()
        averaged = {k: torch.stack([m[k].detach().float() for m in metrics]).mean() for k in metrics[0]}
        large = sum(n * n for n in norms)
        spread = noise.estimate(small, few, large, self.recipe.batch_size) if taken and squares else (nan, nan)
        return Step(taken, loss, lr, decay, momentum, norms, *spread, own, averaged, torch.cat(features), stop)

    def _agree(
        self, loss: Tensor, small: Tensor, stop: bool, gradients: list[list[Tensor]]
    ) -> tuple[float, float, bool, list[float]]:
        """Mean loss, mean squared norm of small gradients, whether anyone stops, and whole gradient norms: one
        reduction, one transfer to the host."""
        device = self.cluster.device
        squares = optim.squared_norms(gradients, device)
        if self.recipe.training.zero == 0:  # every rank has the whole gradient
            squares = squares / self.cluster.world_size
        means = torch.stack([loss, small]) / self.cluster.world_size
        head = torch.full((1,), float(stop), device=device)
        mean, small_mean, stops, *squared = self.cluster.sum(torch.cat([means, head, squares])).tolist()
        return mean, small_mean, stops > 0, [s**0.5 for s in squared]

    def _total(self, x: Tensor) -> Tensor:
        """What ranks hold of a sum over whole tensors, added up; under ZeRO-0 each has all of it."""
        if self.recipe.training.zero == 0:
            return x
        return self.cluster.sum(x.to(self.cluster.device)).to(x.device)  # offloaded, it comes from the CPU

    def whole_state(self) -> dict[str, Tensor]:
        """On rank 0 the objective's whole state, copied to the CPU; elsewhere nothing. All ranks call it."""
        return sharding.whole_state(self.objective, wanted=self.cluster.rank == 0)
