"""Does the stream feed training? The same training from JPEG shards, and on one batch that never leaves the device.

    python benchmarks/feed.py [RECIPE] [KEY=VALUE …] [--quick] [--json] [--images TAR_OR_FOLDER]

Both run in one process with one engine, in turn; what they differ by is what reading, decoding and cropping cost the
training. Without a recipe: DINO's ViT-S/16 at 224 pixels on a GPU, a small one on a CPU.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Row, Sample
from benchmarks.photographs import prepare
from selfsight.console import say
from selfsight.errors import UserError

AIM = 0.95
RECIPE = "dino/vit_small_patch16_imagenet"
ON_GPU = ("batch_size=256", "stream.workers=auto")  # the recipe's own are for 16 GPUs
ON_CPU = (
    *("batch_size=8", "stream.workers=auto", "encoder.name=vit_tiny_patch16_224", "encoder.args={depth: 2}"),
    *("objective.out_dim=1024", "objective.hidden_dim=256", "objective.local_crops_number=2"),
)
STEPS = 10**6  # of the run that is pretended, which nobody waits for
LEAST_IMAGES, BATCHES = 512, 4  # of the corpus: at least so many, and so many batches


def main() -> None:
    args = parser().parse_args()
    # DeepSpeed and its like write to stdout; there it is only the table.
    answers = os.dup(1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="selfsight-feed-") as folder:
        training = Training(args, Path(folder))
        found = training.race(args.segments or (2 if args.quick else 5), seconds=3.0 if args.quick else 10.0)
        here = harness.machine()
    sys.stdout.flush()
    os.dup2(answers, 1)
    recipe = training.recipe
    here |= {"recipe": f"{recipe.objective_name} {recipe.encoder.name}, batch {recipe.batch_size}"}
    here |= {"precision": recipe.training.precision, "crops": recipe.stream.crops, "workers": recipe.stream.workers}
    harness.report("feed", here, rows(found), args)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    harness.arguments(parser)
    parser.add_argument("recipe", nargs="?", help=f"default: {RECIPE}, made small on a CPU")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe; corpus=DIR takes its images")
    parser.add_argument("--images", type=Path, help="tar or folder of JPEG photographs (default: some are drawn)")
    parser.add_argument("--segments", type=int, help="how often each of the two is measured")
    return parser


def rows(found: dict[str, list[Sample]]) -> list[Row]:
    still, fed = (Row(name, harness.middle(samples, "rate"), "images/s") for name, samples in found.items())
    table = [still, fed]
    harness.compare(table, fed.name, still.name, AIM)
    return table


class Training:
    """A run as `pretrain` puts it together, without its checkpoints and logs."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        import torch

        from selfsight import objectives
        from selfsight.stream.views import Views
        from selfsight.training import cluster, resolve
        from selfsight.training.engine import Engine
        from selfsight.training.feed import names_images, open_feed

        self.cluster = cluster.join()
        if self.cluster.world_size > 1:
            raise UserError("this benchmark runs in one process: start it with python, not torchrun")
        default = () if args.recipe else ON_GPU if self.cluster.device.type == "cuda" else ON_CPU
        self.recipe = recipe = resolve.load(args.recipe or RECIPE, [*default, *args.overrides])
        resolve.check(recipe)
        if not names_images(recipe):
            n = max(LEAST_IMAGES, BATCHES * recipe.batch_size)
            recipe.corpus = str(prepare(args.images, work, n, shards=8)[1])
        feed = open_feed(recipe)
        resolve.settle(recipe, chunks=feed.chunks)
        torch.manual_seed(recipe.seed)
        kind = objectives.find(recipe.objective_name)
        config = kind.Config(**{k: v for k, v in recipe.objective.items() if k != "name"})
        objective = kind(config, recipe.encoder, self.cluster.collective())
        self.steps_per_epoch = feed.n // recipe.batch_size
        views = Views(objective.views(), seed=recipe.seed)
        self.loader = feed.loader(views, run=work, cluster=self.cluster, start_step=0, total_steps=STEPS)
        self.engine = Engine(objective, recipe, self.cluster)
        self.done = 0

    def race(self, segments: int, *, seconds: float) -> dict[str, list[Sample]]:
        """Each of the two in turn, `segments` times, for about `seconds` each."""
        fed = self._batches()
        still = next(fed)
        say("warming up")
        self._steps(_forever(still), 2)
        began = time.perf_counter()
        self._steps(_forever(still), 2)
        steps = max(2, round(2 * seconds / (time.perf_counter() - began)))
        # What was read ahead while training stood on its own batch must not count for the stream.
        ahead = 2 * (self.recipe.stream.workers or 0) + 1
        found: dict[str, list[Sample]] = {"one batch kept on the device": [], "fed from JPEG shards": []}
        for segment in range(segments):
            say(f"segment {segment + 1} of {segments}: {steps} steps each")
            for name, batches in zip(found, (_forever(still), fed), strict=True):
                self._steps(batches, min(ahead, steps))
                found[name].append(harness.timed(lambda batches=batches: self._steps(batches, steps)))
        return found

    def _batches(self) -> Iterator[list[dict[str, Any]]]:
        """Steps of micro-batches on the device, as the training loop makes them."""
        from selfsight.stream.loader import to_device

        for step in self.loader:
            yield [to_device(batch, self.cluster.device, self.loader.views.spec) for batch in step]

    def _steps(self, batches: Iterator[list[dict[str, Any]]], count: int) -> int:
        """Trains `count` steps; returns the number of images, once the device has finished with them."""
        import torch

        from selfsight.objectives import Progress

        for _ in range(count):
            self.engine.step(next(batches), Progress(self.done, self.steps_per_epoch, STEPS))
            self.done += 1
        if self.cluster.device.type == "cuda":
            torch.cuda.synchronize()
        return count * self.recipe.batch_size


def _forever(batch: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while True:
        yield batch


if __name__ == "__main__":
    harness.run(main)
