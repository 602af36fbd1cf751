"""What each objective has learnt after equal compute: kNN on CIFAR-10 of one small encoder, trained by all of them.

    python benchmarks/objectives.py [--quick] [--json] [--tflop N] [--only NAME …] [--train TAR] [--test TAR]

Every objective found starts from its own CIFAR-10 recipe and gets the same encoder, batches, optimiser and number of
FLOPs: those of all matrix products of its training steps, teachers, heads and backward passes included. What a run that
short needs otherwise stands in `SHORT` and `OWN`. A run that is finished is not repeated, one that was stopped goes on.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Row
from eval_probes.bench import Bench
from eval_probes.extraction import How
from eval_probes.knn import KNN
from eval_probes.results import ResultsStore, Score
from eval_probes.subject import PIXELS
from selfsight import objectives
from selfsight.console import say
from selfsight.corpus import build
from selfsight.errors import UserError
from selfsight.objectives import Progress
from selfsight.recipe import Recipe
from selfsight.shards.corpus import Corpus
from selfsight.training import Diverged, pretrain, resolve
from selfsight.weights.run import exports, newest_export

CORPORA = harness.ROOT.parent / "shared/corpora"
RECIPE = "{}/vit_tiny_patch4_cifar10"  # where each objective starts from
ENCODER = "simclr/vit_micro_patch8_cifar10"  # whose encoder all of them train
BATCH = 64
# Their loss never touches the class token: the mean patch token is their feature, the class token that of all others.
PATCHES = ("ijepa", "mae", "simmim")
TOKENS = {"cls": KNN(), "avg": KNN(tokens="avg")}
LIGHTLY = {"k": 200, "ks": (200,), "temperature": 0.1}  # the vote of lightly's CIFAR-10 table

# Keys of an objective's section, wherever it has them: hundreds of steps instead of 200 epochs, on 16 patches.
SHORT: dict[str, Any] = {
    "hidden_dim": 256,  # heads that do not cost more than the encoder
    "bottleneck_dim": 64,
    "local_crops_number": 0,  # of 16 pixels they would have four patches
    "momentum_teacher": 0.95,  # the teacher remembers 20 steps at first
    "final_momentum_teacher": 0.95,
    "teacher_temp": 0.03,  # sharp from the start: there is no time to begin slowly
    "warmup_teacher_temp_epochs": 0,
    "freeze_last_layer": 0,
}
# Prototypes: 65536 and 4096 are for more images than such a run ever sees.
PROTOTYPES = {"out_dim": 256}
OWN: dict[str, dict[str, Any]] = {
    "barlow_twins": {"out_dim": 256},
    "byol": {"out_dim": 64},
    "data2vec2": {
        "average_top_k_layers": 3,
        "mask_length": 1,
        "decoder_dim": 64,
        "decoder_layers": 2,
        "ema_decay": 0.95,
        "ema_end_decay": 0.99,
        "ema_anneal_end_step": 100,
    },
    "dino": PROTOTYPES,
    "dinov2": PROTOTYPES | {"patch_out_dim": 256},
    "dinov3": PROTOTYPES | {"patch_out_dim": 256, "gram_start": None},  # Gram anchoring is for what drifts later
    "distillation": PROTOTYPES | {"patch_out_dim": 256, "teacher_drop_path_rate": 0.0},
    "ibot": PROTOTYPES,
    "ijepa": {"pred_emb_dim": 48, "pred_depth": 2},
    "mae": {"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 2},
    "moco_v3": {"out_dim": 64},
    "msn": {"num_proto": 128, "output_dim": 64, "focal_views": 2},
    "simclr": {"out_dim": 64, "temperature": 0.2},
    "swav": {"nmb_prototypes": 128, "out_dim": 64, "queue_length": 0, "freeze_prototypes_niters": 0},
    "vicreg": {"out_dim": 256},
}
OPTIMIZER = {"base_lr": 0.004, "schedule": "mae_cosine", "weight_decay": 0.05, "betas": [0.9, 0.95], "clip": 3.0}
WARMUP = 0.1  # of the run


def main() -> None:
    args = parser().parse_args()
    args.tflop = args.tflop or (0.01 if args.quick else 1.0)
    if unknown := set(args.only or ()) - set(objectives.available()):
        raise UserError(f"there is no objective {unknown.pop()!r}: --only knows {', '.join(objectives.available())}")
    train, test = (_built(source, args.work / split) for split, source in (("train", args.train), ("test", args.test)))
    here = harness.machine(("timm", "deepspeed"))
    rows = list(measure(args, train, test))
    encoder = resolve.load(ENCODER).encoder
    here |= {"TFLOP each": args.tflop, "batch": BATCH, "encoder": json.dumps(encoder.args).replace('"', "")}
    here |= {"test images": Corpus.open(test).n, "bank": Corpus.open(train).n}
    harness.report("objectives", here, rows, args)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    harness.arguments(parser)
    parser.add_argument("--tflop", type=float, help="of training, for each objective (default 1, quick 0.01)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these objectives")
    parser.add_argument("--train", type=Path, default=CORPORA / "cifar10-train.tar", help="images; the bank, too")
    parser.add_argument("--test", type=Path, default=CORPORA / "cifar10-test.tar", help="images to test on")
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"), help="where runs and features are kept")
    return parser


def measure(args: argparse.Namespace, train: Path, test: Path) -> Iterator[Row]:
    """The pixels, the encoder as it begins, and each objective's."""
    knn = partial(scores, args, train, test)
    yield row("raw pixels", knn(PIXELS, "cls"), "cls")
    began = None
    for name in args.only or objectives.available():
        recipe, more = planned(name, args.tflop, train, args.work / f"{args.tflop:g} TFLOP" / name)
        try:
            run = pretrain(recipe)
        except Diverged as e:
            yield Row(name, None, "%", more=more, note=str(e))
            continue
        token = "avg" if name in PATCHES else "cls"
        if token == "cls" and began is None:  # not all begin alike: those of `PATCHES` initialise the encoder anew
            began = exports(run)[0]
            yield row("untrained encoder", knn(began, token), token)
        yield row(name, knn(newest_export(run), token), token, more)


