"""Linear heads for every input and every learning rate, trained together by SGD as if each were alone.

All heads see the same batches. Those that look at the same input are one matrix: W is (D, rates·C), so a step is two
matrix products per input, and each head's gradient depends on its own columns only. Heads are known by their place,
never by a learning rate in letters: DINOv2's names for them collide, and of its 52 heads 48 are left on one GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

ELEMENTS = 1 << 25  # of one block of logits: 128 MB in float32


@dataclass(frozen=True)
class Heads:
    """Linear heads on one input. `weight` (H, D, C), `bias` (H, C)."""

    weight: Tensor
    bias: Tensor

    def logits(self, X: Tensor) -> Tensor:
        """X (N, D) → (H, N, C)."""
        return torch.einsum("nd,hdc->hnc", X, self.weight) + self.bias[:, None]

    def each(self) -> "list[Heads]":
        """Every head by itself."""
        return [Heads(*pair) for pair in zip(self.weight.split(1), self.bias.split(1), strict=True)]


def right_ones(heads: Heads, X: Tensor, y: Tensor, top: int = 1) -> Tensor:
    """bool (H, N): whether y is among each head's `top` best; a head that diverged has none right."""
    rows = max(1, ELEMENTS // heads.bias.numel())
    found = []
    for x, target in zip(X.split(rows), y.split(rows), strict=True):
        logits = heads.logits(x)
        own = logits.gather(2, target.view(1, -1, 1).expand(len(logits), -1, 1))
        # Equal logits count against the head: a constant one has no answer.
        found.append(((logits >= own).sum(dim=2) <= top) & logits.isfinite().all(dim=2))
    return torch.cat(found, dim=1)


@dataclass
class _Group:
    """The heads on one input; rates lie side by side, head-major."""

    weight: Tensor  # (D, H·C)
    bias: Tensor  # (H·C,)
    weight_momentum: Tensor
    bias_momentum: Tensor


class Grid:
    """A head per learning rate of `lrs` for each input, of `widths[g]` dimensions; torch's SGD on the cross entropy.

    Biases are zero at first, weights are drawn from N(0, `init_std`²). Biases do not decay.
    """

    def __init__(
        self,
        widths: Sequence[int],
        lrs: Sequence[float],
        n_classes: int,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        init_std: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.n_rates, self.n_classes, self.momentum, self.weight_decay = len(lrs), n_classes, momentum, weight_decay
        self._lr = torch.tensor(lrs, device=device).repeat_interleave(n_classes)  # one per column
        generator = torch.Generator().manual_seed(seed)  # of the CPU: every device begins alike
        self._groups = []
        for width in widths:
            weight = (init_std * torch.randn(width, len(self._lr), generator=generator)).to(device)
            bias = torch.zeros(len(self._lr), device=device)
            self._groups.append(_Group(weight, bias, torch.zeros_like(weight), torch.zeros_like(bias)))

    @torch.no_grad()
    def step(self, inputs: Sequence[Tensor], y: Tensor, factor: float) -> None:
        """One step of every head on a batch: `inputs` each float32 (B, D), y int64 (B,). All rates times `factor`."""
        target = F.one_hot(y, self.n_classes)[:, None]
        for x, group in zip(inputs, self._groups, strict=True):
            logits = torch.addmm(group.bias, x, group.weight)
            p_BHC = rearrange(logits, "b (h c) -> b h c", h=self.n_rates).softmax(dim=-1).sub_(target)
            error = rearrange(p_BHC, "b h c -> b (h c)")  # the gradient of the summed cross entropy by the logits
            # The product adds to the momentum as it is written: no gradient is kept.
            group.weight_momentum.addmm_(x.T, error, beta=self.momentum, alpha=1 / len(x))
            group.bias_momentum.mul_(self.momentum).add_(error.sum(dim=0), alpha=1 / len(x))
            if self.weight_decay:
                group.weight_momentum.add_(group.weight, alpha=self.weight_decay)
            group.weight.addcmul_(group.weight_momentum, self._lr, value=-factor)
            group.bias.addcmul_(group.bias_momentum, self._lr, value=-factor)

    def heads(self) -> list[Heads]:
        """For each input, its heads in the order of the rates; views of what further steps change."""
        H = self.n_rates
        return [
            Heads(rearrange(g.weight, "d (h c) -> h d c", h=H), rearrange(g.bias, "(h c) -> h c", h=H))
            for g in self._groups
        ]

    def right(self, inputs: Sequence[Tensor], y: Tensor) -> Tensor:
        """bool (inputs · rates, N): which of N labels y each head finds in its input (N, D); input-major."""
        return torch.cat([right_ones(heads, X, y) for heads, X in zip(self.heads(), inputs, strict=True)])
