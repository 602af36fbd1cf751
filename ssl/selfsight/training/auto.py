"""Values that a recipe leaves to be found: "auto". In: the corpus's size, the ranks, a GPU's memory. Out: the recipe
with values and, in its provenance, their reasons. The rules of an objective's own keys are the objective's.

What depends on nothing comes first: the batch, from which the number of steps follows, from which follows the rest.
"""

from dataclasses import replace

from selfsight import objectives
from selfsight.errors import UserError
from selfsight.objectives import Progress
from selfsight.objectives.base import Scale
from selfsight.recipe import Recipe
from selfsight.training.costs import per_gpu, trace
from selfsight.training.costs.plan import build, weigh

LARGEST = 256  # images on a rank: the recipes' learning rates are for such batches
ZERO = 4  # stages


def settle(recipe: Recipe, *, images: int | None, ranks: int = 1, memory: float | None = None) -> None:
    """Settles the keys in `recipe.autos`. `images` of an epoch, or None where no corpus is named; `memory` is what
    training may take of a GPU, None on a CPU. Raises UserError for a key that has no rule."""
    if not recipe.autos:
        return
    if images is None:
        raise UserError(f'{", ".join(recipe.autos)} say "auto", which follows from the corpus: add corpus=DIR')
    wanted = set(recipe.autos)
    if "batch_size" in wanted:
        recipe.set("batch_size", *_batch_size(recipe, images, ranks, memory))
    if "training.zero" in wanted:
        recipe.set("training.zero", *_zero(recipe, ranks, memory))
    if "optimizer.warmup_epochs" in wanted:
        recipe.set("optimizer.warmup_epochs", min(10.0, recipe.epochs / 10), "a tenth of the epochs, 10 at most")
    steps_per_epoch = max(images // recipe.batch_size, 1)
    scale = Scale(images, steps_per_epoch, max(1, round(recipe.epochs * steps_per_epoch)))
    rules = objectives.find(recipe.objective_name).auto(scale)
    for key in sorted(wanted - {"batch_size", "training.zero", "optimizer.warmup_epochs"}):
        name = key.removeprefix("objective.")
        if name == key or name not in rules:
            known = ["batch_size", "training.zero", "optimizer.warmup_epochs", *(f"objective.{k}" for k in rules)]
            raise UserError(f'{key} cannot be "auto": give it a value; these can be: {", ".join(known)}')
        recipe.set(key, *rules[name])
    recipe.autos = []


def _batch_size(recipe: Recipe, images: int, ranks: int, memory: float | None) -> tuple[int, str]:
    """The largest power of two on each rank that leaves eight batches in an epoch and fits into the GPU."""
    parts = ranks * recipe.training.accumulation
    each, why = LARGEST, f"{LARGEST} images on each of {ranks} ranks"
    if memory is not None:
        fitting = _fitting(recipe, ranks, memory)
        if fitting < each:
            each, why = fitting, f"the most that fits into {memory / 2**30:.0f} GiB of GPU memory"
    while each > 1 and each * parts * 8 > images:
        each, why = each // 2, f"eight batches in an epoch of {images:,} images"
    return each * parts, why


def _fitting(recipe: Recipe, ranks: int, memory: float) -> int:
    """Images of a micro-batch, a power of two: what a step takes grows in proportion from 4 to 8 on."""
    stage = int(ranks > 1) if "training.zero" in recipe.autos else recipe.training.zero
    small, large = (_bytes(recipe, stage, n, ranks) for n in (4, 8))
    each = (large - small) / 4
    n = int((memory - large) / each) + 8 if memory > large else 1
    return 2 ** max(n.bit_length() - 1, 0)


def _zero(recipe: Recipe, ranks: int, memory: float | None) -> tuple[int, str]:
    if ranks == 1:
        return 0, "one process has nothing to share"
    if memory is None:
        return 1, "the optimiser's state, shared by the ranks, costs no time"
    micro_batch = recipe.batch_size // (ranks * recipe.training.accumulation)
    for stage in range(ZERO):
        if _bytes(recipe, stage, micro_batch, ranks) <= memory:
            return stage, f"the lowest stage that fits into {memory / 2**30:.0f} GiB of GPU memory"
    return ZERO - 1, "no stage fits: raise training.accumulation"


def _bytes(recipe: Recipe, stage: int, micro_batch: int, ranks: int) -> float:
    objective = build(replace(recipe, encoder=replace(recipe.encoder, compile=False)))
    weights = weigh(objective, recipe)
    step = trace(objective, micro_batch, Progress(1, 2, 4), bf16=recipe.training.precision == "bf16")
    return per_gpu(stage, ranks, weights, step, accumulation=recipe.training.accumulation).total
