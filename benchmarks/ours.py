"""Our side of benchmarks/stream.py: the stream as a recipe uses it. Each function returns the work of one epoch."""

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.jobs import SPECS
from selfsight.shards import Corpus, decode_pixels
from selfsight.stream.draw import HEIGHT, LEFT, TOP, WIDTH
from selfsight.stream.mixture import Mixture, Part, Slots
from selfsight.stream.order import auto_lanes
from selfsight.stream.views import Views

Work = Callable[[], int]
WINDOW = 16


def mixture_of(corpus: Corpus, batch: int) -> Mixture:
    part = Part(corpus)
    return Mixture([part], batch_size=batch, lanes=auto_lanes(batch, part.chunks), window=WINDOW, seed=0)


def views_of(job: str) -> Views:
    return (Centre if job == "resize" else Views)(SPECS[job], seed=0)


class Centre(Views):
    """Shorter side to 256 and 224 from the centre are one box of the source."""

    def _draw(self, name: str, image: np.ndarray, ordinal: int, visit: int, rows: np.ndarray) -> None:
        super()._draw(name, image, ordinal, visit, rows)
        height, width = image.shape[:2]
        side = round(min(height, width) * 224 / 256)
        rows[:, LEFT], rows[:, TOP] = (width - side) // 2, (height - side) // 2
        rows[:, WIDTH] = rows[:, HEIGHT] = side


def loaded(job: str, corpus: Path, batch: int, cores: int, *, staged: bool) -> Work:
    """Batches as the loader hands them out: of uint8 crops, or `staged`, for the device to make the crops."""
    from selfsight.stream.loader import StepLoader

    opened = Corpus.open(corpus)
    mixture, views, epochs = mixture_of(opened, batch), views_of(job), itertools.count()
    steps = opened.n // batch

    def epoch() -> int:
        at = next(epochs) * steps
        loader = StepLoader(mixture, views, start_step=at, total_steps=at + steps, workers=cores, staged=staged)
        return sum(len(part["ordinal"]) for step in loader for part in step)

    return epoch


def ours_read(corpus: Path, batch: int, cores: int) -> Work:
    """Plain reading: every image of an epoch in its order, checked and decoded whole."""
    opened = Corpus.open(corpus)

    mixture, steps, epochs = mixture_of(opened, batch), opened.n // batch, itertools.count()
    pool = ThreadPoolExecutor(cores)

    def read(slots: Slots) -> int:
        for ordinal in slots.ordinal.tolist():
            decode_pixels(opened.sample(ordinal).data)
        return batch

    def epoch() -> int:
        at = next(epochs) * steps
        return sum(pool.map(read, (mixture.step(t) for t in range(at, at + steps))))

    return epoch


def bare_decode(library: str, corpus: Path, cores: int) -> Work:
    """The decode limit: the same bytes, in memory, decoded by as many threads and thrown away."""
    opened = Corpus.open(corpus)
    data = [opened.sample(i).data for i in range(opened.n)]
    decode = _decoder(library)
    pool = ThreadPoolExecutor(cores)

    def part(items: list[bytes]) -> int:
        for item in items:
            decode(item)
        return len(items)

    return lambda: sum(pool.map(part, (data[i::cores] for i in range(cores))))


def _decoder(library: str) -> Callable[[bytes], object]:
    if library == "simplejpeg":
        import simplejpeg

        return simplejpeg.decode_jpeg
    from io import BytesIO

    from PIL import Image

    return lambda data: Image.open(BytesIO(data)).convert("RGB")


def first_batch(corpus: Path, job: str, batch: int, epoch: int, cores: int) -> float:
    """Seconds from nothing to the first batch of a run that goes on at `epoch`; call it in a fresh process."""
    from selfsight.stream.loader import StepLoader

    began = time.perf_counter()
    opened = Corpus.open(corpus)
    mixture, views = mixture_of(opened, batch), views_of(job)
    at = epoch * (opened.n // batch)
    loader = StepLoader(mixture, views, start_step=at, total_steps=at + opened.n // batch, workers=cores)
    next(iter(loader))
    return time.perf_counter() - began