def planned(name: str, tflop: float, train: Path, run: Path) -> tuple[Recipe, dict[str, float]]:
    """The recipe of so much training, and what it comes to: steps, passes over the images, FLOPs of an image."""
    recipe = adapted(name, train, run, epochs=1.0)
    flops = step_flops(recipe)
    per_epoch = Corpus.open(train).n // BATCH
    steps = max(1, round(tflop * 1e12 / flops))
    figures = {"steps": steps, "epochs": steps / per_epoch, "GFLOP/image": flops / BATCH / 1e9}
    return adapted(name, train, run, epochs=steps / per_epoch), figures


def adapted(name: str, train: Path, run: Path, *, epochs: float) -> Recipe:
    """The objective's CIFAR-10 recipe with what all share here, and with what so short a run needs."""
    encoder = asdict(resolve.load(ENCODER).encoder)
    source = RECIPE.format(name)
    known = resolve.load(source).objective
    own = {key: value for key, value in SHORT.items() if key in known} | OWN.get(name, {})
    if "teacher_args" in known:  # a live teacher, twice as deep
        own["teacher_args"] = {**encoder["args"], "depth": 2 * encoder["args"]["depth"]}
    given = {
        "corpus": train,
        "output": run,
        "batch_size": BATCH,
        "epochs": epochs,
        "encoder": encoder,
        "optimizer": {**OPTIMIZER, "warmup_epochs": WARMUP * epochs},
        "training": {"zero": 0, "checkpoint_every": 10**6, "log_every": 50},
        **{f"objective.{key}": value for key, value in own.items()},
    }
    return resolve.load(source, [f"{k}={v if isinstance(v, Path) else json.dumps(v)}" for k, v in given.items()])


def step_flops(recipe: Recipe) -> int:
    """Of one training step: forward and backward passes of everything that the objective runs."""
    from torch.utils.flop_counter import FlopCounterMode

    kind = objectives.find(recipe.objective_name)
    torch.manual_seed(0)
    objective = kind(kind.Config(**{k: v for k, v in recipe.objective.items() if k != "name"}), recipe.encoder)
    spec = objective.views()
    n = recipe.batch_size
    batch = {c.name: torch.randn(c.count, n, 3, c.size, c.size) for c in spec.crops}
    batch |= {noise.name: torch.rand(n, noise.length) for noise in spec.noise}
    with FlopCounterMode(display=False) as counter:
        objective(batch, Progress(0, 1, 1)).loss.backward()
    return counter.get_total_flops()


def scores(args: argparse.Namespace, train: Path, test: Path, weights: str | Path, token: str) -> dict[str, Score]:
    """kNN on either token by DINO's vote, and on this one by lightly's ("k=200"); what was kept earlier, it takes."""
    store = ResultsStore(args.work / "results.sqlite")
    bench = Bench.open(weights, train, test, How(cache=str(args.work / "features"), batch_size=64))
    votes = {**({token: TOKENS[token]} if weights == PIXELS else TOKENS), "k=200": replace(TOKENS[token], **LIGHTLY)}
    at = bench.subject, bench.need("train").id, bench.need("test").id
    store.add(*bench.run([vote for vote in votes.values() if not store.find(vote, *at)]))
    return {name: store.find(vote, *at)[0] for name, vote in votes.items()}


def row(name: str, found: dict[str, Score], token: str, more: dict[str, float] | None = None) -> Row:
    """Per cent: of `token` with its 95 % interval, by lightly's vote, and of the other token where there is one."""
    first = found[token]
    shown = {"from": first.low, "to": first.high, "k=200": found["k=200"].value}
    for other in found.keys() & TOKENS.keys() - {token}:
        shown["other token"] = found[other].value
    columns = {key: 100 * value for key, value in shown.items()}
    return Row(name, 100 * first.value, f"% {token}", more=columns | (more or {}))


def _built(source: Path, out: Path) -> Path:
    if not source.exists():
        raise UserError(f"{source} does not exist: give CIFAR-10 as folders or tars of images, --train and --test")
    say(f"{out}: a corpus of {source}")
    build([source], out)
    return out


if __name__ == "__main__":
    harness.run(main)
