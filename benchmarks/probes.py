"""What probing costs: nearest neighbours, a grid of linear heads and the extraction of features, each beside its rival.

    python benchmarks/probes.py [--quick] [--json] [--queries N] [--bank N] [--width D]

kNN beside scikit-learn and faiss on the same features; DINOv2's grid of 52 linear heads beside the same heads one after
the other; extraction from JPEG shards beside the bare encoder on one batch in memory. All in one process, in turn.
"""

import argparse
import multiprocessing
import resource
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Absent, Row, Sample
from benchmarks.photographs import prepare
from eval_probes import knn, linear
from eval_probes.extraction import How, extract
from eval_probes.features import Features
from eval_probes.linear_crops import DINOV2_LRS
from eval_probes.pooling import Pooling
from eval_probes.subject import Subject, pick_device
from selfsight import encoders
from selfsight.console import say
from selfsight.recipe import EncoderConfig
from selfsight.shards.corpus import Corpus
from selfsight.weights import export_encoder, load_pretrained

K = 20
CLASSES, WIDTH = 10, 384  # of the linear grid: ViT-S on CIFAR-10
TRAIN, TEST, EPOCHS = 50_000, 10_000, 10
IMAGENET = (1_281_167, 1024)  # ViT-L's bank
GRID_AIM, EXTRACTION_AIM, MEMORY_AIM = 60.0, 0.95, 1024.0  # seconds, share of the bare encoder, MB


def main() -> None:
    args = parser().parse_args()
    device = pick_device()
    repeats = 2 if args.quick else 5
    say("nearest neighbours")
    rows = neighbours(args.bank or (10_000 if args.quick else 50_000), args.queries, args.width, device, repeats)
    say("linear heads")
    rows += heads(2_000 if args.quick else TRAIN, device, 2)
    if not args.quick:
        rows += [whole_grid(TRAIN, TEST, device), memory(*IMAGENET)]
    say("extraction")
    with tempfile.TemporaryDirectory(prefix="selfsight-probes-") as folder:
        n = 2048 if device.type == "cuda" else 16 if args.quick else 256
        name = "vit_base_patch16_224" if device.type == "cuda" else "vit_small_patch16_224"
        rows += extraction(EncoderConfig(name, 224), n, Path(folder), device, repeats)
    harness.report("probes", harness.machine(["scikit-learn", "faiss-cpu", "faiss-gpu"]), rows, args)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    harness.arguments(parser)
    parser.add_argument("--queries", type=int, default=1000, help="of a kNN search (default 1000)")
    parser.add_argument("--bank", type=int, help="images among which they are sought (default 50,000; quick: 10,000)")
    parser.add_argument("--width", type=int, default=WIDTH, help=f"of those features (default {WIDTH})")
    return parser


def clustered(n: int, width: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (n, width) around a centre for each class, and labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(99))
    return (0.2 * centres[y] + torch.randn(n, width, generator=generator)).to(device), y.to(device)


def timed(work: Callable[[], int], device: torch.device) -> Callable[[], Sample]:
    """`harness.timed` of work that the device has finished."""

    def finished() -> int:
        done = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return done

    return lambda: harness.timed(finished)


def measured(contestants: dict[str, Callable[[], int]], device: torch.device, repeats: int, unit: str) -> list[Row]:
    """A row of each one's rate, medians; everyone has warmed up once."""
    works = {}
    for name, work in contestants.items():
        try:
            work()
            works[name] = timed(work, device)
        except ImportError as e:
            works[name] = _absent(f"{e.name} is not installed")
    found = harness.interleave(works, repeats)
    return [
        Row(name, None, unit, note=str(samples))
        if isinstance(samples, Absent)
        else Row(name, harness.middle(samples, "rate"), unit, more={"per core": harness.middle(samples, "per_core")})
        for name, samples in found.items()
    ]


def _absent(why: str) -> Callable[[], Sample]:
    def refuse() -> Sample:
        raise Absent(why)

    return refuse


def neighbours(n: int, queries: int, width: int, device: torch.device, repeats: int) -> list[Row]:
    """The `K` nearest of `n` for each query, by cosine similarity."""
    bank, asked = (torch.nn.functional.normalize(clustered(m, width, device, s)[0]) for m, s in ((n, 0), (queries, 1)))
    host, host_asked = bank.cpu().numpy(), asked.cpu().numpy()

    def ours() -> int:
        knn.neighbours(bank, asked, K)
        return queries

    def sklearn() -> int:
        from sklearn.neighbors import NearestNeighbors

        NearestNeighbors(n_neighbors=K, algorithm="brute").fit(host).kneighbors(host_asked)
        return queries

    def faiss() -> int:
        import faiss

        index = faiss.IndexFlatIP(width)
        index.add(host)
        index.search(host_asked, K)
        return queries

    what = f"kNN of {queries:,} in {n:,} × {width}"
    contestants = {f"{what}: selfsight": ours, f"{what}: scikit-learn": sklearn, f"{what}: faiss": faiss}
    rows = measured(contestants, device, repeats, "queries/s")
    for rival in rows[1:]:
        harness.compare(rows, rival.name, rows[0].name)
    return rows


