"""DINO's weighted k-nearest-neighbour vote (`eval_knn.py`; Wu et al., 2018): cosine similarity s, weight exp(s / T).

One exact search serves every k. The largest similarity is taken off before the exponential, so that no temperature
overflows; equal similarities are ranked by index, so that a score does not depend on the library's sort.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from eval_probes.bench import Bench
from eval_probes.features import Features, check_pair
from eval_probes.protocol import FeatureProtocol
from eval_probes.results import Score, score_of
from eval_probes.subject import pick_device
from selfsight.errors import UserError

ELEMENTS = 1 << 26  # of one block of similarities: 256 MB in float32


@dataclass(frozen=True)
class KNN(FeatureProtocol):
    """DINO's numbers. `k` is the one reported; the others stand in the details."""

    kind = "knn"
    ks: tuple[int, ...] = (10, 20, 100, 200)
    k: int = 20
    temperature: float = 0.07

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.ks) < 1 or self.k < 1:
            raise UserError(f"k={self.k} and ks={self.ks} must be positive")
        if not self.temperature > 0:
            raise UserError(f"the temperature must be positive, not {self.temperature}")
        if self.k not in self.ks:
            object.__setattr__(self, "ks", tuple(sorted({*self.ks, self.k})))

    def run(self, bench: Bench) -> list[Score]:
        train, test = bench.pair(self)
        return [evaluate(train, test, self, device=bench.how.device)]


def neighbours(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of `bank` (N, D) for each of `queries` (M, D), both L2-normalised float32, on one device.

    → similarities (M, k) descending and indices (M, k) int64; among equals the smaller index first.
    """
    assert 1 <= k <= len(bank)
    rows = max(1, ELEMENTS // len(bank))
    found = [_nearest(block @ bank.T, k) for block in queries.split(rows)]
    return torch.cat([s for s, _ in found]), torch.cat([i for _, i in found])


def _nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # One more than asked for shows whether the k-th place is shared: then only a full stable sort knows who is in.
    s, i = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    shared = s[:, k - 1] == s[:, k] if s.shape[1] > k else torch.zeros(len(s), dtype=torch.bool, device=s.device)
    s, i = s[:, :k], i[:, :k]
    by_index = i.argsort(dim=1)
    i, s = i.gather(1, by_index), s.gather(1, by_index)
    s, order = s.sort(dim=1, descending=True, stable=True)
    i = i.gather(1, order)
    if shared.any():
        exact_s, exact_i = similarity[shared].sort(dim=1, descending=True, stable=True)
        s[shared], i[shared] = exact_s[:, :k], exact_i[:, :k]
    return s, i


def votes(
    similarity: Tensor, labels: Tensor, n_classes: int, ks: tuple[int, ...], temperature: float
) -> dict[int, Tensor]:
    """Class scores for each k, from the neighbours' `similarity` (M, K) and `labels` (M, K) int64, nearest first.

    → k → (M, n_classes) float32. The weights of all K neighbours sum to one (DINOv2's softmax); DINO's exp(s / T)
    differs by a factor per row, so the ranking is the same.
    """
    weight = torch.softmax(similarity / temperature, dim=1)  # subtracts the row's maximum
    scores, so_far, done = {}, torch.zeros(len(weight), n_classes, device=weight.device), 0
    for k in sorted(set(ks)):
        so_far = so_far.scatter_add(1, labels[:, done:k], weight[:, done:k])
        scores[k], done = so_far, k
    return scores


def top5_correct(scores: Tensor, labels: Tensor) -> int:
    """How many of `labels` (M,) are among the five best of `scores` (M, C) and have a vote at all."""
    own = scores.gather(1, labels[:, None])
    return int(((scores > own).sum(dim=1) < 5).logical_and(own[:, 0] > 0).sum())


def classify(bank: Tensor, bank_labels: Tensor, queries: Tensor, n_classes: int, protocol: KNN) -> dict[int, Tensor]:
    """k → class scores (M, n_classes) of `queries` (M, D) by the labelled `bank` (N, D). Rows need not be normalised.

    A k larger than the bank is the whole bank.
    """
    bank, queries = normalize(bank, dim=1), normalize(queries, dim=1)
    clipped = {k: min(k, len(bank)) for k in protocol.ks}
    similarity, index = neighbours(bank, queries, max(clipped.values()))
    by_k = votes(similarity, bank_labels[index], n_classes, tuple(clipped.values()), protocol.temperature)
    return {k: by_k[clipped[k]] for k in protocol.ks}


def evaluate(train: Features, test: Features, protocol: KNN | None = None, *, device: str | None = None) -> Score:
    """Accuracy on `test` with `train` as the bank. Raises UserError for a pair that means nothing: see `check_pair`."""
    protocol = protocol or PRESETS["knn"]
    n_classes = check_pair(train, test)
    place = pick_device(device)
    labels = test.labels(place)
    scores = classify(train.tensor(place), train.labels(place), test.tensor(place), n_classes, protocol)
    right = {k: s.argmax(dim=1) == labels for k, s in scores.items()}
    details = {
        "k": protocol.k,
        "temperature": protocol.temperature,
        "top1": {str(k): float(r.float().mean()) for k, r in right.items()},
        "n_train": train.n,
        "n_classes": n_classes,
        "features": test.describe(),
    }
    if n_classes > 5:
        details["top5"] = {str(k): top5_correct(s, labels) / test.n for k, s in scores.items()}
    items = right[protocol.k].cpu().numpy()
    return score_of("top1", items, protocol, test.subject, train=train.corpus_id, test=test.corpus_id, details=details)


# DINO and DINOv2 name the same numbers; their votes differ by a factor per query, which ranks no class differently.
PRESETS = {name: KNN(name) for name in ("knn", "dino-knn", "dinov2-knn")}
