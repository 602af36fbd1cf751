"""`selfsight plan CONFIG [key=value …]`: what a run costs, before it is started."""

import argparse
import json
from typing import Any

GIB = 1 << 30


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="say what a run costs before it is started: memory, time, traffic",
        description="Builds CONFIG's objective without memory, imagines one step of it, and says what a run takes: "
        "parameters, memory on a GPU under each ZeRO stage, arithmetic, GPU-hours, checkpoints, traffic. No GPU is "
        "needed. The rate follows from a share of the GPU's peak that a published run has reached, which is named.",
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="as for pretrain; corpus=DIR counts its images"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that share the batch (default: 1)")
    parser.add_argument(
        "--gpu",
        default="h100",
        metavar="NAME",
        help="h200, h100, a100-80, a100-40, v100-32, l40s, a10g, rtx4090, or GIB:TFLOPS (default: h100)",
    )
    parser.add_argument(
        "--utilisation", type=float, metavar="SHARE", help="of the GPU's peak, instead of the known one"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from selfsight.errors import check_range
    from selfsight.training import auto, resolve
    from selfsight.training.costs import find_gpu, plan

    check_range("--gpus", args.gpus, 1)
    if args.utilisation is not None:
        check_range("--utilisation", args.utilisation, 0.001, 1)
    gpu = find_gpu(args.gpu)
    recipe = resolve.load(args.config, args.overrides)
    resolve.check(recipe)
    images = _images(recipe)
    recipe.training.precision = recipe.training.precision or "bf16"  # that of the GPU, not of this machine
    auto.settle(recipe, images=images.n if images else None, ranks=args.gpus, memory=gpu.usable)
    made = plan(recipe, gpu, args.gpus, images=images, utilisation=args.utilisation)
    if args.json:
        print(json.dumps(_json(made)))
    else:
        _show(made, args.config)
    return 0


def _images(recipe) -> Any:
    """Of what the recipe names, or None."""
    from selfsight.shards import Corpus
    from selfsight.training.costs.plan import Images
    from selfsight.training.feed import names_images, open_feed

    if not names_images(recipe):
        return None
    n = open_feed(recipe).n
    named = [recipe.corpus] if recipe.corpus else [part.corpus for part in recipe.mixture]
    corpora = [Corpus.open(path) for path in named]
    total = sum(c.n for c in corpora)
    if not total:
        return Images(n, 110_000.0, "shards without an index, 110 kB an image assumed")
    return Images(n, sum(c.manifest.image_bytes for c in corpora) / total, ", ".join(map(str, named)))


def _json(plan) -> dict[str, Any]:
    training = plan.recipe.training
    return {
        "parameters": plan.parameters,
        "gpu": plan.gpu.name,
        "gpus": plan.ranks,
        "zero": training.zero,
        "precision": _precision(plan),
        "checkpointing": plan.recipe.encoder.checkpointing,
        "micro_batch": plan.micro_batch,
        "memory": {
            how: {str(stage): {**vars(memory), "total": memory.total} for stage, memory in stages.items()}
            for how, stages in plan.memory.items()
        },
        "usable_memory": plan.gpu.usable,
        "flops_per_image": plan.step.flops_per_image,
        "utilisation": plan.utilisation,
        "images_per_second": plan.images_per_second,
        "total_steps": plan.total_steps,
        "days": plan.seconds / 86400,
        "gpu_hours": plan.gpu_hours,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "shard_bytes_per_second": plan.shard_traffic,
    }


def _show(plan, config: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    recipe, training = plan.recipe, plan.recipe.training
    console = Console(width=100, highlight=False)
    console.print(
        f"{config}: {recipe.objective_name} with {recipe.encoder.name}\n"
        f"batches of {recipe.batch_size:,} on {plan.ranks} × {plan.gpu.name}, {plan.micro_batch} images at a time, "
        f"{_precision(plan)}",
        soft_wrap=True,
    )
    title = f"GiB on each GPU, of which {plan.gpu.usable / GIB:.1f} can be used; this recipe's line is bold"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    names = ("weights", "teacher", "optimizer", "gradients", "buckets", "activations")
    for name in ("ZeRO", "recomputed"):
        table.add_column(name)
    for name in (*names, "total"):
        table.add_column(name, justify="right")
    for how, stages in plan.memory.items():
        for stage, memory in stages.items():
            own = stage == training.zero and how == recipe.encoder.checkpointing
            parts = [f"{getattr(memory, name) / GIB:.2f}" for name in names]
            total = f"{memory.total / GIB:.2f}" + ("" if memory.total <= plan.gpu.usable else " !")
            table.add_row(str(stage), how, *parts, total, style="bold" if own else None)
    console.print(table)
    for name, value in _facts(plan).items():
        console.print(f"  {name:<13}{value}", soft_wrap=True)
    if plan.chosen.total > plan.gpu.usable:
        console.print(f"\n{_missing(plan)}")


def _precision(plan) -> str:
    return plan.gpu.half if plan.recipe.training.precision == "bf16" else plan.recipe.training.precision


def _facts(plan) -> dict[str, str]:
    peak = plan.gpu.peak(plan.recipe.training.precision == "bf16")
    count = "  ".join(f"{name} {_millions(n)}" for name, n in plan.parameters.items() if n)
    days = plan.seconds / 86400
    more = {}
    if _precision(plan) == "fp16":
        more["precision"] = "fp16 is the published runs'; selfsight trains in fp32 on this GPU, which is slower"
    if plan.host_bytes:
        more["host"] = f"{plan.host_bytes / GIB:,.1f} GiB of its memory for each GPU, where training.offload puts them"
    return {
        "parameters": count,
        "arithmetic": f"{plan.step.flops_per_image / 1e9:,.1f} GFLOP an image, forward and backward, all views",
        "rate": f"{plan.images_per_second:,.0f} images/s at {plan.utilisation:.0%} of {peak / 1e12:,.0f} TFLOP/s a GPU",
        "": f"({_source(plan)})",
        "images": f"{plan.images.n:,} an epoch, {plan.images.bytes_each / 1e3:,.0f} kB each ({plan.images.source})",
        "run": f"{plan.total_steps:,} steps, {_time(days)}, {plan.gpu_hours:,.1f} GPU-hours",
        "checkpoint": f"{plan.checkpoint_bytes / GIB:,.2f} GiB",
        "shards": f"{plan.shard_traffic / 1e6:,.1f} MB/s read by all GPUs together",
        **more,
    }


def _source(plan) -> str:
    if plan.utilisation != plan.gpu.utilisation:
        return "as --utilisation says"
    return plan.gpu.source if plan.gpu.source != "assumed" else "assumed: no measured run is known; set --utilisation"


def _missing(plan) -> str:
    """One sentence: how much is missing, and the keys to turn."""
    missing = (plan.chosen.total - plan.gpu.usable) / GIB
    turns = []
    for how, stages in plan.memory.items():
        stage = next((s for s, memory in stages.items() if memory.total <= plan.gpu.usable), None)
        if stage is not None:
            turns.append(f"training.zero={stage} with encoder.checkpointing={how}")
    return f"{missing:.1f} GiB are missing on each GPU: try " + (
        " or ".join(turns) if turns else "a larger training.accumulation or more GPUs"
    )


def _millions(n: int) -> str:
    return f"{n / 1e6:,.1f} M" if n < 1e9 else f"{n / 1e9:,.2f} B"


def _time(days: float) -> str:
    return f"{days:,.1f} days" if days >= 2 else f"{24 * days:,.1f} hours"
