"""The whole training step, as training takes it, beside the same step built from timm's blocks in the published loops.

    python benchmarks/train_step.py RECIPE [KEY=VALUE …] [--quick] [--json] [--precision fp32 bf16] [--only NAME …]

Contestants: ours, in each precision, eager and (on a GPU, or with --compile) compiled; for dino and mae "timm", with
torch's fused attention, and "reference", which multiplies the attention matrix out as the papers' own models do.
Each is a process with a batch of random pixels at hand: what reading and cropping cost is feed.py's
business. "data" is the way of uint8 crops to the device and their normalisation, "optimiser" gradient norms, clipping
and AdamW, "EMA" the teacher's step and the centre's. Peak memory is what the step needed above the imported libraries.
The model's FLOPs are those of the objective's matrix products, counted once, without anything computed again.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import harness
from benchmarks.harness import Absent, Rival, Row, Work
from selfsight.console import say
from selfsight.errors import UserError
from selfsight.machine import available_cores

PARTS = ("data", "forward", "backward", "optimiser", "EMA")
REFERENCE = "reference"
AIMS = {"fp32": 1.2, "bf16": 2.5}  # on a CPU, times the reference in fp32
AIM_H200 = 3000.0  # images/s on one
MIDDLE = 500, 1, 1000  # of training, as a Progress: no warm-up, nothing is frozen any more
# Dense TFLOP/s as the vendors give them, of tensor cores in bf16 and of what torch does in fp32 unless told otherwise.
PEAKS = {
    "B200": {"bf16": 2250, "fp32": 75},
    "H200": {"bf16": 989, "fp32": 67},
    "H100 PCIe": {"bf16": 756, "fp32": 51},
    "H100": {"bf16": 989, "fp32": 67},
    "A100": {"bf16": 312, "fp32": 19.5},
    "L40S": {"bf16": 362, "fp32": 91.6},
    "L4": {"bf16": 121, "fp32": 30.3},
    "A10": {"bf16": 125, "fp32": 31.2},
    "RTX 4090": {"bf16": 165, "fp32": 82.6},
}


class Contestant(NamedTuple):
    who: str  # ours, timm (its blocks with fused attention) or reference (the attention matrix multiplied out)
    precision: str
    compiled: bool = False

    @property
    def name(self) -> str:
        return " ".join([self.who, self.precision, *(["compiled"] if self.compiled else [])])


def main() -> None:
    args = parser().parse_args()
    if args.rival:
        return harness.serve(lambda job: prepare(args, contestants(args)[job]))
    _recipe(args)  # a mistake in it is said once, here
    names = contestants(args)
    threads = args.threads or available_cores()
    here = harness.machine(("deepspeed", "timm"))
    flops = model_flops(_recipe(args))
    peaks = {precision: peak(precision, here["gpu"], threads) for precision in args.precision}
    with ExitStack() as stack:
        again = [sys.executable, __file__, *sys.argv[1:], "--rival"]
        rivals = {name: Rival(name, again, threads=threads) for name in names}
        for rival in rivals.values():
            stack.callback(rival.close)
        say(f"measuring {', '.join(names)}")
        repeats = args.repeats or (2 if args.quick else 5)
        found = harness.interleave({name: partial(rival.run, name) for name, rival in rivals.items()}, repeats)
    here |= {"threads": threads, "recipe": " ".join([args.recipe, *args.overrides])}
    here |= {"GFLOP per image": f"{flops / 1e9:.3g}"}
    place = f"train_step {_recipe(args).objective_name}"
    harness.report("train_step", here, rows(found, names, here["gpu"], flops, peaks), args, place)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    harness.arguments(parser)
    parser.add_argument("recipe", help="file, or name of a recipe that comes with selfsight")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe: batch_size=8, …")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants whose names begin so")
    parser.add_argument("--compile", action="store_true", help="ours compiled, too (on a GPU it always is)")
    parser.add_argument("--steps", type=int, help="in one measurement (default: some seconds' worth)")
    parser.add_argument("--repeats", type=int, help="measurements of each (default 5, quick 2)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: all cores)")
    parser.add_argument("--rival", action="store_true", help=argparse.SUPPRESS)  # how this script starts itself
    return parser


def contestants(args: argparse.Namespace) -> dict[str, Contestant]:
    import torch

    from benchmarks.step_peers import PEERS

    compiled = (False, True) if args.compile or torch.cuda.is_available() else (False,)
    every = [Contestant("ours", precision, how) for how in compiled for precision in args.precision]
    if _recipe(args).objective_name in PEERS:
        every += [Contestant(who, precision) for who in ("timm", REFERENCE) for precision in args.precision]
    for name in args.only or ():
        if not any(c.name.startswith(name) for c in every):
            raise UserError(f"no contestant's name begins with {name!r}: there are {', '.join(c.name for c in every)}")
    wanted = tuple(args.only or ("",))
    return {c.name: c for c in every if c.name.startswith(wanted)}


def rows(
    found: dict[str, Any],
    names: dict[str, Contestant],
    gpu: str | None,
    flops: float,
    peaks: dict[str, float | None],
) -> list[Row]:
    table = []
    for name, samples in found.items():
        if isinstance(samples, Absent):
            table.append(Row(name, None, "images/s", note=str(samples)))
            continue
        rate, limit = harness.middle(samples, "rate"), peaks[names[name].precision]
        more: dict[str, float | None] = {f"{p} ms": median(1e3 * s.more.get(p, 0.0) for s in samples) for p in PARTS}
        more["peak MiB"] = max((s.more["memory"] / 2**20 for s in samples if "memory" in s.more), default=None)
        more["of peak FLOP/s"] = flops * rate / limit if limit else None
        table.append(Row(name, rate, "images/s", more=more))
    against = Contestant(REFERENCE, "fp32").name
    for row in table:
        c = names[row.name]
        if against in found:
            aim = AIMS[c.precision] if c.who == "ours" and not c.compiled and not gpu else None
            harness.compare(table, row.name, against, aim)
        elif c == Contestant("ours", "bf16", True) and "H200" in (gpu or ""):
            row.aim = AIM_H200
    return table


def model_flops(recipe: Any) -> float:
    """Of forward and backward pass, per image, counted on the CPU on two of them, as the plain blocks compute it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from selfsight.objectives import Progress

    recipe.encoder.compile, recipe.encoder.checkpointing, recipe.encoder.drop_path_rate = False, "none", 0.0
    objective = _objective(recipe)
    (batch,) = pixels(objective.views(), 2, 1, torch.device("cpu"))()
    with FlopCounterMode(display=False) as counter:
        objective(batch, Progress(*MIDDLE)).loss.backward()
    return counter.get_total_flops() / 2


