"""MAE's linear probe (`main_linprobe.py`, `engine_finetune.py`): batch normalisation without affine parameters, one
linear layer, LARS. On random resized crops with the encoder in the loop, or on kept features, which is no published
protocol but takes minutes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eval_probes.augmented import Augmented, crops, encoded, order
from eval_probes.bench import Bench
from eval_probes.features import Features, check_pair
from eval_probes.linear import batches, cosine
from eval_probes.pooling import Pooling
from eval_probes.protocol import FeatureProtocol
from eval_probes.results import Score, score_of
from eval_probes.subject import pick_device
from selfsight.console import progress


@dataclass(frozen=True)
class MAELinprobe(Augmented):
    """MAE's numbers for ViT-B. The learning rate is base_lr · batch / 256 with the batch that the corpus fills.

    Reports the best epoch on the test images, as the original does, and says so in the details. There the batch
    normalisation sees the 512 images of one GPU, here the whole batch.
    """

    kind = "mae-linprobe"
    version = 2
    batch_size: int = 16384
    tokens: str = "cls"
    base_lr: float = 0.1
    epochs: int = 90
    warmup_epochs: int = 10
    weight_decay: float = 0.0

    def run(self, bench: Bench) -> list[Score]:
        train, test = bench.labelled()
        pooling, device = Pooling.parse(self.tokens), bench.device
        held = bench.features(test, pooling, resize=self.resize)
        X_test, y_test = held.tensor(device), held.labels(device)
        ranks: list[np.ndarray] = []  # of the right class for each test image, after each epoch
        batch = min(self.batch_size, train.n)
        seen = islice(order(np.arange(train.n), batch, self.seed, "drop"), train.n // batch * self.epochs)
        pairs = encoded(bench, train, seen, crops(bench, train, self), pooling, pooling.blocks)

        def look(head: LinprobeHead) -> None:
            ranks.append(rank(head, X_test, y_test))

        _, details = fit(self, held.X.shape[1], len(train.classes or ()), train.n, pairs, device, look)
        accuracy = [float((r < 1).mean()) for r in ranks]
        best = int(np.argmax(accuracy))
        details |= {"chosen_on": "the test images", "epoch": best + 1, "by_epoch": accuracy}
        return [_score(self, ranks[best], held, train.id, details)]


@dataclass(frozen=True)
class MAEOnFeatures(FeatureProtocol):
    """The same numbers on features of whole images, and the score after the last epoch."""

    kind = "mae-linprobe-kept"
    base_lr: float = 0.1
    batch_size: int = 16384
    epochs: int = 90
    warmup_epochs: int = 10
    weight_decay: float = 0.0
    seed: int = 0

    def run(self, bench: Bench) -> list[Score]:
        train, test = bench.pair(self)
        return [evaluate(train, test, self, device=bench.how.device)]


class LinprobeHead(nn.Sequential):
    """BatchNorm1d(affine=False, eps=1e-6), then Linear initialised N(0, 0.01): (B, D) → (B, C)."""

    def __init__(self, dimension: int, n_classes: int) -> None:
        linear = nn.Linear(dimension, n_classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.BatchNorm1d(dimension, affine=False, eps=1e-6), linear)


def train_step(head: LinprobeHead, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """One step of cross entropy; gives the logits (B, C) and the loss () before it. The gradients stay."""
    head.train()
    optimizer.zero_grad()
    logits = head(x)
    loss = cross_entropy(logits, y)
    loss.backward()
    optimizer.step()
    return logits.detach(), loss.detach()


def fit(
    protocol: MAELinprobe | MAEOnFeatures,
    dimension: int,
    n_classes: int,
    n: int,
    pairs: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    after_epoch: Callable[[LinprobeHead], None] | None = None,
) -> tuple[LinprobeHead, dict]:
    """Trains a head on `pairs`, the batches of all epochs: features (B, D) and labels (B,) of `n` images.

    → it, and what to tell of it.
    """
    from selfsight.training.lars import LARS  # its package pulls in the whole trainer

    batch = min(protocol.batch_size, n)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(protocol.seed)
        head = LinprobeHead(dimension, n_classes).to(device)
    lr = protocol.base_lr * batch / 256
    optimizer = LARS(head.parameters(), lr=lr, weight_decay=protocol.weight_decay)
    per_epoch = n // batch
    total = per_epoch * protocol.epochs
    with progress(protocol.name, total=total) as bar:
        for step, (x, y) in enumerate(pairs):
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step / per_epoch, protocol)
            train_step(head, optimizer, x, y)
            if after_epoch and (step + 1) % per_epoch == 0:
                after_epoch(head)
            bar.advance()
    return head, {"lr": lr, "steps": total, "n_train": n, "n_classes": n_classes}


def evaluate(
    train: Features, test: Features, protocol: MAEOnFeatures | None = None, *, device: str | None = None
) -> Score:
    """Accuracy on `test` after the last epoch. Raises UserError as `check_pair` does."""
    protocol = protocol or PRESETS["mae-linprobe-kept"]
    n_classes = check_pair(train, test)
    place = pick_device(device)
    X, y = train.tensor(place), train.labels(place)
    batch = min(protocol.batch_size, train.n)
    drawn = batches(train.n, batch, train.n // batch * protocol.epochs, protocol.seed)
    pairs = ((X[rows], y[rows]) for rows in (rows.to(place) for rows in drawn))
    head, details = fit(protocol, X.shape[1], n_classes, train.n, pairs, place)
    return _score(protocol, rank(head, test.tensor(place), test.labels(place)), test, train.corpus_id, details)


def schedule(epoch: float, protocol: MAELinprobe | MAEOnFeatures) -> float:
    """Factor of the learning rate at a fractional epoch: linear warm-up, then half a cosine to zero."""
    if epoch < protocol.warmup_epochs:
        return epoch / protocol.warmup_epochs
    return cosine((epoch - protocol.warmup_epochs) / (protocol.epochs - protocol.warmup_epochs))


@torch.no_grad()
def rank(head: LinprobeHead, X: Tensor, y: Tensor) -> np.ndarray:
    """How many classes the head puts before the right one of each row of X (N, D), or level with it: int64 (N,)."""
    head.eval()
    found = []
    for x, target in zip(X.split(8192), y.split(8192), strict=True):
        logits = head(x)
        found.append((logits >= logits.gather(1, target[:, None])).sum(dim=1) - 1)
    return torch.cat(found).cpu().numpy()


def _score(
    protocol: MAELinprobe | MAEOnFeatures, ranks: np.ndarray, test: Features, train_id: str, details: dict
) -> Score:
    details = {**details, "features": test.describe()}
    if details["n_classes"] > 5:
        details["top5"] = float((ranks < 5).mean())
    items = ranks < 1
    return score_of("top1", items, protocol, test.subject, train=train_id, test=test.corpus_id, details=details)


PRESETS = {"mae-linprobe": MAELinprobe(), "mae-linprobe-kept": MAEOnFeatures()}
