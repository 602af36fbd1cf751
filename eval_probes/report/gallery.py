"""The report's pictures as the template wants them: neighbours in the training corpus, patch colours and attention.

In: exports and corpora. Out: data URIs with their captions. Nothing is chosen by result: the images are drawn by seed.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from eval_probes import knn
from eval_probes.extraction import How, extract
from eval_probes.intervals import Z95
from eval_probes.pooling import Pooling
from eval_probes.report import pictures
from eval_probes.subject import Subject
from selfsight import load_pretrained
from selfsight.encoders.statistics import feature_spread, rankme
from selfsight.errors import UserError
from selfsight.shards.corpus import Corpus
from selfsight.shards.decode import decode_image
from selfsight.weights.folder import Export

QUERIES, NEIGHBOURS, SHOWN, HEADS = 8, 6, 8, 6
MEASURED = 2000  # queries over which the share of right neighbours is taken


@dataclass(frozen=True)
class Picture:
    uri: str
    caption: str = ""
    right: bool | None = None  # None: nothing is known of its class


@dataclass(frozen=True)
class NeighbourRow:
    query: Picture
    found: dict[str, list[Picture]]  # "trained" and "untrained" → neighbours, closest first


@dataclass(frozen=True)
class NeighbourSheet:
    rows: list[NeighbourRow]
    encoders: list[str]  # the keys of every row's `found`
    bank: int  # images searched
    shares: dict[str, "Share"]  # of neighbours with the query's class, over `measured` queries; empty without labels
    measured: int
    statistics: dict[str, "Statistics"]


@dataclass(frozen=True)
class Share:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Statistics:
    """Label-free figures of the features of one encoder."""

    rankme: float
    spread: float
    dimensions: int


@dataclass(frozen=True)
class MapRow:
    image: Picture
    colours: list[Picture]  # trained, then untrained
    attention: Picture | None  # mean over heads
    heads: list[Picture]


@dataclass(frozen=True)
class MapSheet:
    rows: list[MapRow]
    encoders: list[str]
    size: int  # pixels of the input
    grid: int  # patches along a side
    shown: dict[str, float]  # share of the features' variance that the three components hold
    heads: int  # shown of the first encoder's; 0 when it has no class token

    @property
    def attention(self) -> bool:
        return self.heads > 0

    @property
    def plain(self) -> int:
        """Columns without the single heads, which narrow pages leave out."""
        return 1 + len(self.encoders) + self.attention

    @property
    def columns(self) -> int:
        return self.plain + self.heads


def neighbours(
    encoders: dict[str, Export], train: Corpus, test: Corpus | None, *, pooling: Pooling, device: str | None
) -> NeighbourSheet:
    """The images of `train` closest to some of `test`; without a `test`, to some of its own, themselves left out.

    `encoders` maps "trained" and "untrained" to exports. Features come from the same cache as the probes'.
    """
    asked = test or train
    bank_y, asked_y = train.labels(), asked.labels()
    queries = pictures.choose(asked.n, asked_y, min(MEASURED, asked.n))
    k = min(NEIGHBOURS, train.n - (test is None))
    found, shares, statistics = {}, {}, {}
    for name, export in encoders.items():
        how, subject = How(device=device), Subject.open(export.path)
        bank = extract(subject, train, pooling, how).X
        asking = bank if test is None else extract(subject, test, pooling, how).X
        found[name] = _nearest(bank, np.asarray(asking)[queries], k, own=queries if test is None else None)
        statistics[name] = _statistics(bank)
        if bank_y is not None and asked_y is not None and k:
            right = _as_numbered_by(asked, train, asked_y[queries])[:, None] == bank_y[found[name]]  # (Q, k)
            shares[name] = _share(right.mean(axis=1))

    def picture(ordinal: int, query: int) -> Picture:
        same = None
        if bank_y is not None and asked_y is not None:
            same = bool(_as_numbered_by(asked, train, asked_y[[query]])[0] == bank_y[ordinal])
        return Picture(pictures.thumbnail(_image(train, ordinal)), _caption(train, bank_y, ordinal), same)

    rows = [
        NeighbourRow(
            Picture(pictures.thumbnail(_image(asked, query)), _caption(asked, asked_y, query)),
            {name: [picture(ordinal, query) for ordinal in found[name][i].tolist()] for name in encoders},
        )
        for i, query in enumerate(queries[:QUERIES].tolist())
    ]
    return NeighbourSheet(rows, list(encoders), train.n, shares, len(queries), statistics)


def maps(encoders: dict[str, Export], corpus: Corpus, *, device: str | None) -> MapSheet:
    """Patch colours of every encoder, attention of the first, over the same images of `corpus`."""
    labels = corpus.labels()
    chosen = pictures.choose(corpus.n, labels, SHOWN, seed=1).tolist()
    images = [_image(corpus, ordinal) for ordinal in chosen]
    made, colours, shown = {}, {}, {}
    for name, export in encoders.items():
        model = load_pretrained(export.path, device=device or "cpu")
        made[name] = pictures.patch_maps(model.encoder, images, img_size=model.img_size, attention=not made)
        colours[name], shown[name] = pictures.principal_colours(made[name].patches)
    first = next(iter(made.values()))
    rows = []
    for i, image in enumerate(images):
        heads = [] if first.attention is None else [first.attention[i].mean(axis=0), *first.attention[i][:HEADS]]
        drawn = [Picture(pictures.data_uri(pictures.heat(a))) for a in heads]
        rows.append(
            MapRow(
                Picture(pictures.thumbnail(image), _caption(corpus, labels, chosen[i])),
                [Picture(pictures.data_uri(Image.fromarray(colours[name][i]))) for name in made],
                drawn[0] if drawn else None,
                drawn[1:],
            )
        )
    return MapSheet(rows, list(encoders), first.size, first.patches.shape[1], shown, len(rows[0].heads))


def _nearest(bank: np.ndarray, queries: np.ndarray, k: int, *, own: np.ndarray | None) -> np.ndarray:
    """(Q, k) rows of `bank`, closest first. `own` (Q,) are the rows which the queries themselves are: never found."""
    unit_bank, unit_queries = (normalize(torch.from_numpy(np.asarray(x)), dim=1) for x in (bank, queries))
    if own is None:
        return knn.neighbours(unit_bank, unit_queries, k)[1].numpy()
    rows = knn.neighbours(unit_bank, unit_queries, k + 1)[1].tolist()
    # Where copies of the query fill the places before it, it is not among them, and the last one goes.
    return np.array(
        [[r for r in row if r != me][:k] for row, me in zip(rows, own.tolist(), strict=True)], dtype=np.int64
    )


def _share(right: np.ndarray) -> Share:
    """The mean of one fraction per query, as the neighbours of a query are not independent; normal 95 % interval."""
    mean = float(right.mean())
    half = Z95 * float(right.std(ddof=1)) / len(right) ** 0.5 if len(right) > 1 else 1.0
    return Share(mean, max(mean - half, 0.0), min(mean + half, 1.0))


def _as_numbered_by(asked: Corpus, train: Corpus, labels: np.ndarray) -> np.ndarray:
    """`labels` of `asked` in the numbers of `train`; −1 for a class it does not have."""
    if asked.classes is None or train.classes is None or asked.classes == train.classes:
        return labels
    number = {name: i for i, name in enumerate(train.classes)}
    return np.array([number.get(name, -1) for name in asked.classes], dtype=np.int64)[labels]


def _image(corpus: Corpus, ordinal: int) -> Image.Image:
    try:
        return decode_image(corpus.sample(ordinal).data)
    except ValueError as e:  # of damaged shards and images; features kept from before do not notice
        raise UserError(f"{corpus.path}: sample {ordinal} cannot be read ({e}): run selfsight corpus verify") from e


def _caption(corpus: Corpus, labels: np.ndarray | None, ordinal: int) -> str:
    return "" if labels is None or corpus.classes is None else corpus.classes[int(labels[ordinal])]


def _statistics(rows: np.ndarray) -> Statistics:
    some = torch.from_numpy(np.array(rows[:: max(len(rows) // 4096, 1)]))
    return Statistics(float(rankme(some)), float(feature_spread(some)), rows.shape[1])
