"""The published linear probes on random resized crops, the encoder in the loop: DINO's (`eval_linear.py`) and DINOv2's
(`eval/linear.py`). One pass over the crops trains every head of the grid.

Both report the best they find on the very images that they test on; so do these presets, and say so in the details. The
protocol `linear` selects on training images instead.
"""

import math
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from operator import or_

import numpy as np
import torch

from eval_probes.augmented import Augmented, crops, encoded, order
from eval_probes.bench import Bench
from eval_probes.grid import Grid
from eval_probes.linear import DINOV2_TOKENS, cosine
from eval_probes.pooling import Pooling
from eval_probes.results import Score, score_of
from selfsight.console import progress
from selfsight.errors import UserError


@dataclass(frozen=True)
class LinearOnCrops(Augmented):
    """SGD from N(0, 0.01) weights, rates times batch / 256, cosine to zero.

    As published but for what follows. Both ran on eight GPUs of 128 images each; here one device has all 1,024. All of
    DINOv2's heads live: by their names, 4 of 52 do not on one GPU. Interleaved channels (DINO's for ViT-B) lie one
    after the other, which is the same to a linear head.
    """

    kind = "linear-crops"
    tokens: tuple[str, ...] = ("cls4",)
    lrs: tuple[float, ...] = (1e-3,)
    epochs: int = 100
    epoch_steps: int = 0  # 0: an epoch is every image once, its last batch what is left
    momentum: float = 0.9
    weight_decay: float = 0.0
    init_std: float = 0.01
    anneal: str = "epochs"  # the rate changes from epoch to epoch, or with all steps
    best_epoch: bool = True  # the score is that of the best epoch, or of the last

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lrs or min(self.lrs) <= 0 or not self.tokens or self.epochs < 1 or self.epoch_steps < 0:
            raise UserError(f"{self.name} needs tokens, positive learning rates, and epochs of at least a step")
        if self.anneal not in ("epochs", "steps"):
            raise UserError(f"there is no annealing by {self.anneal!r}: choose epochs or steps")

    def run(self, bench: Bench) -> list[Score]:
        train, test = bench.labelled()
        poolings = [Pooling.parse(tag).stored for tag in self.tokens]
        widest, device = reduce(or_, poolings), bench.device
        held = bench.features(test, widest, resize=self.resize)
        y_test = held.labels(device)
        inputs = [p.columns(held.X.shape[1], widest) for p in poolings]
        X_test = held.tensor(device)
        grid = Grid(
            [p.width(bench.subject.embed_dim) for p in poolings],
            [lr * self.batch_size / 256 for lr in self.lrs],
            len(train.classes or ()),
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            init_std=self.init_std,
            seed=self.seed,
            device=device,
        )
        epoch = self.epoch_steps or math.ceil(train.n / self.batch_size)
        total = epoch * self.epochs
        seen = order(np.arange(train.n), self.batch_size, self.seed, "carry" if self.epoch_steps else "keep")
        batches = encoded(bench, train, islice(seen, total), crops(bench, train, self), widest, widest.blocks)
        found: list[torch.Tensor] = []  # bool (heads, N) at the end of each epoch that is looked at
        with progress(self.name, total=total) as bar:
            for step, (x, y) in enumerate(batches):
                done = step / total if self.anneal == "steps" else step // epoch / self.epochs
                grid.step([x[:, columns] for columns in inputs], y, cosine(done))
                if (step + 1) % epoch == 0 and (self.best_epoch or step + 1 == total):
                    found.append(grid.right([X_test[:, columns] for columns in inputs], y_test).cpu())
                bar.advance()
        accuracy = np.stack([right.float().mean(dim=1).numpy() for right in found])  # (epochs looked at, heads)
        when, best = divmod(int(accuracy.argmax()), accuracy.shape[1])  # the first among equals
        heads = [(tokens, lr) for tokens in self.tokens for lr in self.lrs]
        details = {
            "lr": heads[best][1],
            "chosen_on": "the test images",
            "epoch": when + 1 if self.best_epoch else self.epochs,
            "heads": [
                {"tokens": tokens, "lr": lr, "accuracy": float(a)}
                for (tokens, lr), a in zip(heads, accuracy[when], strict=True)
            ],
            "best_by_epoch": accuracy.max(axis=1).tolist(),
            "steps": total,
            "n_train": train.n,
            "n_classes": grid.n_classes,
            "features": {
                **held.describe(),
                "tokens": heads[best][0],
                "dimension": poolings[best // len(self.lrs)].width(bench.subject.embed_dim),
            },
        }
        items = found[when][best].numpy()
        return [score_of("top1", items, self, bench.subject, train=train.id, test=test.id, details=details)]


DINOV2_LRS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)

PRESETS = {
    "dino-linear": LinearOnCrops("dino-linear", interpolation="bilinear"),
    "dino-linear-base": LinearOnCrops("dino-linear-base", interpolation="bilinear", tokens=("cls~avg",)),
    "dinov2-linear": LinearOnCrops(
        "dinov2-linear",
        tokens=DINOV2_TOKENS,
        lrs=DINOV2_LRS,
        epochs=10,
        epoch_steps=1250,
        anneal="steps",
        best_epoch=False,
    ),
}
