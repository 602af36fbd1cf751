"""Probes while an encoder trains: kNN and ridge on a small labelled corpus, and RankMe, α-ReQ and LiDAR, which need no
labels. In: the encoder as it is at a step, on all ranks. Out: numbers for the log.

The images are decoded once and stay in memory, each rank's share of them; each rank embeds its share, and rank 0 does
the sums. The figures are for following one run: the corpus is halved, small, and not the test set of anybody.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from eval_probes import knn, ridge
from eval_probes.intervals import wilson
from eval_probes.labelfree import alpha_req, lidar
from eval_probes.linear import right_ones
from selfsight.encoders import Encoder, rankme
from selfsight.errors import UserError, check_range
from selfsight.machine import available_cores
from selfsight.recipe import Recipe
from selfsight.shards.corpus import Corpus
from selfsight.shards.decode import DecodeError, decode_image
from selfsight.weights.preprocess import EvalTransform, settings

if TYPE_CHECKING:
    from selfsight.training.cluster import Cluster

LIDAR_IMAGES, LIDAR_VIEWS = 128, 8
BATCH = 64  # images per forward pass
LEAST = 8  # images


def open_probes(recipe: Recipe) -> "OnlineProbes | None":
    """The probes that `recipe` asks for. Raises UserError for a corpus that cannot be opened or is too small."""
    given = recipe.probe
    if given.corpus is None:
        return None
    check_range("probe.images", given.images, LEAST)
    corpus = Corpus.open(given.corpus)
    if corpus.n < LEAST:
        raise UserError(f"{given.corpus} has {corpus.n} images: probes need {LEAST} or more")
    return OnlineProbes(corpus, recipe.encoder.img_size, images=given.images)


class OnlineProbes:
    """Measures encoders of `img_size` on `images` of a corpus, the same at every call: half of each class to learn
    from, half to be tested on; some of them also in random views, for LiDAR. All ranks call it together."""

    def __init__(self, corpus: Corpus, img_size: int, *, images: int) -> None:
        self.corpus, self.transform = corpus, EvalTransform(settings(img_size))
        chosen = np.random.default_rng(0).permutation(corpus.n)[:images]
        labels = corpus.labels()
        # Neighbours in this order are of one class, and every other one is tested on.
        self.labels = None if labels is None else torch.from_numpy(labels[chosen])
        order = np.arange(len(chosen)) if labels is None else np.argsort(labels[chosen], kind="stable")
        self.chosen, self.labels = chosen[order], None if self.labels is None else self.labels[order]
        self.n_classes = len(corpus.classes or ())
        self.viewed = np.linspace(0, len(chosen) - 1, min(LIDAR_IMAGES, len(chosen))).astype(int)  # all classes
        self.augment = _augmentation(img_size)
        self._pixels: Tensor | None = None  # uint8 (own, 3, S, S)
        self._crops: Tensor | None = None  # uint8 (own, q, 3, S, S)

    def __call__(self, encoder: Encoder, cluster: "Cluster") -> dict[str, float]:
        """Numbers by their name in the log, on every rank. The caller sees to eval mode, autocast and generators."""
        if self._pixels is None:
            self._pixels, self._crops = cluster.together(lambda: self._load(cluster))
        assert self._crops is not None
        X = self._gather(self._embed(encoder, self._pixels, cluster), len(self.chosen), cluster)
        views = self._embed(encoder, rearrange(self._crops, "n q c h w -> (n q) c h w"), cluster)
        views = self._gather(rearrange(views, "(n q) d -> n (q d)", q=LIDAR_VIEWS), len(self.viewed), cluster)
        with torch.autocast(cluster.device.type, enabled=False):
            return cluster.on_first(lambda: self.measure(X, rearrange(views, "n (q d) -> n q d", q=LIDAR_VIEWS)))

    def measure(self, X: Tensor, views: Tensor) -> dict[str, float]:
        """Of features X (n, D) of the chosen images and `views` (m, q, D) of those for LiDAR."""
        if not (X.isfinite().all() and views.isfinite().all()):
            return {}
        values = {"probe/rankme": float(rankme(X)), "probe/alpha_req": alpha_req(X), "probe/lidar": lidar(views)}
        if self.labels is not None:
            y = self.labels.to(X.device)
            bank, bank_labels, queries, wanted = X[::2], y[::2], X[1::2], y[1::2]
            protocol = knn.PRESETS["knn"]
            votes = knn.classify(bank, bank_labels, queries, self.n_classes, protocol)[protocol.k]
            head, _ = ridge.choose(bank, bank_labels, self.n_classes, ridge.PRESETS["ridge"])
            right = {"knn": votes.argmax(dim=1) == wanted, "ridge": right_ones(head, queries, wanted)[0]}
            for name, items in right.items():
                k, n = int(items.sum()), len(items)
                low, high = wilson(k, n)
                values |= {f"probe/{name}": k / n, f"probe/{name}_low": low, f"probe/{name}_high": high}
            values["probe/n"] = len(wanted)
        return values

    def _embed(self, encoder: Encoder, pixels: Tensor, cluster: "Cluster") -> Tensor:
        """uint8 (n, 3, S, S) → float32 features (n, D): the class token, or the mean patch where there is none."""
        features = []
        for batch in pixels.split(BATCH):
            tokens = encoder(self.transform.normalise(batch.to(cluster.device, non_blocking=True)))
            features.append((tokens.avg if tokens.cls is None else tokens.cls).float())
        return torch.cat(features)

    def _gather(self, own: Tensor, n: int, cluster: "Cluster") -> Tensor:
        """Rows that ranks took in turn, of all of them, in order."""
        return rearrange(cluster.gather_rows(own), "(r i) d -> (i r) d", r=cluster.world_size)[:n]

    def _load(self, cluster: "Cluster") -> tuple[Tensor, Tensor]:
        """This rank's share. Raises UserError for an image that cannot be read."""
        rows = self._share(len(self.chosen), cluster)
        viewed = self.viewed[self._share(len(self.viewed), cluster)]

        def read(row: int) -> Image.Image:
            ordinal = int(self.chosen[row])
            try:
                return decode_image(self.corpus.sample(ordinal).data)
            except (DecodeError, ValueError, OSError) as e:
                raise UserError(f"{self.corpus.whereabouts(ordinal)} cannot be read ({e}): verify the corpus") from e

        with ThreadPoolExecutor(available_cores()) as pool:
            pixels = list(pool.map(lambda row: self.transform.pixels(read(row)), rows))
            images = list(pool.map(read, viewed))
        crops = [self._views(image, int(self.chosen[row])) for image, row in zip(images, viewed, strict=True)]
        return torch.from_numpy(np.stack(pixels)), torch.stack(crops)

    def _views(self, image: Image.Image, seed: int) -> Tensor:
        """uint8 (q, 3, S, S), the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.stack([self.augment(image) for _ in range(LIDAR_VIEWS)])

    def _share(self, n: int, cluster: "Cluster") -> np.ndarray:
        """Which of n rows this rank takes: every rank as many, so that all go through the encoder equally often."""
        each = -(-n // cluster.world_size)
        return (np.arange(each) * cluster.world_size + cluster.rank) % n


def _augmentation(size: int):
    """PIL image → uint8 (3, size, size), as SimCLR's appendix A but for the blur and milder crops: the same whatever
    the objective does, so that runs can be compared."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.3, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.PILToTensor(),
        ]
    )
