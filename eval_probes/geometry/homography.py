"""Patch correspondence under homographies of one's own images: the truth is exact, and nothing has to be downloaded.

In: a corpus without labels. Each image is set against itself, seen as from elsewhere and in another light. Out: how
many of its patches are found again. The way is glue-factory's (Pautrat & Suárez et al. 2023), on tokens.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import ImageEnhance
from torch import Tensor

from eval_probes.bench import Bench
from eval_probes.extraction import AHEAD, MOST_WORKERS, read_sample
from eval_probes.geometry import planes
from eval_probes.geometry.matching import bounds, cell_centres, check_tokens, match, measure
from eval_probes.geometry.pictures import matches_picture
from eval_probes.protocol import Protocol
from eval_probes.report.pictures import choose, square
from eval_probes.results import Score, score_of
from selfsight.errors import UserError
from selfsight.machine import available_cores
from selfsight.shards.corpus import Corpus
from selfsight.shards.decode import decode_image

PICTURES = 8  # drawn, of the first images
STRATA = 3


class Pair(NamedTuple):
    """An image and itself as H shows it."""

    views: np.ndarray  # uint8 (2, 3, S, S): source, target
    H: np.ndarray  # source → target
    degrees: float  # of the rotation in H
    scale: float


@dataclass(frozen=True)
class Homography(Protocol):
    """Images are drawn by seed, and each image's homography by seed and place in the corpus: all encoders see the same
    pairs. `radii` are in patches: PCK@1P is the share found within one patch of the truth."""

    kind = "homography"
    needs = ("test",)
    images: int = 500
    size: int | None = None  # side of the square pictures, pixels; None: what the encoder was trained on
    perturbation: float = 0.15  # of a corner, as a share of the side
    degrees: float = 60.0  # largest rotation
    scale: float = 1.5  # largest zoom, in or out
    jitter: float = 0.3  # brightness, contrast and colour of the target change by up to this share
    radii: tuple[float, ...] = (1.0, 0.5, 2.0)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        planes.check_perturbation(self.perturbation)
        if not (self.scale >= 1 and self.degrees >= 0 and 0 <= self.jitter < 1):
            raise UserError("a homography probe wants scale ≥ 1, degrees ≥ 0 and 0 ≤ jitter < 1")
        if self.images < 1 or not self.radii or min(self.radii) <= 0:
            raise UserError("a homography probe wants at least one image and radii above 0")

    def run(self, bench: Bench) -> list[Score]:
        corpus, encoder = bench.need("test"), bench.encoder
        size = self.size or encoder.img_size
        if size // encoder.patch_size < 2:
            raise UserError(f"a picture of {size} pixels is one patch of {encoder.patch_size}: give size=PIXELS")
        chosen = choose(corpus.n, None, self.images, seed=self.seed)
        results, draws = [], []
        for pairs in self._batches(bench, corpus, chosen, size):
            results.append(self._measured(bench, pairs, first=len(draws)))
            draws += [(abs(pair.degrees), abs(np.log(pair.scale))) for pair in pairs]
        columns = {key: torch.cat([r[key] for r in results]).cpu().numpy() for key in results[0]}
        seen = ~np.isnan(columns["error"])  # of a coarse grid, a strong zoom may leave no patch in sight
        if not seen.any():
            raise UserError("no patch is seen in both views of any image: give a larger size or a smaller scale")
        columns = {key: values[seen] for key, values in columns.items()}
        return self._scores(bench, corpus, columns, np.array(draws)[seen], size)

    @torch.inference_mode()
    def _measured(self, bench: Bench, pairs: list[Pair], first: int) -> dict[str, Tensor]:
        """Columns (B,), still on the device. `first`: how many pairs came before."""
        views = torch.from_numpy(np.stack([pair.views for pair in pairs], axis=1))  # (2, B, 3, S, S)
        views = (views.pin_memory() if bench.device.type == "cuda" else views).to(bench.device, non_blocking=True)
        P, size = bench.encoder.patch_size, views.shape[-1]
        pixels = bench.encoder.preprocess.normalise(views.flatten(0, 1))
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.how.precision == "bf16"):
            source, target = bench.encoder(pixels).patches.float().chunk(2)  # (B, N, D)
        if first == 0:
            check_tokens(source, bench.subject.name)
        centres = cell_centres(size, size, P)
        truth = planes.apply(torch.from_numpy(np.stack([pair.H for pair in pairs])), centres.double())
        truth, centres = truth.float().to(bench.device), centres.to(bench.device)
        inside = ((truth >= 0) & (truth < size)).all(dim=2)
        found = match(source, target, inside)
        distance = (centres[found.index] - truth).norm(dim=2)
        radii = tuple(r * P for r in self.radii)
        columns = {}
        said = [measure(distance, inside, radii), *bounds(truth, inside, centres, radii)]
        for who, measured in zip(("", "chance ", "oracle "), said, strict=True):
            columns |= {f"{who}{r}": measured.within[r * P] for r in self.radii}
            columns[f"{who}error"] = measured.error
        # At least one is mutual: the most alike of all pairs.
        columns["precision"] = measure(distance, found.mutual, radii).within[radii[0]]
        columns["coverage"] = found.mutual.sum(dim=1) / inside.sum(dim=1)
        if bench.pictures is not None:
            for i in range(min(len(pairs), PICTURES - first)):
                right = distance[i] <= radii[0]
                one, other = pairs[i].views
                ends = centres, centres[found.index[i]]
                picture = matches_picture(one, other, *ends, right, shown=found.mutual[i])
                picture.save(bench.pictures / f"{self.name}-{first + i}.png")
        return columns

    def _scores(self, bench: Bench, corpus: Corpus, columns: dict, draws: np.ndarray, size: int) -> list[Score]:
        P, headline = bench.encoder.patch_size, self.radii[0]
        said = {"size": size, "patch": P, "grid": size // P}

        def score(metric: str, column: str, bound: str | None, **rest) -> Score:
            known = {} if bound is None else {w: float(columns[f"{w} {bound}"].mean()) for w in ("chance", "oracle")}
            by = {
                what: _by_stratum(columns[column], values, largest)
                for what, values, largest in (
                    ("degrees", draws[:, 0], self.degrees),
                    ("log scale", draws[:, 1], float(np.log(self.scale))),
                )
                if largest > 0
            }
            return score_of(
                metric,
                columns[column],
                self,
                bench.subject,
                train=None,
                test=corpus.id,
                details={**said, **known, "by": by},
                **rest,
            )

        return [
            *(score(f"pck@{r:g}P", str(r), str(r)) for r in self.radii),
            score("error", "error", "error", unit="px", better="lower"),
            score(f"mutual-precision@{headline:g}P", "precision", str(headline)),
            score("mutual-coverage", "coverage", None),
        ]

    def _batches(self, bench: Bench, corpus: Corpus, chosen: np.ndarray, size: int) -> Iterator[list[Pair]]:
        """Pairs made by threads, while those before them are looked at."""
        workers = bench.how.workers or min(available_cores(), MOST_WORKERS)
        at_once = max(1, bench.how.batch_size // 2)
        waiting = deque(chosen[i : i + at_once].tolist() for i in range(0, len(chosen), at_once))
        with ThreadPoolExecutor(workers, thread_name_prefix="warp") as pool:
            in_flight: deque = deque()
            while waiting or in_flight:
                while waiting and len(in_flight) < AHEAD:
                    in_flight.append([pool.submit(self.pair, corpus, i, size) for i in waiting.popleft()])
                yield [task.result() for task in in_flight.popleft()]

    def pair(self, corpus: Corpus, ordinal: int, size: int) -> Pair:
        generator = np.random.default_rng([self.seed, ordinal])
        H, degrees, scale = planes.draw(generator, size, self.perturbation, self.degrees, self.scale)
        factors = generator.uniform(1 - self.jitter, 1 + self.jitter, 3)

        def views(data: bytes) -> np.ndarray:
            source = square(decode_image(data), size)
            target = planes.warp(source, H)
            for enhance, factor in zip(
                (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors.tolist(), strict=True
            ):
                target = enhance(target).enhance(factor)
            return np.stack([np.asarray(view).transpose(2, 0, 1) for view in (source, target)])

        return Pair(read_sample(corpus, ordinal, views), H, degrees, scale)


def _by_stratum(values: np.ndarray, drawn: np.ndarray, largest: float) -> dict[str, float]:
    """Means of `values` over equal parts of what was drawn, from 0 to `largest`."""
    part = np.minimum((drawn / largest * STRATA).astype(int), STRATA - 1)
    edges = [f"{largest * i / STRATA:.3g}" for i in range(STRATA + 1)]
    return {f"{edges[i]}–{edges[i + 1]}": float(values[part == i].mean()) for i in range(STRATA) if (part == i).any()}


PRESETS = {"homography": Homography()}
