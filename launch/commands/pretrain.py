"""`selfsight pretrain CONFIG [key=value …]`: starts a run, or continues it where it was stopped.

Exit codes: 0 finished; 85 stopped by a signal with a checkpoint written, for a batch script to requeue on; 1 training
diverged; 2 a mistake of the user.
"""

import argparse
import os
import sys

STOPPED = 85


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "pretrain",
        help="train an encoder on a corpus, or continue a run",
        description="Trains as CONFIG says: a YAML file, or a recipe that comes with selfsight such as "
        "dino/vit_small_patch16_imagenet. A run continues by itself where it was stopped. SIGINT, SIGTERM and SIGUSR1 "
        "finish the step in hand, write a checkpoint and exit with 85. On several GPUs: "
        "torchrun --nproc-per-node N -m launch pretrain CONFIG …",
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as corpus=DIR output=RUN epochs=10")
    parser.add_argument("--print", action="store_true", help="show the resolved recipe with its origins, and stop")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from selfsight.training import resolve

    recipe = resolve.load(args.config, args.overrides)
    if args.print:
        return _print(recipe)

    from selfsight.errors import UserError
    from selfsight.training import Diverged, Stopped, pretrain

    try:
        path = pretrain(recipe)
    except Stopped as e:
        print(f"selfsight: {e}", file=sys.stderr)
        return STOPPED
    except Diverged as e:
        print(f"selfsight: {e}", file=sys.stderr)
        return 1
    except UserError:
        if os.environ.get("RANK", "0") != "0":  # said by rank 0
            return 2
        raise
    if os.environ.get("RANK", "0") == "0":
        print(path)
    return 0


def _print(recipe) -> int:
    from selfsight.shards.corpus import Corpus
    from selfsight.training import resolve

    resolve.check(recipe)
    chunks = len(Corpus.open(recipe.corpus).chunks) if recipe.corpus else None
    resolve.settle(recipe, chunks=chunks)
    print(recipe.to_yaml(), end="")
    return 0
