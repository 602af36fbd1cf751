"""Values that a recipe leaves to be chosen: "auto". In: the corpus's size, the ranks, a GPU's memory. Out: the recipe
with values and, in its provenance, their reasons. What follows from the machine alone is in `resolve`; the rules of an
objective's own keys are the objective's.

What depends on nothing comes first: the batch, from which the number of steps follows, from which follows the rest.
"""

from dataclasses import replace

from selfsight import objectives
from selfsight.errors import UserError
from selfsight.objectives import Progress
from selfsight.objectives.base import Scale
from selfsight.recipe import AUTO, AUTOMATIC, Recipe
from selfsight.training.costs import per_gpu, trace
from selfsight.training.costs.memory import STAGES
from selfsight.training.costs.plan import build, weigh

LARGEST = 256  # images on a rank: the recipes' learning rates are for such batches
OWN = ("batch_size", "training.zero", "optimizer.warmup_epochs")


def check(recipe: Recipe) -> None:
    """Raises UserError for a key that says "auto" and has no rule."""
    names = objectives.find(recipe.objective_name).auto(Scale(1, 1, 1))
    known = (*OWN, *(f"objective.{name}" for name in names))
    for key in recipe.asked:
        if key not in known:
            able = ", ".join((*known, *AUTOMATIC))
            raise UserError(
                f'{key} cannot be "{AUTO}": give it a value; with {recipe.objective_name} these can: {able}'
            )


def settle(recipe: Recipe, *, images: int | None, ranks: int = 1, memory: float | None = None) -> None:
    """Settles the keys in `recipe.asked`. `images` of an epoch, or None where no corpus is named; `memory` is what
    training may take of a GPU, None on a CPU. Raises UserError for a key that has no rule, or no corpus to follow."""
    check(recipe)
    if not (asked := tuple(recipe.asked)):
        return
    if images is None:
        raise UserError(f'{", ".join(asked)} say "{AUTO}", which follows from the corpus: add corpus=DIR')
    if "batch_size" in asked:
        recipe.set("batch_size", *_batch_size(recipe, images, ranks, memory))
    if "training.zero" in asked:
        recipe.set("training.zero", *_zero(recipe, ranks, memory))
    if "optimizer.warmup_epochs" in asked:
        recipe.set("optimizer.warmup_epochs", min(10.0, recipe.epochs / 10), "a tenth of the epochs, 10 at most")
    steps_per_epoch = max(images // recipe.batch_size, 1)
    scale = Scale(images, steps_per_epoch, max(1, round(recipe.epochs * steps_per_epoch)))
    rules = objectives.find(recipe.objective_name).auto(scale)
    for key in recipe.asked.copy():
        recipe.set(key, *rules[key.removeprefix("objective.")])


def _batch_size(recipe: Recipe, images: int, ranks: int, memory: float | None) -> tuple[int, str]:
    """The largest power of two on each rank that leaves eight batches in an epoch and fits into the GPU."""
    parts = ranks * recipe.training.accumulation
    each, why = LARGEST, f"{LARGEST} images at a time on each process"
    if memory is not None:
        fitting = _fitting(recipe, ranks, memory)
        if fitting < each:
            each, why = fitting, f"{fitting} images at a time fit into {memory / 2**30:.0f} GiB of GPU memory"
    while each > 1 and each * parts * 8 > images:
        each, why = each // 2, f"a power of two on each process, and at least eight batches in {images:,} images"
    return each * parts, why


def _fitting(recipe: Recipe, ranks: int, memory: float) -> int:
    """Images of a micro-batch, a power of two: what a step takes grows in proportion from 4 to 8 on."""
    stage = int(ranks > 1) if "training.zero" in recipe.asked else recipe.training.zero
    small, large = (_bytes(recipe, n, ranks)[stage] for n in (4, 8))
    each = (large - small) / 4
    n = int((memory - large) / each) + 8 if memory > large else 1
    return 2 ** max(n.bit_length() - 1, 0)


def _zero(recipe: Recipe, ranks: int, memory: float | None) -> tuple[int, str]:
    if recipe.training.offload and (ranks == 1 or memory is None):
        return 1, "the lowest stage that training.offload goes with"
    if ranks == 1:
        return 0, "one process has nobody to share with"
    if memory is None:
        return 1, "sharing the optimiser's state among the processes costs no time"
    taken = _bytes(recipe, recipe.batch_size // (ranks * recipe.training.accumulation), ranks)
    for stage in STAGES[int(recipe.training.offload) :]:
        if taken[stage] <= memory:
            return stage, f"the lowest stage that fits into {memory / 2**30:.0f} GiB of GPU memory"
    return STAGES[-1], "no stage fits: raise training.accumulation"


def _bytes(recipe: Recipe, micro_batch: int, ranks: int) -> list[float]:
    """On each GPU, under each stage."""
    objective, training = build(replace(recipe, encoder=replace(recipe.encoder, compile=False))), recipe.training
    weights = weigh(objective, recipe)
    step = trace(objective, micro_batch, Progress(1, 2, 4), bf16=training.precision == "bf16")
    return [
        per_gpu(stage, ranks, weights, step, accumulation=training.accumulation, offload=training.offload).total
        for stage in STAGES
    ]
