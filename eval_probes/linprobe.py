"""MAE's linear probe on kept features (`main_linprobe.py`, `engine_finetune.py`): batch normalisation without affine
parameters, one linear layer, LARS. Without the random crops of the original, which need the encoder at every step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eval_probes.bench import Bench
from eval_probes.features import Features, check_pair
from eval_probes.linear import batches
from eval_probes.protocol import FeatureProtocol
from eval_probes.results import Score, score_of
from eval_probes.subject import pick_device
from selfsight.console import progress


@dataclass(frozen=True)
class MAELinprobe(FeatureProtocol):
    """MAE's numbers for ViT-B. The learning rate is base_lr · batch / 256 with the batch that the corpus fills."""

    kind = "mae-linprobe"
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


def evaluate(
    train: Features, test: Features, protocol: MAELinprobe | None = None, *, device: str | None = None
) -> Score:
    """Accuracy on `test` after the last epoch. Raises UserError as `check_pair` does."""
    from selfsight.training.lars import LARS  # its package pulls in the whole trainer

    protocol = protocol or PRESETS["mae-linprobe"]
    n_classes = check_pair(train, test)
    place = pick_device(device)
    X, y = train.tensor(place), train.labels(place)
    batch = min(protocol.batch_size, train.n)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(protocol.seed)
        head = LinprobeHead(X.shape[1], n_classes).to(place)
    lr = protocol.base_lr * batch / 256
    optimizer = LARS(head.parameters(), lr=lr, weight_decay=protocol.weight_decay)
    per_epoch = train.n // batch
    total = per_epoch * protocol.epochs
    with progress("linear probe of MAE", total=total) as bar:
        for step, rows in enumerate(batches(train.n, batch, total, protocol.seed)):
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step / per_epoch, protocol)
            rows = rows.to(place)
            train_step(head, optimizer, X[rows], y[rows])
            bar.advance()
    head.eval()
    with torch.inference_mode():
        pairs = zip(test.tensor(place).split(8192), test.labels(place).split(8192), strict=True)
        ranks = torch.cat([_ranks(head(x), t) for x, t in pairs]).cpu().numpy()
    details = {"lr": lr, "steps": total, "n_train": train.n, "n_classes": n_classes, "features": test.describe()}
    if n_classes > 5:
        details["top5"] = float((ranks < 5).mean())
    return score_of(
        "top1", ranks < 1, protocol, test.subject, train=train.corpus_id, test=test.corpus_id, details=details
    )


def schedule(epoch: float, protocol: MAELinprobe) -> float:
    """Factor of the learning rate at a fractional epoch: linear warm-up, then half a cosine to zero."""
    if epoch < protocol.warmup_epochs:
        return epoch / protocol.warmup_epochs
    progress = (epoch - protocol.warmup_epochs) / (protocol.epochs - protocol.warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _ranks(logits: Tensor, y: Tensor) -> Tensor:
    """How many classes are put before the right one, or level with it: (B,)."""
    return (logits >= logits.gather(1, y[:, None])).sum(dim=1) - 1


PRESETS = {"mae-linprobe": MAELinprobe()}
