"""How near `selfsight plan` comes to the memory that training takes: real steps of the real engine, beside what was
predicted for them.

    python -m benchmarks.memory [--quick] [--json]

On a CPU a peak is the kernel's high-water mark of resident memory over two steps, above what the process held before
the objective was built; allocations are mapped one by one, so that what is freed is given back. On a GPU it is torch's
own count. `more` has both in MiB.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Row

MIB = 1 << 20
AIM = 0.10  # of the measured peak
ENCODER = ("encoder.img_size=128", "encoder.args={patch_size: 16, embed_dim: 192, depth: 6, num_heads: 3}")
DINO = (
    *("quickstart/dino", *ENCODER, "objective.global_crops_size=128", "objective.out_dim=8192", "batch_size=32"),
    *("objective.local_crops_number=4", "objective.local_crops_size=64", "objective.freeze_last_layer=0"),
)
MAE = ("quickstart/mae", *ENCODER, "objective.crop_size=128", "batch_size=64")
CASES = {
    "DINO": DINO,
    "DINO, batch 8": (*DINO, "batch_size=8"),
    "DINO, ZeRO 1": (*DINO, "training.zero=1"),
    "DINO, recomputing": (*DINO, "encoder.checkpointing=full"),
    "DINO, recomputing some": (*DINO, "encoder.checkpointing=selective"),
    "DINO, bf16": (*DINO, "training.precision=bf16"),
    "MAE": MAE,
    "MAE, 4 micro-batches": (*MAE, "training.accumulation=4"),
    "MAE, ZeRO 1, 4 micro-batches": (*MAE, "training.accumulation=4", "training.zero=1"),
    "MAE, recomputing": (*MAE, "encoder.checkpointing=full"),
    "MAE, bf16": (*MAE, "training.precision=bf16"),
}
QUICK = ("DINO", "DINO, ZeRO 1", "MAE, recomputing", "MAE, 4 micro-batches")


def measure(names: tuple[str, ...]) -> dict[str, tuple[int, float]]:
    """(measured, predicted) peaks in bytes of these cases, from one process of their own."""
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--here", *names],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1"},
        cwd=harness.ROOT,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(ran.stdout.splitlines()[-1])


def here(names: list[str]) -> dict[str, tuple[int, float]]:
    for zero in (0, 1):  # what the first step of a process loads is no part of a later one's
        peak((*MAE, "encoder.args.depth=1", "encoder.args.embed_dim=48", "batch_size=2", f"training.zero={zero}"))
    return {name: (peak(CASES[name]), predicted(CASES[name])) for name in names}


def peak(arguments: tuple[str, ...]) -> int:
    """The most bytes that two steps take, with all that is kept between them."""
    import torch

    from selfsight import objectives
    from selfsight.objectives import Progress
    from selfsight.training import cluster, resolve
    from selfsight.training.engine import Engine

    recipe = resolve.load(arguments[0], arguments[1:])
    joined = cluster.join()
    micro_batch = recipe.batch_size // recipe.training.accumulation
    gc.collect()
    before = _resident("VmRSS")
    kind = objectives.find(recipe.objective_name)
    objective = kind(kind.Config(**{k: v for k, v in recipe.objective.items() if k != "name"}), recipe.encoder)
    engine, spec = Engine(objective, recipe, joined), objective.views()

    def step(i: int) -> None:
        batches = [
            {c.name: torch.randn(c.count, micro_batch, 3, c.size, c.size) for c in spec.crops}
            | {n.name: torch.rand(micro_batch, n.length) for n in spec.noise}
            for _ in range(recipe.training.accumulation)
        ]
        batches = [{k: v.to(joined.device) for k, v in batch.items()} for batch in batches]
        assert engine.step(batches, Progress(i, 10, 20)).taken

    step(0)
    if joined.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    for i in (1, 2):
        step(i)
    if joined.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM") - before


def predicted(arguments: tuple[str, ...]) -> float:
    """What `selfsight plan` counts for the same."""
    import torch

    from selfsight.objectives import Progress
    from selfsight.training import resolve
    from selfsight.training.costs.memory import per_gpu
    from selfsight.training.costs.plan import build, weigh
    from selfsight.training.costs.trace import trace

    recipe = resolve.load(arguments[0], arguments[1:])
    objective, accumulation = build(recipe), recipe.training.accumulation
    weights = weigh(objective, recipe)
    step = trace(
        objective,
        recipe.batch_size // accumulation,
        Progress(1, 10, 20),
        bf16=recipe.training.precision == "bf16",
    )
    touched = not torch.cuda.is_available()
    return per_gpu(recipe.training.zero, 1, weights, step, accumulation=accumulation, touched_only=touched).total


def _resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--here", nargs="*", help=argparse.SUPPRESS)
    harness.arguments(parser)
    args = parser.parse_args()
    if args.here is not None:
        print(json.dumps(here(args.here)))
        return
    names = QUICK if args.quick else tuple(CASES)
    rows = []
    for name, (measured, expected) in measure(names).items():
        more = {"measured, MiB": measured / MIB, "planned, MiB": expected / MIB}
        rows.append(Row(name, abs(expected - measured) / measured, "of the peak", aim=AIM, more=more))
    harness.report("memory", harness.machine(("torch", "deepspeed")), rows, args)


if __name__ == "__main__":
    harness.run(main)
