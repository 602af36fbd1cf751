"""What a recipe leaves to be chosen, settled before a run begins; and what may change when a run goes on."""

import re
from math import inf
from pathlib import Path
from typing import Any

import torch

from selfsight import objectives
from selfsight import recipe as recipes
from selfsight.errors import UserError, check_range
from selfsight.machine import available_cores
from selfsight.recipe import AUTO, Recipe
from selfsight.stream.loader import MAX_WORKERS, auto_workers
from selfsight.stream.order import auto_lanes
from selfsight.training import auto, optim, schedules, trackers
from selfsight.training.costs.hardware import RESERVED
from selfsight.weights.run import FREE

LEAST = {
    "batch_size": 1,
    "stream.lanes": 1,
    "stream.window": 1,
    "stream.workers": 0,
    "training.accumulation": 1,
    "training.log_every": 1,
    "training.checkpoint_every": 1,
    "training.keep": 1,
    "training.patience": 1,
    "training.returns": 0,
    "probe.every": 1,
    "probe.images": 1,
    "training.keep_every": 1,
}


def load(source: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A recipe whose objective's keys are those of the objective it names."""
    return recipes.load(source, overrides, objective=lambda name: objectives.find(name).Config)


def check(recipe: Recipe) -> None:
    """Raises UserError for values that no hardware and no corpus can make right."""
    auto.check(recipe)
    training = recipe.training
    if training.zero not in (0, 1, 2, 3):
        raise UserError(f"training.zero is {training.zero}: choose 0, 1, 2 or 3")
    if training.offload and not training.zero:
        raise UserError("training.offload moves what ZeRO shards to the CPU: set training.zero to 1, 2 or 3 with it")
    if training.zero == 3 and recipe.encoder.compile:
        raise UserError(
            "encoder.compile wants the weights whole and training.zero=3 gathers them one layer at a time: "
            "leave encoder.compile out, or set training.zero=2"
        )
    if training.precision == "fp16":
        raise UserError(
            "training.precision=fp16 would need its loss scaled, and skips steps until the scale fits, which the order "
            "of samples and the schedules would have to follow: choose bf16, which has fp32's range"
        )
    if training.precision not in (None, "fp32", "bf16"):
        raise UserError(f"training.precision is {training.precision!r}: choose fp32, bf16 or auto")
    if not 0 < recipe.epochs < inf:
        raise UserError(f"epochs is {recipe.epochs:g}: give a positive number")
    optim.check(recipe.optimizer)
    if "optimizer.warmup_epochs" not in recipe.asked:
        schedules.check(recipe.optimizer, recipe.epochs)
    trackers.check(recipe.log)
    for key, low in LEAST.items():
        if (value := recipe.get(key)) is not None:
            check_range(key, value, low)
    if recipe.stream.crops not in (None, "cpu", "device"):
        raise UserError(f"stream.crops is {recipe.stream.crops!r}: choose cpu, device or auto")
    if recipe.stream.decode not in ("cpu", "device"):
        raise UserError(f"stream.decode is {recipe.stream.decode!r}: choose cpu or device")
    if (best := training.keep_best) is not None:
        if not re.fullmatch(r"(min|max) \S+", best):
            raise UserError(f"training.keep_best is {best!r}: say max or min and a number of the log, as 'min loss'")
        if " probe/" in best and recipe.probe.corpus is None:
            raise UserError(f"training.keep_best={best!r} wants probes: add probe.corpus=DIR")
    check_range("stream.max_damaged", recipe.stream.max_damaged, 0, 1)
    check_range("seed", recipe.seed, 0, 2**63 - 1)


def settle(
    recipe: Recipe,
    *,
    chunks: int | None = None,
    images: int | None = None,
    sharing: int = 1,
    ranks: int = 1,
    memory: int | None = None,
) -> None:
    """Gives every key that says "auto" its value. `chunks` is the number of chunks of the smallest part and `images`
    that of an epoch, where they are known; `sharing` that of the ranks that share the cores of this one; `memory` the
    bytes of the smallest GPU, None on a CPU."""
    cuda = torch.cuda.is_available()
    if recipe.training.precision is None:
        if cuda and torch.cuda.is_bf16_supported(including_emulation=False):
            recipe.set("training.precision", "bf16", f"{torch.cuda.get_device_name()} computes in bf16")
        else:
            why = "this GPU has no bf16" if cuda else "no GPU; set bf16 for AVX512-BF16 and large ViTs"
            recipe.set("training.precision", "fp32", why)
    if recipe.asked:
        usable = memory * (1 - RESERVED) if memory is not None else None
        auto.settle(recipe, images=images, ranks=ranks, memory=usable)
        check(recipe)
    if recipe.training.zero == 3 and recipe.encoder.compile is None:
        recipe.set("encoder.compile", False, "ZeRO-3 gathers weights one layer at a time")
    if recipe.stream.workers is None:
        workers = auto_workers(sharing)
        why = f"{available_cores()} cores for {sharing} rank(s), less one each for training; {MAX_WORKERS} at most"
        recipe.set("stream.workers", workers, why)
    if recipe.stream.crops is None:
        recipe.set("stream.crops", "device" if cuda else "cpu", "where training runs" if cuda else "no GPU")
    if recipe.encoder.compile is None:
        recipe.set("encoder.compile", cuda, "where training runs, it pays" if cuda else "no GPU")
    if recipe.stream.decode == "device" and recipe.stream.crops == "cpu":
        raise UserError("stream.decode=device wants the crops on the device, too: set stream.crops=device")
    if recipe.stream.lanes is None and chunks is not None:
        lanes = auto_lanes(recipe.batch_size, chunks)
        why = f"divides batches of {recipe.batch_size}; the corpus's {chunks} chunks keep so many filled"
        recipe.set("stream.lanes", lanes, why)
    if recipe.probe.corpus and recipe.probe.every is None:
        recipe.provenance["probe.every"] = f"{AUTO}: as often as 2 % of the time allow, measured while training goes on"


def adopt(recipe: Recipe, path: Path) -> None:
    """What says "auto" now and changes what is learnt stays as it was settled when the run began, whose resolved recipe
    is at `path`."""
    first = load(str(path))
    unsaid = [] if recipe.weights_sha256 else ["weights_sha256"]
    for key in (*recipe.autos, *unsaid):
        if key not in FREE and (value := first.get(key)) is not None:
            recipe.set(key, value, "as when this run began")


def compare(recipe: Recipe, path: Path) -> None:
    """Raises UserError naming the keys in which the recipe at `path` differs, but for the `FREE` ones: the corpus is
    compared by its id, not by where it lies."""
    old, new = _flat(load(str(path)).to_dict()), _flat(recipe.to_dict())
    if recipe.weights and old.get("weights_sha256") is None:
        raise UserError(
            f"{path.parent} was begun without weights={recipe.weights}: give another output, or leave it out"
        )
    differ = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in FREE]
    if differ:
        changes = ", ".join(f"{k} was {old.get(k)} and is {new.get(k)}" for k in differ)
        raise UserError(
            f"{path.parent} was begun with another recipe ({changes}): give another output, or the values it began with"
        )


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in node.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
