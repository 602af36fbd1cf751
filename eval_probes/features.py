"""Features of a corpus under frozen weights, extracted once and kept. In: weights and a corpus. Out: `Features`.

Worker processes decode while the encoder runs; each image is read once, in the order of the shards. The literal weights
"pixels" are the baseline that every encoder has to beat: the picture itself, 32×32, its channels standardised by the
corpus's own statistics.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from eval_probes.pooling import Pooling
from eval_probes.store import FeatureStore
from selfsight.console import progress
from selfsight.errors import UserError
from selfsight.files import sha256_of
from selfsight.machine import available_cores
from selfsight.shards.corpus import Corpus
from selfsight.shards.decode import DecodeError, decode_image
from selfsight.weights import PretrainedEncoder, load_pretrained, newest_export
from selfsight.weights.folder import WEIGHTS, Export
from selfsight.weights.preprocess import EvalTransform, settings
from selfsight.weights.run import is_run

PIXELS = "pixels"
PIXELS_SIZE = 32
PIXELS_DIGEST = hashlib.sha256(
    b"pixels 32x32, standardised by the channel statistics of the corpus, version 1"
).hexdigest()
FEW = 512  # images below which worker processes cost more than they bring
AHEAD = 2  # batches that each worker decodes ahead


@dataclass(frozen=True)
class Features:
    """One feature vector per image of a corpus, in the order of the corpus."""

    X: np.ndarray  # float32 (N, D), memory-mapped
    y: np.ndarray | None  # int64 (N,), None for an unlabelled corpus
    classes: list[str] | None
    corpus: str  # path
    corpus_id: str
    weights: str  # path of the export, or "pixels"
    weights_digest: str
    pooling: Pooling
    meta: dict[str, Any] = field(default_factory=dict)  # of the weights: which, objective, step, …

    @property
    def n(self) -> int:
        return len(self.X)

    def describe(self) -> dict[str, Any]:
        """JSON-able: what stands in a score's details."""
        return {"dimension": self.X.shape[1], "pooling": asdict(self.pooling), **self.meta}


def extract(
    weights: str | Path,
    corpus: str | Path,
    *,
    n_last_blocks: int = 1,
    avgpool: bool = False,
    interleave: bool = False,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    cache: str | Path | None = None,
    workers: int | None = None,
    precision: str = "fp32",
) -> Features:
    """Features of every image of `corpus` under `weights` (export folder, run folder, or "pixels").

    `n_last_blocks`, `avgpool`, `interleave`: see `Pooling`. `device` None is CUDA where there is one. `cache` None is
    $SELFSIGHT_CACHE or ~/.cache/selfsight. `workers` None is one decoding process per core, none for few images.
    `precision` "bf16" runs the encoder under autocast; features are kept as float32 in any case. Raises UserError for
    weights or a corpus that cannot be opened, an image that cannot be decoded and features that are not finite.
    """
    if precision not in ("fp32", "bf16"):
        raise UserError(f"there is no precision {precision!r}: choose fp32 or bf16")
    pooling = Pooling(n_last_blocks, avgpool, interleave)
    opened = Corpus.open(corpus)
    source = _Source.open(weights)
    place = pick_device(device)

    def fill(out: np.ndarray) -> None:
        embed = source.embedder(pooling, place, precision)
        _fill(out, opened, source.transform, embed, batch_size, place, workers)
        if source.name == PIXELS:
            _standardise_channels(out)

    key = {
        "weights": source.digest,
        "encoder": source.description,
        "pooling": asdict(pooling),
        "corpus": opened.id,
        "precision": precision,
        "device": place.type,  # CUDA and CPU kernels differ in the last digits
    }
    X = FeatureStore(cache).get(key, (opened.n, source.dimension(pooling)), fill)
    return Features(
        X=X,
        y=opened.labels(),
        classes=opened.classes,
        corpus=str(corpus),
        corpus_id=opened.id,
        weights=source.name,
        weights_digest=source.digest,
        pooling=pooling,
        meta=source.meta,
    )


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device called `name`; None is a GPU if there is one. Raises UserError when it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:  # AssertionError: torch without CUDA
        raise UserError(f"there is no device {name} here ({str(e).splitlines()[0]}): use cpu or leave it out") from e
    return device


def check_pair(train: Features, test: Features) -> int:
    """The number of classes that `train` and `test` share. Raises UserError when a probe on them would mean nothing."""
    if (train.weights_digest, train.pooling) != (test.weights_digest, test.pooling):
        raise UserError("train and test features come from different weights or pooling: extract both alike")
    return _check_labels(
        *((f.corpus, f.corpus_id, f.classes, f.y is not None and bool((f.y >= 0).all())) for f in (train, test))
    )


def check_corpora(train: Corpus, test: Corpus) -> None:
    """Raises UserError when a probe on two corpora would mean nothing, before any feature is computed."""
    _check_labels(*((str(c.path), c.id, c.classes, c.classes is not None) for c in (train, test)))


def _check_labels(train: tuple, test: tuple) -> int:
    """Of two corpora (name, id, classes, whether every image has a label): the number of classes they share."""
    for name, _, classes, labelled in (train, test):
        if classes is None or not labelled:
            raise UserError(f"{name} has no labels: a probe needs them; build it from folders named by class")
    (first, first_id, classes, _), (second, second_id, others, _) = train, test
    if classes != others:
        raise UserError(
            f"{first} and {second} have different classes ({_differing(classes, others)}): "
            "build both from folders with the same names"
        )
    if first_id == second_id:
        raise UserError(f"{first} and {second} are the same corpus: test on images that were held out")
    return len(classes)


