"""Attentive probes: a learned query pools the patch tokens of a frozen encoder, then a linear layer (CAPI,
`eval_classification.py`, arXiv:2502.08769). A grid of learning rates and weight decays is trained at once.

The query being fixed, key and value weights need not meet every token: (K x)·q = x·(Kᵀq), and the weighted mean of V x
is V of the weighted mean of x. That is the same function at a small part of the cost; the bias of the keys, which moves
no softmax, is left out.
"""

import math
from dataclasses import dataclass
from itertools import islice, product

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eval_probes.augmented import Augmented, Order, crops, encoded, frames, once, order
from eval_probes.bench import Bench
from eval_probes.results import Score, score_of
from selfsight.console import progress
from selfsight.encoders import Tokens
from selfsight.errors import UserError
from selfsight.shards.corpus import Corpus


class AttentiveHeads(nn.Module):
    """`n` heads that begin differently: tokens (B, N, D) → logits (n, B, C). `head_dim` is of the attention's heads."""

    def __init__(self, n: int, dimension: int, n_classes: int, head_dim: int, init_std: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(n, dimension))
        self.key = nn.Parameter(torch.empty(n, dimension, dimension))  # as nn.Linear has its weight: (out, in)
        self.value = nn.Parameter(torch.empty(n, dimension, dimension))
        self.value_bias = nn.Parameter(torch.zeros(n, dimension))
        self.weight = nn.Parameter(torch.empty(n, n_classes, dimension))
        self.bias = nn.Parameter(torch.zeros(n, n_classes))
        self.head_dim = head_dim
        for parameter in self.decayed():
            nn.init.trunc_normal_(parameter, std=init_std)

    def decayed(self) -> list[nn.Parameter]:
        """All but the biases."""
        return [self.query, self.key, self.value, self.weight]

    def forward(self, x: Tensor) -> Tensor:
        n, d = len(self.query), self.head_dim
        query = rearrange(self.query, "n (a d) -> n a d", d=d)
        key = rearrange(self.key, "n (a d) c -> n a d c", d=d)
        value = rearrange(self.value, "n (a d) c -> n a d c", d=d)
        asked = torch.einsum("nad,nadc->nac", query, key) / math.sqrt(d)  # Kᵀq
        attention = (rearrange(asked, "n a c -> (n a) c") @ x.mT).softmax(dim=-1)  # (B, n·a, N)
        pooled = rearrange(attention @ x, "b (n a) c -> b n a c", n=n)
        pooled = rearrange(torch.einsum("bnac,nadc->bnad", pooled, value), "b n a d -> b n (a d)") + self.value_bias
        return torch.einsum("bnd,ncd->nbc", pooled, self.weight) + self.bias[:, None]


class HeadwiseAdamW:
    """torch's AdamW with a rate and a decay for each head: each slice of its parameters' first dimension."""

    def __init__(
        self, heads: AttentiveHeads, lrs: Tensor, weight_decays: Tensor, betas: tuple[float, ...], eps: float = 1e-8
    ) -> None:
        self.lrs, self.betas, self.eps, self.steps = lrs, betas, eps, 0
        decayed = set(heads.decayed())
        self._state = [
            (p, torch.zeros_like(p), torch.zeros_like(p), weight_decays if p in decayed else torch.zeros_like(lrs))
            for p in heads.parameters()
        ]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """All rates times `factor`; the gradients are gone afterwards."""
        self.steps += 1
        one, two = self.betas
        for p, m, v, decay in self._state:
            assert p.grad is not None
            shape = (-1, *[1] * (p.ndim - 1))
            lr = (factor * self.lrs).view(shape)
            p.mul_(1 - lr * decay.view(shape))
            m.lerp_(p.grad, 1 - one)
            v.mul_(two).addcmul_(p.grad, p.grad, value=1 - two)
            size = (v / (1 - two**self.steps)).sqrt_().add_(self.eps)
            p.sub_(lr / (1 - one**self.steps) * m / size)
            p.grad = None


