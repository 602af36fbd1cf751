"""Recipe → what a run of it costs: parameters, memory under each ZeRO stage, arithmetic, time, traffic.

Nothing is trained and no image is read: the objective is built without memory, and one step of it imagined.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from selfsight import objectives
from selfsight.errors import UserError
from selfsight.objectives import Objective, Progress
from selfsight.recipe import Recipe
from selfsight.training.costs.hardware import Gpu
from selfsight.training.costs.memory import MOMENTS, STAGES, Memory, Weights, per_gpu
from selfsight.training.costs.trace import Trace, trace

IMAGENET = (1_281_167, 110_000.0)  # images of ImageNet-1k's training set, and bytes of one: where no corpus is named


@dataclass(frozen=True)
class Images:
    """What a run is fed with."""

    n: int  # images of an epoch
    bytes_each: float  # as they lie in the shards
    source: str


@dataclass(frozen=True)
class Plan:
    gpu: Gpu
    ranks: int
    recipe: Recipe  # with the precision that was planned for
    parameters: dict[str, int]  # encoder, heads, teacher
    weights: Weights
    steps: dict[str, Trace]  # by encoder.checkpointing
    memory: dict[str, dict[int, Memory]]  # by encoder.checkpointing and ZeRO stage
    images: Images
    total_steps: int
    utilisation: float

    @property
    def step(self) -> Trace:
        return self.steps[self.recipe.encoder.checkpointing]

    @property
    def micro_batch(self) -> int:
        return self.step.micro_batch

    @property
    def chosen(self) -> Memory:
        """Of the recipe's own stage and checkpointing."""
        return self.memory[self.recipe.encoder.checkpointing][self.recipe.training.zero]

    @property
    def host_bytes(self) -> float:
        """For each GPU, on its host: what training.offload moves there, and a copy of the weights on their way back."""
        return (self.weights.moments + 3 * self.weights.trained) / self.ranks if self.recipe.training.offload else 0.0

    @property
    def images_per_second(self) -> float:
        peak = self.gpu.peak(self.recipe.training.precision == "bf16")
        return self.ranks * peak * self.utilisation / self.step.flops_per_image

    @property
    def seconds(self) -> float:
        return self.total_steps * self.recipe.batch_size / self.images_per_second

    @property
    def gpu_hours(self) -> float:
        return self.ranks * self.seconds / 3600

    @property
    def checkpoint_bytes(self) -> int:
        """Of all ranks together: everything in fp32, and what the optimiser keeps beside its weights."""
        w = self.weights
        return w.trained + w.frozen + w.buffers + w.moments + (w.trained if self.recipe.training.zero else 0)

    @property
    def shard_traffic(self) -> float:
        """Bytes a second that all GPUs together read."""
        return self.images_per_second * self.images.bytes_each


def plan(
    recipe: Recipe, gpu: Gpu, ranks: int, *, images: Images | None = None, utilisation: float | None = None
) -> Plan:
    """What `recipe` costs on `ranks` of `gpu`. Raises UserError for recipes that cannot be built or divided."""
    n, each = IMAGENET
    images = images or Images(n, each, "ImageNet-1k assumed: no corpus is named")
    precision = recipe.training.precision or "bf16"
    recipe = replace(recipe, training=replace(recipe.training, precision=precision))
    accumulation = recipe.training.accumulation
    if recipe.batch_size % (ranks * accumulation):
        raise UserError(
            f"batch_size={recipe.batch_size} does not divide into {ranks} GPUs × {accumulation} micro-batches: "
            "choose another number of GPUs, batch_size or training.accumulation"
        )
    micro_batch = recipe.batch_size // (ranks * accumulation)
    steps_per_epoch = max(images.n // recipe.batch_size, 1)
    total_steps = max(1, round(recipe.epochs * steps_per_epoch))
    middle = Progress(total_steps // 2, steps_per_epoch, total_steps)  # when what is frozen at first moves
    steps, memory = {}, {}
    weights, parameters = None, {}
    for how in dict.fromkeys((recipe.encoder.checkpointing, "none", "full")):
        objective = build(replace(recipe, encoder=replace(recipe.encoder, checkpointing=how, compile=False)))
        weights, parameters = weigh(objective, recipe), count(objective)
        steps[how] = trace(objective, micro_batch, middle, bf16=precision == "bf16")
        memory[how] = {
            stage: per_gpu(
                stage, ranks, weights, steps[how], accumulation=accumulation, offload=recipe.training.offload
            )
            for stage in STAGES
        }
    assert weights is not None
    return Plan(
        gpu=gpu,
        ranks=ranks,
        recipe=recipe,
        parameters=parameters,
        weights=weights,
        steps=steps,
        memory=memory,
        images=images,
        total_steps=total_steps,
        utilisation=utilisation or gpu.utilisation,
    )


def build(recipe: Recipe) -> Objective:
    """The recipe's objective, without memory."""
    kind = objectives.find(recipe.objective_name)
    with torch.device("meta"):
        config = kind.Config(**{k: v for k, v in recipe.objective.items() if k != "name"})
        return kind(config, recipe.encoder)


def weigh(objective: Objective, recipe: Recipe) -> Weights:
    trained = sum(_bytes(p) for p in objective.parameters() if p.requires_grad)
    frozen = sum(_bytes(p) for p in objective.parameters() if not p.requires_grad)
    buffers = sum(_bytes(b) for b in objective.buffers())
    return Weights(trained, frozen, buffers, MOMENTS[recipe.optimizer.name] * trained)


def count(objective: Objective) -> dict[str, int]:
    """Parameters of the student's encoder, of everything else that is trained, and of what is not."""
    encoder = {id(p) for p in objective.student.parameters()}
    trained = [p for p in objective.parameters() if p.requires_grad and id(p) not in encoder]
    frozen = [p for p in objective.parameters() if not p.requires_grad and id(p) not in encoder]
    return {
        "encoder": sum(p.numel() for p in objective.student.parameters()),
        "heads": sum(p.numel() for p in trained),
        "teacher": sum(p.numel() for p in frozen),
    }


def _bytes(x: torch.Tensor | nn.Parameter) -> int:
    return x.numel() * x.element_size()
