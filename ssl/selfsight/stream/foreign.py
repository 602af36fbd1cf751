"""Un-indexed WebDataset shards → batches, through the webdataset library's own pipeline and with its promises only.

For shards that are to be tried before they are adopted. What goes in is URLs as the library takes them (a `pipe:` one
runs its command in a shell), what comes out are the steps of a `StepLoader`; all that a corpus promises beyond that
does not hold, and every iteration begins with saying so.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from selfsight.console import say
from selfsight.errors import UserError
from selfsight.shards.decode import EXTENSIONS
from selfsight.stream.loader import auto_workers
from selfsight.stream.views import Views

WEAKER_PROMISES = (
    "these shards have no index: a resumed run sees other samples, an epoch may miss or repeat some, another number of"
    " processes gives another order, damage can end a shard unnoticed; selfsight corpus adopt mends all that"
)
UNKNOWN = -1  # the ordinal of a sample that has none
SHUFFLED_SHARDS, SHUFFLED_SAMPLES = 1000, 1000  # how many the library holds to draw from
AHEAD = 4  # steps in flight
STAND_INS = 1000  # tried for one image that does not decode
SUFFIXES = {*EXTENSIONS.values(), "jpeg", "jpe", "jfif", "tiff", "pgm", "pbm", "pnm", "j2k"}

_TORCH = {np.uint8: torch.uint8, np.float32: torch.float32}
Raw = tuple[str, bytes]  # (name, for messages; image file)


class ForeignLoader:
    """Iterates over the steps start_step … total_steps − 1 of one rank, like a `StepLoader`, over foreign shards.

    Each step is a list of `accumulation` micro-batches: dicts of crops uint8 (count, b, 3, size, size), noise float32
    (b, length), "part" and "ordinal" int64 (b,), all 0 and all −1, with b = batch_size / world_size / accumulation.
    Every image of a sample is one of the batch's. One thread reads, `workers` others decode (None: `auto_workers`, 0:
    all in this thread). The same seed, shards and processes give the same steps; a start in the middle begins anew, in
    another order. `skip_undecodable` puts a later image in the place of one that does not decode.

    Raises UserError when the batch does not divide, when there are fewer shards than processes, when they cannot be
    read, and when an image does not decode.
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
        if len(shards) < world_size:
            raise UserError(
                f"{len(shards)} shards are too few for {world_size} processes: adopt them with selfsight corpus adopt"
            )
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        self.workers = auto_workers(ranks_here) if workers is None else workers
        self.start_step, self.total_steps = start_step, total_steps
        self.views, self.accumulation, self.skip_undecodable = views, accumulation, skip_undecodable
        self.rank, self.world_size = rank, world_size
        self._shards, self._share = shards[rank::world_size], batch_size // world_size
        self._seed = int(np.random.SeedSequence([seed, start_step, rank]).generate_state(1)[0])

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def whereabouts(self, batch: dict[str, Tensor]) -> list[str]:
        """Nothing: without an index no image of a batch is known by name."""
        return []

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        if self.rank == 0:
            say(WEAKER_PROMISES)
        images, pinned = _images(self._shards, self._seed), torch.cuda.is_available()
        reader: Executor = ThreadPoolExecutor(1, "read") if self.workers else _Here()
        decoders: Executor = ThreadPoolExecutor(self.workers, "decode") if self.workers else _Here()
        in_flight: deque[tuple[dict[str, Tensor], Future]] = deque()
        try:
            for t in range(self.start_step, self.total_steps):
                shapes = self.views.shapes(self._share // self.accumulation)
                tensors = {
                    name: torch.empty((self.accumulation, *shape), dtype=_TORCH[kind], pin_memory=pinned)
                    for name, (shape, kind) in shapes.items()
                }
                in_flight.append((tensors, reader.submit(self._begin, t, tensors, images, decoders)))
                if len(in_flight) == AHEAD or not self.workers:
                    yield self._finish(*in_flight.popleft(), images, reader)
            while in_flight:
                yield self._finish(*in_flight.popleft(), images, reader)
        finally:
            for pool in (reader, decoders):
                pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, t: int, tensors: dict[str, Tensor], images: Iterator[Raw], decoders: Executor) -> list[Future]:
        """In the reading thread: hands out the images of a step to be decoded."""
        first = (t * self.world_size + self.rank) * self._share
        return [decoders.submit(self._fill, _next(images), first + at, at, tensors) for at in range(self._share)]

    def _fill(self, raw: Raw, drawn: int, at: int, tensors: dict[str, Tensor]) -> tuple[int, int] | None:
        """Writes the views of an image to place `at`; where it is to be skipped, (drawn, at) again.

        `drawn` stands for the ordinal: no two samples of a run share their random numbers, on whatever rank they are.
        """
        name, data = raw
        try:
            image = self.views.decode(data)
        except ValueError as e:
            if self.skip_undecodable:
                return drawn, at
            raise UserError(
                f"{name} does not decode ({e}): adopt the shards with selfsight corpus adopt, which leaves such images"
                " out"
            ) from e
        part, i = divmod(at, self._share // self.accumulation)
        self.views.into(image, drawn, 0, {n: tensor[part].numpy() for n, tensor in tensors.items()}, i)
        return None

    def _finish(
        self, tensors: dict[str, Tensor], begun: Future, images: Iterator[Raw], reader: Executor
    ) -> list[dict[str, Tensor]]:
        skipped = [place for task in begun.result() if (place := task.result()) is not None]
        for drawn, at in skipped:
            for _ in range(STAND_INS):
                if self._fill(reader.submit(_next, images).result(), drawn, at, tensors) is None:
                    break
            else:
                raise UserError(f"{STAND_INS} images of {self._shards[0]} … do not decode: name other shards")
        shape = self.accumulation, self._share // self.accumulation
        tensors = tensors | {
            "part": torch.zeros(shape, dtype=torch.int64),
            "ordinal": torch.full(shape, UNKNOWN, dtype=torch.int64),
        }
        return [{name: tensor[part] for name, tensor in tensors.items()} for part in range(self.accumulation)]


class _Here(Executor):
    """Does at once, in the thread that asks, what is submitted."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _next(images: Iterator[Raw]) -> Raw:
    try:
        return next(images)
    except StopIteration:  # what ended it was raised in a step that is in flight behind this one
        raise UserError("webdataset cannot read the shards any further: mend or leave out the damaged one") from None


def _images(shards: list[str], seed: int) -> Iterator[Raw]:
    """The images of the shards, epoch after epoch, shuffled anew in each."""
    from webdataset.compat import WebDataset
    from webdataset.filters import detshuffle

    samples = WebDataset(
        shards,
        shardshuffle=SHUFFLED_SHARDS,
        detshuffle=True,
        seed=seed,
        nodesplitter=None,  # this is the share of one rank, and no worker process reads it
        workersplitter=None,
        empty_check=False,
    ).compose(detshuffle(SHUFFLED_SAMPLES, seed=seed))
    while True:
        seen = 0
        try:
            for sample in samples:
                for name, data in sample.items():
                    if name.rpartition(".")[2] in SUFFIXES and not name.startswith("__"):
                        seen += 1
                        yield f"{sample['__key__']}.{name} in {sample['__url__']}", data
        except Exception as e:  # of the library and all that it opens shards with
            what = " ".join(str(e).split()) or type(e).__name__
            raise UserError(f"webdataset cannot read the shards ({what}): mend or leave out the one named") from e
        if not seen:
            raise UserError(f"no images in {', '.join(shards[:3])}: name other shards")