@dataclass(frozen=True)
class Attentive(Augmented):
    """CAPI's numbers, rates times batch / 256; the best head on a tenth of the training images meets the test images.

    As published but for what follows. Its rates are for as many GPUs of 128 images as there are; 1,024 images in 12,500
    steps are ten epochs of ImageNet. There the loss is the mean over the heads, which Adam's ε sees: here it is their
    sum, so that no head depends on how many others there are.
    """

    kind = "attentive"
    lrs: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
    weight_decays: tuple[float, ...] = (5e-4, 1e-3, 5e-2)
    betas: tuple[float, ...] = (0.9, 0.95)
    steps: int = 12_500
    warmup_steps: int = 1250
    head_dim: int = 64
    init_std: float = 0.02
    held_out: float = 0.1  # fraction of the training images on which rate and decay are chosen
    seed: int = 42

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lrs or min(self.lrs) <= 0 or not self.weight_decays or not 0 < self.held_out < 1:
            raise UserError(f"{self.name} needs positive learning rates, weight decays and 0 < held_out < 1")
        if not 0 <= self.warmup_steps < self.steps:
            raise UserError(f"{self.name} cannot warm up for {self.warmup_steps} of {self.steps} steps")

    def factor(self, step: int) -> float:
        """Of the learning rates: linear from 0 to 1, both included, then half a cosine to 0."""
        if step < self.warmup_steps:
            return step / max(1, self.warmup_steps - 1)
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps - 1)))

    def run(self, bench: Bench) -> list[Score]:
        train, test = bench.labelled()
        dimension, device = bench.subject.embed_dim, bench.device
        if dimension % self.head_dim:
            raise UserError(
                f"heads of {self.head_dim} do not divide the encoder's {dimension} dimensions: set head_dim"
            )
        rows = np.random.default_rng(self.seed).permutation(train.n)
        n_fit = round((1 - self.held_out) * train.n)
        if not 0 < n_fit < train.n:
            raise UserError(f"{train.path} has too few images to hold {self.held_out:g} of them out")
        grid = list(product(self.lrs, self.weight_decays))
        lrs, decays = torch.tensor(grid, device=device).unbind(dim=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            heads = AttentiveHeads(len(grid), dimension, len(train.classes or ()), self.head_dim, self.init_std)
        heads.to(device)
        optimizer = HeadwiseAdamW(heads, lrs * self.batch_size / 256, decays, self.betas)
        seen = islice(order(rows[:n_fit], self.batch_size, self.seed), self.steps)
        with progress(self.name, total=self.steps) as bar:
            for step, (x, y) in enumerate(encoded(bench, train, seen, crops(bench, train, self), _patches)):
                logits = heads(x)
                losses = cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="sum")
                (losses / len(y)).backward()
                optimizer.step(self.factor(step))
                bar.advance()
        accuracy = self._right(bench, train, once(rows[n_fit:], self.batch_size), heads).float().mean(dim=1).tolist()
        best = int(np.argmax(accuracy))  # the first among equals
        right = self._right(bench, test, once(np.arange(test.n), self.batch_size), heads)[best]
        details = {
            "lr": grid[best][0],
            "weight_decay": grid[best][1],
            "held_out_accuracy": accuracy[best],
            "held_out": [
                {"lr": lr, "weight_decay": decay, "accuracy": a} for (lr, decay), a in zip(grid, accuracy, strict=True)
            ],
            "steps": self.steps,
            "n_train": train.n,
            "n_classes": len(train.classes or ()),
        }
        items = right.numpy()
        return [score_of("top1", items, self, bench.subject, train=train.id, test=test.id, details=details)]

    @torch.no_grad()
    def _right(self, bench: Bench, corpus: Corpus, batches: Order, heads: AttentiveHeads) -> Tensor:
        """bool (heads, N) on the CPU: which images each head finds."""
        found = []
        for x, y in encoded(bench, corpus, batches, frames(bench, corpus, self.resize), _patches):
            found.append((heads(x).argmax(dim=2) == y).cpu())
        return torch.cat(found, dim=1)


def _patches(tokens: list[Tokens]) -> Tensor:
    return tokens[-1].patches


PRESETS = {"capi-attentive": Attentive("capi-attentive")}
