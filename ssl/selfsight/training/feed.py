"""Recipe → where its images come from: corpora that keep every promise, or shards without an index, which do not."""

import hashlib
import json
from fractions import Fraction
from pathlib import Path
from typing import Protocol

from selfsight.console import say
from selfsight.errors import UserError, check_range
from selfsight.recipe import PartConfig, Recipe
from selfsight.shards import Corpus
from selfsight.shards.selection import read_selection
from selfsight.stream.foreign import ForeignLoader
from selfsight.stream.loader import StepLoader
from selfsight.stream.mixture import Mixture, Part, identity
from selfsight.stream.quarantine import Quarantine
from selfsight.stream.views import Views
from selfsight.training.cluster import Cluster


class Feed(Protocol):
    @property
    def n(self) -> int: ...  # images in an epoch

    @property
    def id(self) -> str: ...  # what a checkpoint must agree on

    @property
    def chunks(self) -> int | None: ...  # of the smallest part

    def loader(
        self, views: Views, *, run: Path, cluster: Cluster, start_step: int, total_steps: int
    ) -> StepLoader | ForeignLoader: ...


def open_feed(recipe: Recipe) -> Feed:
    """Opens what the recipe names. Raises UserError where it is missing, or too small for a batch."""
    named = [key for key, given in _sources(recipe).items() if given]
    if len(named) != 1:
        raise UserError(
            f"{' and '.join(named)} name images to train on: set one of them"
            if named
            else "training needs images: add corpus=DIR"
        )
    return UnindexedFeed(recipe) if recipe.unindexed.shards else CorpusFeed(recipe)


def names_images(recipe: Recipe) -> bool:
    return any(_sources(recipe).values())


def _sources(recipe: Recipe) -> dict[str, object]:
    return {"corpus": recipe.corpus, "mixture": recipe.mixture, "unindexed.shards": recipe.unindexed.shards}


class CorpusFeed:
    """One corpus, or several."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.mixture and recipe.selection:
            raise UserError("selection goes with corpus: in a mixture, give each part its own")
        named = recipe.mixture or [PartConfig(str(recipe.corpus), recipe.selection)]
        self.recipe, self.parts = recipe, [_part(given, _least(recipe)) for given in named]
        self.n, self.id = sum(part.n for part in self.parts), identity(self.parts)
        self.chunks = min(part.chunks for part in self.parts)

    def loader(self, views: Views, *, run: Path, cluster: Cluster, start_step: int, total_steps: int) -> StepLoader:
        recipe, stream = self.recipe, self.recipe.stream
        assert stream.lanes is not None
        here = -(-stream.lanes * cluster.ranks_here // cluster.world_size)
        for part in self.parts:
            # Twice: while a window is read, the next one is fetched.
            if cluster.rank == 0 and (warning := part.corpus.too_large_for_cache(here, 2 * stream.window)):
                say(warning)
        mixture = Mixture(
            self.parts, batch_size=recipe.batch_size, lanes=stream.lanes, window=stream.window, seed=recipe.seed
        )
        return StepLoader(
            mixture,
            views,
            rank=cluster.rank,
            world_size=cluster.world_size,
            start_step=start_step,
            total_steps=total_steps,
            workers=stream.workers,
            accumulation=recipe.training.accumulation,
            staged=stream.crops == "device",
            encoded=stream.decode == "device",
            quarantine=Quarantine(run / "quarantine" / f"{cluster.rank:05d}.jsonl", limit=stream.max_damaged),
        )


class UnindexedFeed:
    """Foreign shards through the webdataset library, as `selfsight.stream.foreign` explains."""

    chunks: int | None = None

    def __init__(self, recipe: Recipe) -> None:
        if recipe.unindexed.images is None:
            raise UserError("shards without an index do not say what an epoch is: set unindexed.images to their images")
        if recipe.stream.decode == "device":
            raise UserError(
                "shards without an index are decoded on the CPU: set stream.decode=cpu, or adopt them with selfsight "
                "corpus adopt"
            )
        check_range("unindexed.images", recipe.unindexed.images, _least(recipe))
        self.recipe, self.n = recipe, recipe.unindexed.images
        self.id = hashlib.sha256(json.dumps(recipe.unindexed.shards).encode()).hexdigest()

    def loader(self, views: Views, *, run: Path, cluster: Cluster, start_step: int, total_steps: int) -> ForeignLoader:
        recipe = self.recipe
        return ForeignLoader(
            recipe.unindexed.shards,
            views,
            batch_size=recipe.batch_size,
            total_steps=total_steps,
            start_step=start_step,
            rank=cluster.rank,
            world_size=cluster.world_size,
            workers=recipe.stream.workers,
            accumulation=recipe.training.accumulation,
            seed=recipe.seed,
        )


def _least(recipe: Recipe) -> int:
    """How many images there have to be."""
    return 1 if "batch_size" in recipe.asked else recipe.batch_size


def _part(given: PartConfig, batch_size: int) -> Part:
    check_range(f"the weight of {given.corpus}", given.weight, 0)
    check_range(f"the share alone of {given.corpus}", given.alone, 0, 1)
    corpus = Corpus.open(given.corpus)
    chosen = None if given.selection is None else read_selection(corpus, given.selection)
    # Through text: 0.1 means a tenth, not the float next to it.
    part = Part(corpus, chosen, Fraction(str(given.weight)), Fraction(str(given.alone)))
    if part.n < batch_size:
        raise UserError(
            f"{given.corpus} has fewer images ({part.n}) than a batch ({batch_size}): "
            f"lower batch_size to {part.n} or less"
        )
    return part
