"""Steps → batches: reads, decodes and crops the samples that the mixture names, in threads, several steps ahead.

What a batch holds depends on (parts, order, views, step) alone: neither on the threads nor on the other ranks, and the
random numbers of the process that trains are not touched. The work is done outside Python's lock, in the decoder and in
compiled kernels, so threads are enough: nothing is pickled, and crops are written once, into the memory that the device
copies from. A sample that cannot be had is replaced by another one of its window; the stream does not shift.
"""

import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from selfsight.errors import UserError
from selfsight.machine import available_cores
from selfsight.shards import Corpus, Unreachable
from selfsight.stream.device import render
from selfsight.stream.device_decode import decode
from selfsight.stream.mixture import Mixture, Slots
from selfsight.stream.prefetch import Prefetch
from selfsight.stream.quarantine import Finding, Quarantine
from selfsight.stream.views import CANVAS, ENCODED, Jpeg, Views
from selfsight.viewspec import MEAN, STD, ViewSpec

MAX_WORKERS = 16
STAND_INS = 16  # tried for one sample
TASK = 8  # samples a thread takes at a time


def auto_workers(ranks_here: int = 1) -> int:
    """Decoding threads per rank when `ranks_here` ranks share these cores: a core each is left to training."""
    return max(0, min(available_cores() // ranks_here - 1, MAX_WORKERS))


@dataclass
class _Step:
    """A rank's part of step t on its way. Tensors have the micro-batches as their first dimension."""

    t: int
    slots: Slots
    tensors: dict[str, Tensor]
    tasks: list[Future]


class StepLoader:
    """Iterates over the steps start_step … total_steps − 1 of one rank.

    Each step is a list of `accumulation` micro-batches: dicts of crops uint8 (count, b, 3, size, size), noise float32
    (b, length), "part" and "ordinal" int64 (b,), with b = batch_size / world_size / accumulation; pinned when CUDA is
    there. "ordinal" is the sample that is shown, also where it stands in for another. `staged` batches hold decoded
    images and the parameters of their crops instead (`Views.staging_shapes`), for the device to make them; `encoded`
    ones hold the bytes of those that the device can decode, too.

    `workers` None means `auto_workers`; 0 works in this thread. `delivered` counts the samples handed out, by
    (part, epoch). Raises UserError when the batch does not divide, and when too many samples cannot be had.
    """

    def __init__(
        self,
        mixture: Mixture,
        views: Views,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        total_steps: int,
        workers: int | None = None,
        accumulation: int = 1,
        quarantine: Quarantine | None = None,
        staged: bool = False,
        encoded: bool = False,
    ) -> None:
        if mixture.batch_size % (world_size * accumulation):
            raise UserError(
                f"batch_size {mixture.batch_size} is no multiple of {world_size} processes × accumulation "
                f"{accumulation}: change batch_size or training.accumulation"
            )
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        self.workers = auto_workers(ranks_here) if workers is None else workers
        self.start_step, self.total_steps = start_step, total_steps
        self.mixture, self.views, self.accumulation = mixture, views, accumulation
        self._decode = views.decode_later if encoded else views.decode
        self._shapes, self._write = views.shapes, cast(Callable[..., None], views.into)
        if staged or encoded:
            self._shapes, self._write = partial(views.staging_shapes, encoded=encoded), views.stage
        self.quarantine = Quarantine() if quarantine is None else quarantine
        self.delivered: Counter[tuple[int, int]] = Counter()
        self._first = rank * (mixture.batch_size // world_size)
        self._share = mixture.batch_size // world_size
        self._lock = threading.Lock()  # of the mixture

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def epochs_over(self, t: int) -> list[tuple[int, int]]:
        """As the mixture says, which the threads of this loader use at the same time."""
        with self._lock:
            return self.mixture.epochs_over(t)

    def whereabouts(self, batch: dict[str, Tensor]) -> list[str]:
        """Sample and shard of each image of a micro-batch that it gave."""
        shown = zip(batch["part"].tolist(), batch["ordinal"].tolist(), strict=True)
        return [self.mixture.parts[part].corpus.whereabouts(ordinal) for part, ordinal in shown]

    def counts(self, start: int, stop: int) -> Counter[tuple[int, int]]:
        """Samples that the steps start … stop − 1 have for this rank, by (part, epoch)."""
        counts: Counter[tuple[int, int]] = Counter()
        for t in range(start, stop):
            with self._lock:
                _count(self.mixture.step(t, self._first, self._first + self._share), counts)
        return counts

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        if self.workers == 0:
            for t in range(self.start_step, self.total_steps):
                step = self._begin(t, None)
                yield self._finish(step)
            return
        # Enough in flight that no thread waits while the trainer is busy with a step.
        ahead = 1 + max(2, -(-2 * TASK * self.workers // self._share))
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        in_flight: deque[_Step] = deque()
        prefetch = Prefetch(self.mixture, self._first, self._share)
        try:
            for t in range(self.start_step, self.total_steps):
                with self._lock:
                    prefetch.look(t)
                in_flight.append(self._begin(t, pool))
                if len(in_flight) >= ahead:
                    yield self._finish(in_flight.popleft())
            while in_flight:
                yield self._finish(in_flight.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            prefetch.close()

    def _begin(self, t: int, pool: ThreadPoolExecutor | None) -> _Step:
        with self._lock:
            slots = self.mixture.step(t, self._first, self._first + self._share)
        shapes = self._shapes(self._share // self.accumulation)
        tensors = {
            name: torch.empty(
                (self.accumulation, *shape), dtype=_TORCH[np.dtype(kind)], pin_memory=torch.cuda.is_available()
            )
            for name, (shape, kind) in shapes.items()
        }
        step = _Step(t, slots, tensors, [])
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        size = max(1, min(TASK, self._share // (2 * self.workers or 1)))
        for at in range(0, self._share, size):
            places = range(at, min(at + size, self._share))
            if pool is None:
                self._fill(step, arrays, places)
            else:
                step.tasks.append(pool.submit(self._fill, step, arrays, places))
        return step

    def _fill(self, step: _Step, arrays: dict[str, np.ndarray], places: range) -> None:
        """Writes the views of these places of a step."""
        slots, b = step.slots, self._share // self.accumulation
        for place in places:
            corpus = self.mixture.parts[slots.part[place]].corpus
            ordinal, visit = int(slots.ordinal[place]), int(slots.visit[place])
            try:
                image = self._image(corpus, ordinal)
            except Unreachable as gone:  # no neighbour of the sample would come either
                raise _storage_gone(gone) from gone
            except (OSError, ValueError) as why:  # of disks; of damaged shards and images
                image, ordinal, visit = self._stand_in(step, place, corpus, why)
                slots.ordinal[place] = ordinal
            part, i = divmod(place, b)
            self._write(image, ordinal, visit, {name: array[part] for name, array in arrays.items()}, i)

    def _image(self, corpus: Corpus, ordinal: int) -> Jpeg | np.ndarray:
        return self._decode(corpus.sample(ordinal).data)

    def _stand_in(self, step: _Step, place: int, corpus: Corpus, why: Exception) -> tuple[Jpeg | np.ndarray, int, int]:
        """The image, ordinal and visit of a sample that can be had instead, and a line in the quarantine list."""
        lost = int(step.slots.ordinal[place])
        for attempt in range(STAND_INS):
            with self._lock:
                found = self.mixture.stand_in(step.t, self._first + place, attempt)
            if found is None:
                break
            try:
                image = self._image(corpus, found[0])
            except Unreachable as gone:
                raise _storage_gone(gone) from gone
            except (OSError, ValueError):
                continue  # it is found by itself when its turn comes
            self._report(step, lost, corpus, why, found[0])
            return image, *found
        self._report(step, lost, corpus, why, None)
        raise UserError(
            f"cannot read image {corpus.whereabouts(lost)} ({why}), nor those around it: run selfsight corpus verify"
        )

    def _report(self, step: _Step, lost: int, corpus: Corpus, why: Exception, stand_in: int | None) -> None:
        read = min((step.t - self.start_step + 1) * self._share, sum(p.n for p in self.mixture.parts))
        self.quarantine.add(Finding(step.t, lost, corpus.whereabouts(lost), str(why), stand_in), read)

    def _finish(self, step: _Step) -> list[dict[str, Tensor]]:
        for task in step.tasks:
            task.result()
        _count(step.slots, self.delivered)
        names = {
            name: torch.from_numpy(values).view(self.accumulation, -1)
            for name, values in (("part", step.slots.part), ("ordinal", step.slots.ordinal))
        }
        if torch.cuda.is_available():
            names = {name: tensor.pin_memory() for name, tensor in names.items()}
        tensors = step.tensors | names
        return [{name: tensor[part] for name, tensor in tensors.items()} for part in range(self.accumulation)]


def _count(slots: Slots, into: Counter[tuple[int, int]]) -> None:
    """Adds the samples of a step that belong to an epoch, by (part, epoch)."""
    pairs, counts = np.unique(np.stack([slots.part, slots.epoch]), axis=1, return_counts=True)
    for (part, epoch), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
        if epoch >= 0:
            into[part, epoch] += count


def _storage_gone(problem: Unreachable) -> UserError:
    return UserError(f"{problem}: see to the storage, then give the same command again")


_TORCH = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
}


@cache
def _compiled() -> Callable[..., dict[str, Tensor]]:
    return torch.compile(render)


def to_device(
    batch: dict[str, Tensor],
    device: torch.device | str,
    spec: ViewSpec,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> dict[str, Tensor]:
    """Moves a batch to the device without waiting for it; crops become float32, (pixel / 255 − mean) / std. Those of a
    staged batch are made there. Where it holds encoded images, their decoding is waited for, as `device_decode.decode`
    says. Raises UserError for one that cannot be decoded."""
    if ENCODED in batch:
        batch = decode(batch, torch.device(device))
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    if CANVAS in moved:
        made = (_compiled() if moved[CANVAS].is_cuda else render)(spec, moved, mean, std)
        return {name: moved[name] for name in ("part", "ordinal")} | made
    for name, tensor in moved.items():
        if tensor.dtype == torch.uint8:
            crops = moved[name] = tensor.to(torch.float32).div_(255)
            for c, (m, s) in enumerate(zip(mean, std, strict=True)):
                # Python numbers, because a tensor of means would have to cross the bus and the device be waited for.
                crops[:, :, c].sub_(m).div_(s)
    return moved
