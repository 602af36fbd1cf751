"""Weights and a corpus → features, each image decoded and encoded once, on as many devices as there are.

Threads decode while the encoder runs. Every process works on blocks of the store's entry that nobody else has in hand,
so that a second process or machine helps, and a killed one is continued. In: a Subject. Out: `Features`.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval_probes.features import Features, check_sound
from eval_probes.pooling import Pooling
from eval_probes.store import Claim, Entry, FeatureStore
from eval_probes.subject import Subject, pick_device
from selfsight.console import progress
from selfsight.errors import UserError
from selfsight.machine import available_cores
from selfsight.shards.corpus import Corpus
from selfsight.shards.decode import DecodeError, decode_image
from selfsight.weights.preprocess import EvalTransform

MOST_WORKERS = 16
AHEAD = 2  # batches that are decoded while one is encoded
PRECISIONS = ("fp32", "bf16")
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class How:
    """How features are computed: of this, only `precision` and `dtype` decide more than their last digits."""

    batch_size: int = 256
    device: str | None = None  # None: every GPU there is, or else the CPU
    precision: str = "fp32"  # bf16: the encoder runs under autocast
    dtype: str = "float32"  # in which they are kept
    workers: int | None = None  # decoding threads; None: one per core
    cache: str | None = None  # None: $SELFSIGHT_CACHE or ~/.cache/selfsight

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(f"there is no precision {self.precision!r}: choose fp32 or bf16")
        if self.dtype not in DTYPES:
            raise UserError(f"features cannot be kept as {self.dtype!r}: choose float32 or float16")
        if self.batch_size < 1 or (self.workers is not None and self.workers < 1):
            raise UserError("the batch size and the number of workers must be at least 1")


def extract(
    subject: Subject,
    corpus: Corpus,
    pooling: Pooling | None = None,
    how: How | None = None,
    *,
    resize: int | None = None,
) -> Features:
    """Features of every image of `corpus`. `resize`: as `Subject.transform` takes it.

    Raises UserError for an image that cannot be decoded and features that are not finite, Collapsed for features that
    do not differ.
    """
    how = how or How()
    pooling = pooling if pooling and not subject.is_pixels else Pooling()
    device = pick_device(how.device)
    key = {
        "weights": subject.digest,
        "encoder": subject.description | {"preprocess": subject.preprocess(resize)},
        "corpus": corpus.id,
        "precision": how.precision,
        "device": device.type,  # CUDA and CPU kernels differ in the last digits
    }
    entry = FeatureStore(how.cache).entry(key, pooling, corpus.n, subject.embed_dim, how.dtype)
    if not entry.complete:
        _fill_everywhere(entry, subject, corpus, how, resize)
    X = pooling.take(entry.read(), entry.pooling)
    if subject.is_pixels:
        X = _standardise_channels(X)
    features = Features(
        X=X,
        y=corpus.labels(),
        classes=corpus.classes,
        corpus=str(corpus.path),
        corpus_id=corpus.id,
        subject=subject,
        pooling=pooling,
        how={"precision": how.precision, "dtype": how.dtype, "resize": resize},
    )
    check_sound(features)
    return features


def _fill_everywhere(entry: Entry, subject: Subject, corpus: Corpus, how: How, resize: int | None) -> None:
    """Fills `entry` on the device asked for, or on all GPUs of this machine, one process each."""
    gpus = torch.cuda.device_count() if how.device is None and torch.cuda.is_available() else 1
    # A process of its own for every further GPU; this one has the first and shows the progress.
    context = torch.multiprocessing.get_context("spawn")
    helpers = [
        context.Process(target=_fill, args=(entry, subject, corpus, how, resize, f"cuda:{i}"), daemon=True)
        for i in range(1, min(gpus, entry.n_blocks))
    ]
    for helper in helpers:
        helper.start()
    try:
        _fill(entry, subject, corpus, how, resize, how.device, shown=True)
    finally:
        for helper in helpers:
            helper.terminate()  # all blocks are done, or this process failed
            helper.join()


@torch.inference_mode()
def _fill(
    entry: Entry,
    subject: Subject,
    corpus: Corpus,
    how: How,
    resize: int | None,
    device_name: str | None,
    shown: bool = False,
) -> None:
    device = pick_device(device_name)
    transform = subject.transform(resize)
    embed = _embedder(subject, transform, entry.pooling, device, how.precision)
    workers = how.workers or min(available_cores(), MOST_WORKERS)
    rows: list[np.ndarray] = []
    with (
        ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool,
        progress(f"features of {corpus.name}", total=corpus.n) if shown else nullcontext() as bar,
    ):
        batches = _batches(entry.claims(), corpus, transform, how.batch_size, pool, pin=device.type == "cuda")
        for claim, pixels, last in batches:
            features = embed(pixels.to(device, non_blocking=True))
            rows.append(features.to(torch.float32).cpu().numpy())
            if bar:
                bar.advance(len(features))
            if last:
                claim.finish(_checked(np.concatenate(rows), entry.dtype))
                rows.clear()


def _checked(features: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # said below
        kept = features.astype(dtype)
    if not np.isfinite(features).all():
        raise UserError("the encoder's features are not finite: its training diverged, take an earlier step")
    if not np.isfinite(kept).all():
        largest = np.abs(features).max()
        raise UserError(f"the encoder's features do not fit {dtype} (the largest is {largest:.1e}): use float32")
    return kept


def _embedder(
    subject: Subject, transform: EvalTransform, pooling: Pooling, device: torch.device, precision: str
) -> Callable[[Tensor], Tensor]:
    """A function from uint8 images (B, 3, H, W) on `device` to features (B, D)."""
    if subject.is_pixels:
        return lambda pixels: pixels.float().div_(255).flatten(1)
    encoder = subject.load(device)

    def embed(pixels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return pooling(encoder.intermediate(transform.normalise(pixels), n=pooling.blocks))

    return embed


def _batches(
    claims: Iterator[Claim],
    corpus: Corpus,
    transform: EvalTransform,
    batch_size: int,
    pool: ThreadPoolExecutor,
    *,
    pin: bool,
) -> Iterator[tuple[Claim, Tensor, bool]]:
    """(claim, uint8 (B, 3, H, W), whether it ends the claim), every row of every claim once, in order."""
    in_flight: deque[tuple[Claim, list[Future], bool]] = deque()
    claim = None
    try:
        for claim in claims:
            for first in range(claim.start, claim.stop, batch_size):
                stop = min(first + batch_size, claim.stop)
                tasks = [pool.submit(_pixels, corpus, transform, ordinal) for ordinal in range(first, stop)]
                in_flight.append((claim, tasks, stop == claim.stop))
                if len(in_flight) > AHEAD:
                    yield _collected(*in_flight.popleft(), pin)
            while in_flight:  # a block is finished before the next is claimed: others may take that
                yield _collected(*in_flight.popleft(), pin)
    finally:
        for _, tasks, _ in in_flight:
            for task in tasks:
                task.cancel()
        if claim is not None:
            claim.close()


def _collected(claim: Claim, tasks: list[Future], last: bool, pin: bool) -> tuple[Claim, Tensor, bool]:
    pixels = torch.from_numpy(np.stack([task.result() for task in tasks]))
    return claim, pixels.pin_memory() if pin else pixels, last


def _pixels(corpus: Corpus, transform: EvalTransform, ordinal: int) -> np.ndarray:
    return read_sample(corpus, ordinal, lambda data: transform.pixels(decode_image(data)))


def read_sample(corpus: Corpus, ordinal: int, turn: Callable[[bytes], np.ndarray]) -> np.ndarray:
    """What `turn` makes of a sample's bytes. Raises UserError naming a sample that cannot be read."""
    try:
        return turn(corpus.sample(ordinal).data)
    except (DecodeError, ValueError, OSError) as e:
        what = f"sample {ordinal} cannot be read ({' '.join(str(e).split())})"
        raise UserError(f"{corpus.path}: {what}; `selfsight corpus verify` lists every fault") from e


def _standardise_channels(X: np.ndarray) -> np.ndarray:
    """Raw pixels (N, 3·32·32): each colour channel to mean 0 and deviation 1 over the whole corpus."""
    channels = np.asarray(X, dtype=np.float32).reshape(len(X), 3, -1)
    mean = channels.mean(axis=(0, 2), dtype=np.float64)
    std = channels.std(axis=(0, 2), dtype=np.float64)
    scaled = (channels - mean[None, :, None]) / np.maximum(std, 1e-6)[None, :, None]
    return scaled.astype(np.float32).reshape(len(X), -1)
