"""Labelled images in batches for probes with the encoder in the loop: random resized crops, or the evaluation's frame.

Threads read, decode and crop while the device works on the batches before. A crop is a function of (seed, image, how
often it was seen), whoever makes it. In: a bench's corpus and the order of its images. Out: pixels, or what a frozen
encoder says of them, with labels.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from eval_probes.bench import Bench
from eval_probes.extraction import AHEAD, MOST_WORKERS, read_sample
from eval_probes.protocol import Protocol
from selfsight.encoders import Tokens
from selfsight.errors import UserError
from selfsight.machine import available_cores
from selfsight.shards.corpus import Corpus
from selfsight.shards.decode import decode_image
from selfsight.viewspec import CropSpec, ViewSpec

Order = Iterable[tuple[np.ndarray, np.ndarray]]  # batches of images: ordinals and visits, int64 (B,) each
Make = Callable[[int, int], np.ndarray]  # (ordinal, visit) → uint8 (3, H, W)


@dataclass(frozen=True)
class Augmented(Protocol):
    """Base of the protocols that see another crop of an image each time. Learning rates are per 256 images."""

    batch_size: int = 1024
    scale: tuple[float, float] = (0.08, 1.0)  # of an image's area that a crop covers
    flip: float = 0.5
    interpolation: str = "bicubic"
    resize: int | None = None  # shorter side of test images before their crop, pixels; None: as the weights say
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise UserError(f"{self.name} needs a batch of at least 1 image")


def order(rows: np.ndarray, batch_size: int, seed: int, rest: str = "carry") -> Order:
    """Batches of `rows` without end, one seeded permutation after the other; the visit is the permutation's number.

    What does not fill a batch is carried over into the next permutation, or is a batch of its own ("keep"), or is left
    out ("drop").
    """
    assert rest in ("carry", "keep", "drop")
    assert rest != "drop" or batch_size <= len(rows)
    generator = np.random.default_rng(seed)
    ordinals = visits = np.empty(0, np.int64)
    for visit in count():
        ordinals = np.concatenate([ordinals, generator.permutation(rows)])
        visits = np.concatenate([visits, np.full(len(rows), visit)])
        stop = len(ordinals) if rest == "keep" else len(ordinals) // batch_size * batch_size
        for i in range(0, stop, batch_size):
            yield ordinals[i : min(i + batch_size, stop)], visits[i : min(i + batch_size, stop)]
        left = slice(stop, None) if rest == "carry" else slice(0, 0)
        ordinals, visits = ordinals[left], visits[left]


def once(rows: np.ndarray, batch_size: int) -> Order:
    """Every one of `rows` once, in their order."""
    for i in range(0, len(rows), batch_size):
        yield rows[i : i + batch_size], np.zeros(len(rows[i : i + batch_size]), np.int64)


def crops(bench: Bench, corpus: Corpus, protocol: Augmented) -> Make:
    """Random resized crops of the size that the weights take."""
    from selfsight.stream.views import Views  # numba takes a second

    size = bench.subject.preprocess()["input_size"][1]
    spec = CropSpec("crop", 1, size, protocol.scale, flip=protocol.flip, interpolation=protocol.interpolation)
    views = Views(ViewSpec((spec,)), seed=protocol.seed)

    def make(ordinal: int, visit: int) -> np.ndarray:
        return read_sample(corpus, ordinal, lambda data: views(views.decode(data), ordinal, visit)["crop"][0])

    return make


def frames(bench: Bench, corpus: Corpus, resize: int | None = None) -> Make:
    """Images as the evaluation sees them."""
    transform = bench.subject.transform(resize)
    return lambda ordinal, _: read_sample(corpus, ordinal, lambda data: transform.pixels(decode_image(data)))


def images(bench: Bench, corpus: Corpus, batches: Order, make: Make) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """→ uint8 (b, 3, H, W) and labels int64 (b,) on the device, and whether they end a batch.

    b is at most what the bench passes through an encoder at once. Raises UserError for an image that cannot be read.
    """
    labels = corpus.labels()
    assert labels is not None
    at_once, pin = bench.how.batch_size, bench.device.type == "cuda"
    ahead: deque[tuple[list[Future], np.ndarray, bool]] = deque()

    def ready() -> tuple[Tensor, Tensor, bool]:
        tasks, ordinals, last = ahead.popleft()
        pair = torch.from_numpy(np.stack([task.result() for task in tasks])), torch.from_numpy(labels[ordinals])
        pixels, y = (x.pin_memory().to(bench.device, non_blocking=True) if pin else x for x in pair)
        return pixels, y, last

    workers = bench.how.workers or min(available_cores(), MOST_WORKERS)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="crop")
    try:
        for ordinals, visits in batches:
            for i in range(0, len(ordinals), at_once):
                part = slice(i, i + at_once)
                tasks = [pool.submit(make, *pair) for pair in zip(ordinals[part], visits[part], strict=True)]
                ahead.append((tasks, ordinals[part], i + at_once >= len(ordinals)))
                if len(ahead) > AHEAD:
                    yield ready()
        while ahead:
            yield ready()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def encoded(
    bench: Bench,
    corpus: Corpus,
    batches: Order,
    make: Make,
    represent: Callable[[list[Tokens]], Tensor],
    blocks: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """→ for each batch what `represent` makes of the tokens of the last `blocks` blocks, float32 (B, …), and labels
    int64 (B,). The encoder is frozen: nothing it says has a gradient."""
    transform = bench.subject.transform()
    bf16 = bench.how.precision == "bf16"
    found: list[tuple[Tensor, Tensor]] = []
    for pixels, y, last in images(bench, corpus, batches, make):
        with torch.no_grad(), torch.autocast(bench.device.type, torch.bfloat16, enabled=bf16):
            tokens = bench.encoder.intermediate(transform.normalise(pixels), n=blocks)
            found.append((represent(tokens).float(), y))
        if last:
            x, y = (torch.cat(parts) for parts in zip(*found, strict=True))
            found.clear()
            yield x, y
