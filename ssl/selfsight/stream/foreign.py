"""Un-indexed WebDataset shards → batches, through the webdataset library's own pipeline and with its promises only.

For shards that are to be tried before they are adopted. What goes in is URLs as the library takes them (a `pipe:` one
runs its command in a shell), what comes out are the steps of a `StepLoader`; all that a corpus promises beyond that
does not hold, and the first iteration says so.
"""

import itertools
import os
import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from selfsight.console import say
from selfsight.errors import UserError
from selfsight.shards.decode import EXTENSIONS
from selfsight.stream.loader import _heed_parent_only, auto_workers
from selfsight.stream.views import Views

WEAKER_PROMISES = (
    "these shards have no index: a resumed run sees other samples, an epoch may miss or repeat some, another number of"
    " processes or workers gives another order, damage can end a shard unnoticed; selfsight corpus adopt mends all that"
)
UNKNOWN = -1  # the ordinal of a sample that has none
SHUFFLED_SHARDS, SHUFFLED_SAMPLES = 1000, 1000  # how many the library holds to draw from
SUFFIXES = {*EXTENSIONS.values(), "jpeg", "jpe", "jfif", "tiff", "pgm", "pbm", "pnm", "j2k"}


class ForeignLoader:
    """Iterates over the steps start_step … total_steps − 1 of one rank, like a `StepLoader`, over foreign shards.

    Each step is a list of `accumulation` micro-batches: dicts of crops uint8 (count, b, 3, size, size), noise float32
    (b, length) and "ordinal" int64 (b,), all −1, with b = batch_size / world_size / accumulation. Every image of a
    sample is one of the batch's. With the same seed, shards, processes and workers the steps are the same; a start in
    the middle begins anew, in another order.

    Raises UserError when the batch does not divide, when there are fewer shards than processes × workers, and, unless
    `skip_undecodable`, when an image does not decode.
    """

    def __init__(
        self,
        urls: str | list[str],
        views: Views,
        *,
        batch_size: int,
        total_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int | None = None,
        accumulation: int = 1,
        seed: int = 0,
        skip_undecodable: bool = False,
    ) -> None:
        from webdataset.shardlists import expand_urls

        if batch_size % (world_size * accumulation):
            raise UserError(
                f"batch_size {batch_size} is no multiple of {world_size} processes × accumulation {accumulation}:"
                " change batch_size or training.accumulation"
            )
        shards = [u for pattern in ([urls] if isinstance(urls, str) else urls) for u in expand_urls(pattern)]
        if workers is None:
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
            workers = min(auto_workers(ranks_here), len(shards) // world_size)
        if len(shards) < world_size * max(workers, 1):
            raise UserError(
                f"{len(shards)} shards are too few for {world_size} processes × {max(workers, 1)} workers:"
                " lower stream.workers, or adopt them with selfsight corpus adopt"
            )
        self.workers, self.rank = workers, rank
        self.start_step, self.total_steps = start_step, total_steps
        self._steps = _Steps(
            shards[rank::world_size], views, batch_size // world_size, accumulation, rank, world_size,
            (seed, start_step), skip_undecodable,
        )  # fmt: skip

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        if self.rank == 0:
            say(WEAKER_PROMISES)
        loader = DataLoader(
            self._steps,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=2 if self.workers else None,
            pin_memory=torch.cuda.is_available(),
            # Without one of its own the loader would draw its workers' seeds from the trainer's generator.
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=_heed_parent_only,
        )
        try:
            for step in itertools.islice(loader, len(self)):
                if isinstance(step, str):
                    raise UserError(step)
                yield [{name: tensor[part] for name, tensor in step.items()} for part in range(self._steps.parts)]
        except RuntimeError as e:
            if "DataLoader worker" not in str(e):
                raise
            raise UserError(
                "a process that decodes images died: lower stream.workers if memory or /dev/shm is short"
            ) from e


class _Steps(IterableDataset):
    """Without end: this rank's part of every step, the micro-batches as the first dimension; or the sentence of a
    user's mistake, because a raised one would arrive wrapped in its traceback."""

    def __init__(
        self,
        shards: list[str],
        views: Views,
        share: int,
        parts: int,
        rank: int,
        world_size: int,
        seed: tuple[int, int],
        skip_undecodable: bool,
    ) -> None:
        self.shards, self.views, self.share, self.parts = shards, views, share, parts
        self.rank, self.world_size, self.seed, self.skip_undecodable = rank, world_size, seed, skip_undecodable

    def __iter__(self) -> Iterator[dict[str, Tensor] | str]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        images = self._images(number, workers)
        size = self.share // self.parts
        for step in itertools.count(number, workers):
            shapes = self.views.shapes(size)
            arrays = {name: np.empty((self.parts, *shape), dtype) for name, (shape, dtype) in shapes.items()}
            try:
                for at in range(self.share):
                    # No two samples of a run share their random numbers, on whatever rank they are.
                    drawn = (step * self.world_size + self.rank) * self.share + at
                    self.views.into(next(images), drawn, 0, {n: a[at // size] for n, a in arrays.items()}, at % size)
            except UserError as e:
                yield str(e)
                return
            ordinals = torch.full((self.parts, size), UNKNOWN, dtype=torch.int64)
            yield {name: torch.from_numpy(array) for name, array in arrays.items()} | {"ordinal": ordinals}

    def _images(self, number: int, workers: int) -> Iterator:
        """Decoded images of this worker's shards, epoch after epoch, shuffled anew in each."""
        from webdataset.compat import WebDataset
        from webdataset.filters import detshuffle

        seed = int(np.random.SeedSequence([*self.seed, self.rank, number]).generate_state(1)[0])
        samples = WebDataset(
            self.shards[number::workers],
            shardshuffle=SHUFFLED_SHARDS,
            detshuffle=True,
            seed=seed,
            nodesplitter=None,  # both are done
            workersplitter=None,
            empty_check=False,
        ).compose(detshuffle(SHUFFLED_SAMPLES, seed=seed))
        while True:
            seen = 0
            try:
                for sample in samples:
                    for name, data in sample.items():
                        if name.rpartition(".")[2] not in SUFFIXES or name.startswith("__"):
                            continue
                        try:
                            image = self.views.decode(data)
                        except ValueError as e:
                            if self.skip_undecodable:
                                continue
                            raise UserError(
                                f"{sample['__key__']}.{name} in {sample['__url__']} does not decode ({e}):"
                                " adopt the shards with selfsight corpus adopt, which leaves such images out"
                            ) from e
                        seen += 1
                        yield image
            except UserError:
                raise
            except Exception as e:  # of the library and all that it opens shards with
                what = re.sub(r"\s+", " ", str(e)) or type(e).__name__
                raise UserError(f"webdataset cannot read the shards ({what}): mend or leave out the one named") from e
            if not seen:
                raise UserError(f"no images in {', '.join(self.shards[number::workers][:3])}: name other shards")
