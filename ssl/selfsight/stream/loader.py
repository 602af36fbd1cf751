"""Steps → batches: reads, decodes and crops the samples that the order names, in worker processes, whole steps each.

What a batch holds depends on (corpus, order, views, step) alone: neither on the workers nor on the other ranks, and the
random numbers of the process that trains are not touched. Crops travel as uint8; `to_device` normalises them there.
"""

import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from selfsight.errors import UserError
from selfsight.machine import available_cores
from selfsight.shards import Corpus
from selfsight.stream.order import Order
from selfsight.stream.views import Views
from selfsight.viewspec import MEAN, STD

MAX_WORKERS = 16
_NOBODY = -1


def auto_workers(ranks_here: int = 1) -> int:
    """Decoding processes per rank when `ranks_here` ranks share this machine: a core each is left to training."""
    return max(0, min(available_cores() // ranks_here - 1, MAX_WORKERS))


@dataclass(frozen=True)
class _Failure:
    """A user's mistake met in a worker: sent as data, because a raised one would arrive wrapped in its traceback."""

    sentence: str


class _Steps(Dataset):
    """Map-style: item `t` is this rank's part of step `t`, every tensor with the micro-batches as its first dimension.

    One tensor per view and step, however many micro-batches: each costs a file descriptor on its way between processes.
    """

    def __init__(self, corpus: Corpus, order: Order, views: Views, start: int, stop: int, parts: int, workers: int):
        self.corpus, self.order, self.views = corpus, order, views
        self.start, self.stop, self.parts = start, stop, parts
        # (pid, ordinal in hand) of each worker, so that the main process can name what a worker died of.
        self.in_hand = torch.full((max(workers, 1), 2), _NOBODY, dtype=torch.int64).share_memory_()

    def __getitem__(self, t: int) -> dict[str, Tensor] | _Failure:
        ordinals, visits = (x.reshape(self.parts, -1) for x in self.order.step(t, self.start, self.stop))
        shapes = self.views.shapes(ordinals.shape[1])
        arrays = {name: np.empty((self.parts, *shape), dtype) for name, (shape, dtype) in shapes.items()}
        try:
            for part in range(self.parts):
                self._fill({n: a[part] for n, a in arrays.items()}, ordinals[part].tolist(), visits[part].tolist())
        except UserError as e:
            return _Failure(str(e))
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | {
            "ordinal": torch.from_numpy(ordinals)
        }

    def _fill(self, out: dict[str, np.ndarray], ordinals: list[int], visits: list[int]) -> None:
        worker = get_worker_info()
        in_hand = self.in_hand[worker.id if worker else 0].numpy()
        in_hand[0] = os.getpid()
        for i, (ordinal, visit) in enumerate(zip(ordinals, visits, strict=True)):
            in_hand[1] = ordinal
            try:
                image = self.views.decode(self.corpus.sample(ordinal).data)
            except (OSError, ValueError) as e:  # of the disk; of damaged shards and images
                raise UserError(
                    f"cannot read image {self.corpus.whereabouts(ordinal)} ({e}): run selfsight corpus verify"
                ) from e
            self.views.into(image, ordinal, visit, out, i)
        in_hand[1] = _NOBODY


class StepLoader:
    """Iterates over the steps start_step … total_steps − 1 of one rank.

    Each step is a list of `accumulation` micro-batches: dicts of crops uint8 (count, b, 3, size, size), noise float32
    (b, length) and "ordinal" int64 (b,), with b = batch_size / world_size / accumulation; pinned when CUDA is there.

    `workers` None means `auto_workers`; 0 works in this process. Raises UserError when the batch does not divide, and
    when an image does not decode or a worker dies of one, naming the image and its shard.
    """

    def __init__(
        self,
        corpus: Corpus,
        order: Order,
        views: Views,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        total_steps: int,
        workers: int | None = None,
        accumulation: int = 1,
    ) -> None:
        if order.batch_size % (world_size * accumulation):
            raise UserError(
                f"batch_size {order.batch_size} is no multiple of {world_size} processes × accumulation "
                f"{accumulation}: change batch_size or training.accumulation"
            )
        if order.n != corpus.n:
            raise ValueError(f"the order is of {order.n} samples, the corpus has {corpus.n}")
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        self.workers = auto_workers(ranks_here) if workers is None else workers
        self.start_step, self.total_steps = start_step, total_steps
        share = order.batch_size // world_size
        self._steps = _Steps(corpus, order, views, rank * share, (rank + 1) * share, accumulation, self.workers)

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step)

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        loader = DataLoader(
            self._steps,
            batch_size=None,
            sampler=range(self.start_step, self.total_steps),
            num_workers=self.workers,
            prefetch_factor=2 if self.workers else None,
            pin_memory=torch.cuda.is_available(),
            # Without one of its own the loader would draw its workers' seeds from the trainer's generator.
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=_heed_parent_only,
        )
        # torch's handler of SIGCHLD would raise wherever the trainer happens to be; without it `next` notices soon.
        on_child = signal.getsignal(signal.SIGCHLD)
        steps = iter(loader)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_child)
        try:
            for step in steps:
                if isinstance(step, _Failure):
                    raise UserError(step.sentence)
                yield [{name: tensor[part] for name, tensor in step.items()} for part in range(self._steps.parts)]
        except RuntimeError as e:
            if "DataLoader worker" not in str(e):
                raise
            raise UserError(self._obituary(str(e))) from e

    def _obituary(self, message: str) -> str:
        """One sentence about a worker that died, from torch's message, which holds its pid."""
        named = {int(pid) for pid in re.findall(r"\d+", message)}
        at = [self._steps.corpus.whereabouts(o) for pid, o in self._steps.in_hand.tolist() if pid in named and o != _NOBODY]
        return (
            f"a process that decodes images died{f' at image {at[0]}' if at else ''}: "
            "lower stream.workers if memory or /dev/shm is short, else run selfsight corpus verify"
        )


def _heed_parent_only(worker: int) -> None:
    """In a worker: only the process that started it may end it.

    Ctrl-C and a scheduler's notice of preemption reach every process of a job. The trainer answers them with a
    checkpoint, for which its loader must not have died under it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def to_device(
    batch: dict[str, Tensor],
    device: torch.device | str,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> dict[str, Tensor]:
    """Moves a batch to the device without waiting for it; crops become float32, (pixel / 255 − mean) / std."""
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    for name, tensor in moved.items():
        if tensor.dtype == torch.uint8:
            crops = moved[name] = tensor.to(torch.float32).div_(255)
            for c, (m, s) in enumerate(zip(mean, std, strict=True)):
                # Python numbers, because a tensor of means would have to cross the bus and the device be waited for.
                crops[:, :, c].sub_(m).div_(s)
    return moved
