"""`selfsight pretrain CONFIG [key=value …]`: starts a run, or continues it where it was stopped.

Exit codes: 0 finished; 85 stopped by a signal with a checkpoint written, for a batch script to requeue on; 1 training
diverged; 2 a mistake of the user.
"""

import argparse
import os
import sys

from selfsight.errors import UserError

STOPPED = 85


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "pretrain",
        help="train an encoder on a corpus, or continue a run",
        description="Trains as CONFIG says: a YAML file, or a recipe that comes with selfsight such as "
        "dino/vit_small_patch16_imagenet. A run continues by itself where it was stopped. SIGINT, SIGTERM and SIGUSR1 "
        "finish the step in hand, write a checkpoint and exit with 85. On several GPUs: "
        "torchrun --nproc-per-node N -m launch pretrain CONFIG … (torchrun itself then exits with 1). "
        "A run may go on with another number of processes, or another training.zero.",
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

    import torch

    from eval_probes.online import open_probes
    from selfsight.training import AgreedError, Diverged, Stopped, pretrain

    try:
        path = pretrain(recipe, probes=open_probes)
    except (Stopped, Diverged, AgreedError) as e:  # the same on every rank
        if _first():
            print(f"selfsight: {e}", file=sys.stderr)
        return STOPPED if isinstance(e, Stopped) else 1 if isinstance(e, Diverged) else 2
    except torch.OutOfMemoryError as e:
        raise UserError(
            "the GPU's memory does not hold this: raise training.accumulation, which cuts the same batch into smaller "
            f"parts, or lower batch_size ({str(e).split('. ')[0]})"
        ) from e
    except RuntimeError as e:
        if "gloo/transport" not in str(e) and not isinstance(e, torch.distributed.DistBackendError):
            raise
        raise UserError(
            "another process of this job has ended, and its own message says why; the same command continues from the "
            "newest checkpoint"
        ) from e
    if _first():
        print(path)
    return 0


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print(recipe) -> int:
    import torch

    from selfsight.training import resolve
    from selfsight.training.cluster import ranks
    from selfsight.training.feed import names_images, open_feed

    resolve.check(recipe)
    feed = open_feed(recipe) if names_images(recipe) else None
    resolve.settle(
        recipe,
        chunks=feed.chunks if feed else None,
        images=feed.n if feed else None,
        ranks=int(ranks(dict(os.environ)).get("WORLD_SIZE", 1)),
        memory=torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None,
    )
    print(recipe.to_yaml(), end="")
    return 0
