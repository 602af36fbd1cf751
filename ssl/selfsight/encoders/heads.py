"""Projection heads: what stands between an encoder's features and the space in which an objective compares them."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.collective import Collective


class WeightNormLinear(nn.Module):
    """A bias-free linear layer whose rows are weight_g · weight_v / ‖weight_v‖; the names are torch.weight_norm's."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(nn.Linear(in_dim, out_dim, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        # One pass over the rows, in the parameters' own precision; autocast then casts the result for the matmul.
        with torch.autocast(x.device.type, enabled=False):
            weight = torch._weight_norm(self.weight_v, self.weight_g)  # pyright: ignore[reportPrivateImportUsage]
        return F.linear(x, weight)


class DINOHead(nn.Module):
    """MLP of `nlayers`, L2 normalisation, weight-normalised prototypes: (B, in_dim) → (B, out_dim) logits.

    Caron et al. 2021, appendix C; facebookresearch/dino, vision_transformer.py, whose parameter names it keeps.
    `norm_last_layer` keeps the prototypes at length 1 by freezing `weight_g`, which stabilises long trainings.
    Without `weight_norm` the prototypes are a plain linear layer, as in DINOv3.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        nlayers: int = 3,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        mlp_bias: bool = True,
        weight_norm: bool = True,
    ) -> None:
        super().__init__()
        self.out_dim = out_dim
        nlayers = max(nlayers, 1)
        if nlayers == 1:
            self.mlp = nn.Linear(in_dim, bottleneck_dim, bias=mlp_bias)
        else:
            layers: list[nn.Module] = []
            for width in [in_dim] + [hidden_dim] * (nlayers - 2):
                norm = [nn.BatchNorm1d(hidden_dim)] if use_bn else []
                layers += [nn.Linear(width, hidden_dim, bias=mlp_bias), *norm, nn.GELU()]
            self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim, bias=mlp_bias))
        self.apply(init_linear)
        if weight_norm:
            self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
            self.last_layer.weight_g.requires_grad_(not norm_last_layer)
        else:
            self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)
            init_linear(self.last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class BatchNorm(nn.Module):
    """Batch normalisation of (B, D) over the joined batch of all ranks (Ioffe & Szegedy 2015); biased variance.

    It keeps no running statistics: heads are left behind after training, and a forward pass must not change state.
    """

    def __init__(self, dim: int, collective: Collective, *, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.collective, self.eps = collective, eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            n = len(x) * self.collective.world_size
            mean = self.collective.sum(x.sum(dim=0)) / n
            x = x - mean
            variance = self.collective.sum((x * x).sum(dim=0)) / n
            x = x * torch.rsqrt(variance + self.eps)
            return x if self.weight is None or self.bias is None else torch.addcmul(self.bias, x, self.weight)


class MLP(nn.Sequential):
    """Linear layers of the widths `dims`, with BatchNorm and ReLU between them: (B, dims[0]) → (B, dims[-1]).

    `last_bn` normalises the output too, without a learnt scale and shift. torch's own initialisation of linear layers.
    No layer has a bias but the last, unless `last_bias` is false: batch normalisation takes it off again.
    """

    def __init__(self, dims: Sequence[int], collective: Collective, *, last_bias: bool = True, last_bn: bool = False):
        layers: list[nn.Module] = []
        for i, (width, out) in enumerate(pairwise(dims), start=2):
            last = i == len(dims)
            layers.append(nn.Linear(width, out, bias=last and last_bias and not last_bn))
            if not last:
                layers += [BatchNorm(out, collective), nn.ReLU()]
        if last_bn:
            layers.append(BatchNorm(dims[-1], collective, affine=False))
        super().__init__(*layers)


def init_linear(module: nn.Module) -> None:
    """For `module.apply`: truncated normal of 0.02 for linear weights, zero for their biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