def peak(precision: str, gpu: str | None, threads: int) -> float | None:
    """FLOP/s of the machine in matrix products: the vendor's on a GPU, on a CPU what the best of some reaches."""
    import torch

    if gpu:
        known = next((tflops for name, tflops in PEAKS.items() if name in gpu), None)
        return known[precision] * 1e12 if known else None
    torch.set_num_threads(threads)
    n, best = 2048, 0.0
    a = torch.randn(n, n, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    for _ in range(8):
        began = time.perf_counter()
        a @ a
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


# From here on: in the process of one contestant.


class Parts:
    """When each part of a step ended, on the device's own clock."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self._marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        if not self.cuda:
            self._marks.append((name, time.perf_counter()))
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((name, event))

    def seconds(self) -> dict[str, float]:
        """Of each part since the first mark, summed, once the device has finished; forgets them."""
        spent = dict.fromkeys(PARTS, 0.0)
        for (_, begin), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            if name:
                spent[name] += begin.elapsed_time(end) / 1e3 if self.cuda else end - begin
        self._marks.clear()
        return spent


def prepare(args: argparse.Namespace, contestant: Contestant) -> Work:
    """The work of a contestant: some steps; how many images they saw, seconds of each part of one, and bytes."""
    import torch

    from selfsight.training import cluster, resolve

    torch.set_num_threads(args.threads or available_cores())
    joined = cluster.join()
    if joined.world_size > 1:
        raise UserError("this benchmark runs in one process: start it with python, not torchrun")
    recipe = _recipe(args)
    recipe.training.precision, recipe.encoder.compile = contestant.precision, contestant.compiled
    resolve.settle(recipe)
    torch.manual_seed(recipe.seed)
    cuda = joined.device.type == "cuda"
    before, parts = resident(reset=True), Parts(cuda)
    step = ours(recipe, joined, parts) if contestant.who == "ours" else peer(contestant, recipe, joined, parts)
    if contestant.compiled:
        step()
    step()  # allocators and kernels have warmed up
    began = time.perf_counter()
    step()
    _finish(cuda)
    steps = args.steps or max(2, round((2.0 if args.quick else 6.0) / (time.perf_counter() - began)))

    def work() -> tuple[int, dict[str, float]]:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        parts.seconds()
        for _ in range(steps):
            step()
        _finish(cuda)
        more = {name: seconds / steps for name, seconds in parts.seconds().items()}
        memory = torch.cuda.max_memory_allocated() if cuda else resident() - before
        if cuda:
            torch.cuda.empty_cache()  # the others run on the same GPU
        return steps * recipe.batch_size, {**more, **({"memory": memory} if memory > 0 else {})}

    return work


def ours(recipe: Any, joined: Any, parts: Parts) -> Callable[[], None]:
    """A step of the trainer's engine."""
    from selfsight.objectives import Progress
    from selfsight.training.engine import Engine

    objective = _objective(recipe, joined.collective())
    batches = pixels(objective.views(), recipe.batch_size, recipe.training.accumulation, joined.device)
    progress = Progress(*MIDDLE)
    engine = Engine(objective, recipe, joined)

    def backward(loss: Any, run: Callable = engine.engine.backward) -> None:
        run(loss)
        parts.mark("backward")

    def follow(momentum: float, run: Callable = engine.teacher.follow) -> None:
        parts.mark("optimiser")
        run(momentum)

    engine.engine.register_forward_hook(lambda *_: parts.mark("forward"))
    engine.engine.backward, engine.teacher.follow = backward, follow

    def step() -> None:
        parts.mark("")
        ready = batches()
        parts.mark("data")
        done = engine.step(ready, progress)
        parts.mark("EMA")
        if not done.taken:
            raise Absent(f"a step was refused: its loss is {done.loss}")

    return step


def peer(contestant: Contestant, recipe: Any, joined: Any, parts: Parts) -> Callable[[], None]:
    from benchmarks import step_peers

    batches = pixels(_objective(recipe).views(), recipe.batch_size, 1, joined.device)
    bf16, fused = contestant.precision == "bf16", contestant.who == "timm"
    take = step_peers.build(recipe, joined.device, bf16=bf16, fused_attention=fused, mark=parts.mark)

    def step() -> None:
        parts.mark("")
        (batch,) = batches()
        parts.mark("data")
        take(batch)

    return step


def pixels(spec: Any, batch_size: int, accumulation: int, device: Any) -> Callable[[], list[dict[str, Any]]]:
    """A function that brings the micro-batches of a step to the device: the same random ones every time."""
    import torch

    from selfsight.stream.loader import to_device

    n = batch_size // accumulation
    batch = {c.name: torch.randint(256, (c.count, n, 3, c.size, c.size), dtype=torch.uint8) for c in spec.crops}
    batch |= {noise.name: torch.rand(n, noise.length) for noise in spec.noise}
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return lambda: [to_device(batch, device, spec) for _ in range(accumulation)]


def resident(*, reset: bool = False) -> int:
    """The most bytes of memory that this process has held since the last reset; 0 where Linux does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _objective(recipe: Any, collective: Any = None) -> Any:
    from selfsight import objectives

    kind = objectives.find(recipe.objective_name)
    config = kind.Config(**{k: v for k, v in recipe.objective.items() if k != "name"})
    return kind(config, recipe.encoder, collective)


def _recipe(args: argparse.Namespace) -> Any:
    from selfsight.training import resolve

    recipe = resolve.load(args.recipe, args.overrides)
    resolve.check(recipe)
    return recipe


def _finish(cuda: bool) -> None:
    if cuda:
        import torch

        torch.cuda.synchronize()


if __name__ == "__main__":
    harness.run(main)