def heads(n: int, device: torch.device, repeats: int) -> list[Row]:
    """One epoch of DINOv2's grid on `n` images; one after the other is one rate for each choice of tokens."""
    pooling = Pooling(4, True)
    X, y = clustered(n, pooling.width(WIDTH), device)
    protocol = linear.Linear(tokens=linear.DINOV2_TOKENS, lrs=DINOV2_LRS, epochs=1, min_steps=1)
    inputs = [p.columns(X.shape[1], pooling) for p in protocol.poolings()]
    narrow = [X[:, columns].contiguous() for columns in inputs]

    def together() -> int:
        linear.train_heads(X, y, CLASSES, protocol, inputs)
        return n * len(inputs) * len(protocol.lrs)

    def alone() -> int:
        for x in narrow:
            linear.train_heads(x, y, CLASSES, replace(protocol, lrs=protocol.lrs[-1:]))
        return n * len(inputs)

    what = f"linear heads on {n:,} × {WIDTH}"
    rows = measured(
        {f"{what}: one after the other (4 of 52)": alone, f"{what}: 52 at once": together},
        device,
        repeats,
        "heads·images/s",
    )
    harness.compare(rows, rows[1].name, rows[0].name, aim=1.0)
    return rows


def whole_grid(n: int, n_test: int, device: torch.device) -> Row:
    """The protocol itself on kept features: the grid for ten epochs, the choice, the chosen head again, the test."""
    pooling, subject = Pooling(4, True), Subject("drawn", "0" * 64, {}, {}, WIDTH)
    train, test = (
        Features(x.numpy(), y.numpy(), [str(c) for c in range(CLASSES)], name, name, subject, pooling)
        for name, (x, y) in (
            ("train", clustered(n, pooling.width(WIDTH), torch.device("cpu"))),
            ("test", clustered(n_test, pooling.width(WIDTH), torch.device("cpu"), seed=1)),
        )
    )
    protocol = linear.Linear(tokens=linear.DINOV2_TOKENS, lrs=DINOV2_LRS, epochs=EPOCHS, min_steps=1)
    sample = harness.timed(lambda: bool(linear.evaluate(train, test, protocol, device=str(device))))
    name = f"linear-grid on {n:,} × {n_test:,}: 52 heads, {EPOCHS} epochs, choice, test"
    return Row(name, sample.wall, "s", aim=GRID_AIM, more={"CPU s": sample.cpu})


def memory(n: int, width: int, queries: int = 128) -> Row:
    """What a search needs beside the bank and the queries, in a process of its own, on a CPU."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        megabytes = pool.apply(_peak, (n, width, queries))
    return Row(f"kNN in {n:,} × {width:,}: memory beside the bank", megabytes, "MB", aim=MEMORY_AIM)


def _peak(n: int, width: int, queries: int) -> float:
    bank = torch.empty(n, width).uniform_(-1, 1)
    bank.div_(torch.linalg.vector_norm(bank, dim=1, keepdim=True))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    knn.neighbours(bank, bank[:queries], K)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def extraction(config: EncoderConfig, n: int, work: Path, device: torch.device, repeats: int) -> list[Row]:
    """`n` photographs from shards to kept features, and as many through the encoder alone."""
    corpus = Corpus.open(prepare(None, work, n, shards=1)[1])
    weights = export_encoder(encoders.build(config), config, work / "weights", meta={})
    encoder = load_pretrained(weights, device=device)
    # Weights that are in memory already: loading them is not a part of the pass.
    loaded = type("Loaded", (Subject,), {"load": lambda self, device: encoder})
    subject = loaded(**vars(Subject.open(weights)))
    how = How(batch_size=min(n, 256 if device.type == "cuda" else 16))
    pixels = torch.zeros(how.batch_size, 3, config.img_size, config.img_size, dtype=torch.uint8, device=device)
    transform, caches = subject.transform(), count()

    @torch.inference_mode()
    def bare() -> int:
        for _ in range(n // how.batch_size):
            encoder.intermediate(transform.normalise(pixels))
        return n // how.batch_size * how.batch_size

    def ours() -> int:
        extract(subject, corpus, None, replace(how, device=str(device), cache=str(work / f"cache{next(caches)}")))
        return n

    rows = measured(
        {f"{config.name}: bare encoder": bare, f"{config.name}: extraction": ours}, device, repeats, "images/s"
    )
    harness.compare(rows, rows[1].name, rows[0].name, EXTRACTION_AIM)
    return rows


if __name__ == "__main__":
    harness.run(main)