def _differing(a: list[str], b: list[str]) -> str:
    only = sorted(set(a) ^ set(b))
    return f"{', '.join(only[:3])}{' …' if len(only) > 3 else ''} in only one" if only else "another order"


@dataclass(frozen=True)
class _Source:
    """Weights before they are loaded: enough to know what their features would be called."""

    name: str
    digest: str
    description: dict[str, Any]
    meta: dict[str, Any]
    transform: EvalTransform
    embed_dim: int

    @classmethod
    def open(cls, weights: str | Path) -> "_Source":
        if str(weights) == PIXELS:
            given = settings(PIXELS_SIZE)
            return cls(PIXELS, PIXELS_DIGEST, {"preprocess": given}, {}, EvalTransform(given), 3 * PIXELS_SIZE**2)
        path = Path(weights)
        export = Export.open(newest_export(path) if is_run(path) else path)
        prep = export.origin["preprocess"]
        # The tensors alone do not decide a feature: how many heads share them, say, stands in the config.
        description = {
            "architecture": export.config["architecture"],
            "model_args": export.config["model_args"],
            "pos_interpolation": export.origin["pos_interpolation"],
            "preprocess": prep,
        }
        # Of the bytes that are there now, not the digest somebody recorded.
        digest = sha256_of(export.path / WEIGHTS)
        dimension = int(export.config["num_features"])
        return cls(str(export.path), digest, description, export.origin["meta"], EvalTransform(prep), dimension)

    def dimension(self, pooling: Pooling) -> int:
        return self.embed_dim if self.name == PIXELS else self.embed_dim * (pooling.n_last_blocks + pooling.avgpool)

    def embedder(self, pooling: Pooling, device: torch.device, precision: str):
        """A function from uint8 images (B, 3, H, W) on `device` to float32 features (B, D)."""
        if self.name == PIXELS:
            return lambda pixels: pixels.float().div_(255).flatten(1)
        encoder: PretrainedEncoder = load_pretrained(self.name, device=device)

        def embed(pixels: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                tokens = encoder.intermediate(self.transform.normalise(pixels), n=pooling.blocks)
                return pooling(tokens).float()

        return embed


@torch.inference_mode()
def _fill(
    out: np.ndarray,
    corpus: Corpus,
    transform: EvalTransform,
    embed,
    batch_size: int,
    device: torch.device,
    workers: int | None,
) -> None:
    done = 0
    with progress(f"features of {corpus.name}", total=corpus.n) as bar:
        for pixels in _batches(corpus, transform, batch_size, workers, pin=device.type == "cuda"):
            features = embed(pixels.to(device, non_blocking=True)).cpu().numpy()
            if not np.isfinite(features).all():
                raise UserError("the encoder's features are not finite: its training diverged, take an earlier step")
            out[done : done + len(features)] = features
            done += len(features)
            bar.advance(len(features))
    assert done == corpus.n


def _standardise_channels(out: np.ndarray, rows: int = 4096) -> None:
    """Raw pixels (N, 3·32·32) in place: each colour channel to mean 0 and deviation 1 over the whole corpus."""
    channels = out.reshape(len(out), 3, -1)
    blocks = [channels[i : i + rows] for i in range(0, len(out), rows)]
    count = len(out) * channels.shape[2]
    mean = np.sum([b.sum(axis=(0, 2), dtype=np.float64) for b in blocks], axis=0) / count
    square = np.sum([np.square(b - mean[None, :, None]).sum(axis=(0, 2)) for b in blocks], axis=0) / count
    scale = 1 / np.sqrt(np.maximum(square, 1e-12))
    for block in blocks:
        block[:] = (block - mean[None, :, None]) * scale[None, :, None]


def _batches(
    corpus: Corpus, transform: EvalTransform, batch_size: int, workers: int | None, *, pin: bool
) -> Iterator[Tensor]:
    """uint8 (B, 3, H, W), every sample once, in order."""
    if workers is None:
        workers = 0 if corpus.n < FEW else min(available_cores(), 16, math.ceil(corpus.n / batch_size))
        # Batches travel through shared memory, of which containers have little: a worker that runs out of it is killed.
        batch_bytes = batch_size * transform.pixels(Image.new("RGB", (8, 8))).nbytes
        workers = min(workers, _shared_memory() // (2 * AHEAD * batch_bytes))
    loader = DataLoader(
        _Decoded(corpus, transform, batch_size),
        batch_size=None,  # an item is a batch: a run of neighbours in one shard
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=AHEAD if workers else None,
    )
    for pixels, fault in loader:
        if fault:
            raise UserError(f"{corpus.path}: {fault}; `selfsight corpus verify` lists every fault")
        yield pixels


def _shared_memory() -> int:
    """Bytes free in /dev/shm; plenty where there is no such limit."""
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 1 << 40


class _Decoded(Dataset):
    """Batch i of the corpus: (uint8 pixels, "" or what is wrong). A fault travels as words: exceptions lose theirs."""

    def __init__(self, corpus: Corpus, transform: EvalTransform, batch_size: int) -> None:
        self.corpus, self.transform, self.batch_size = corpus, transform, batch_size

    def __len__(self) -> int:
        return math.ceil(self.corpus.n / self.batch_size)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        if i >= len(self):
            raise IndexError(i)
        first = i * self.batch_size
        images = []
        for ordinal in range(first, min(first + self.batch_size, self.corpus.n)):
            try:
                images.append(self.transform.pixels(decode_image(self.corpus.sample(ordinal).data)))
            except (DecodeError, ValueError, OSError) as e:
                return torch.empty(0), f"sample {ordinal} cannot be read ({' '.join(str(e).split())})"
        return torch.from_numpy(np.stack(images)), ""
