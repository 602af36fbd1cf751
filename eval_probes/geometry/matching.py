"""Patch tokens of two views → which belong together, and how far that is from the truth.

A source token is matched to the target token of largest cosine, and the prediction is the centre of that token's cell.
No encoder can do better than the cell centre nearest to the truth (the oracle), and one that knows nothing finds any
centre alike (chance): both are computed beside every figure, for the very points that it was measured on.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval_probes.features import CONSTANT, Collapsed
from selfsight.errors import UserError

ELEMENTS = 1 << 26  # of one block of similarities: 256 MB in float32


def cell_centres(height: int, width: int, patch: int, device: torch.device | str = "cpu") -> Tensor:
    """(N, 2) float32 centres of the patches of an image of height × width pixels, row-major as tokens are."""
    x = (torch.arange(width // patch, device=device) + 0.5) * patch
    y = (torch.arange(height // patch, device=device) + 0.5) * patch
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1).flatten(0, 1)


def check_tokens(tokens: Tensor, name: str) -> None:
    """`tokens` (…, D) of several places. Raises Collapsed if they do not differ, UserError if they are not finite."""
    low, high = (t.float() for t in tokens.flatten(0, -2).aminmax(dim=0))
    difference, size = (high - low).max().item(), torch.maximum(high.abs(), low.abs()).max().item()
    if not difference < float("inf"):
        raise UserError(f"the patch tokens of {name} are not finite: its training diverged, take an earlier step")
    if difference <= CONSTANT * size:
        raise Collapsed(f"{name} gives every patch the same token: it has collapsed, there is nothing to match")


@dataclass(frozen=True)
class Matches:
    """Of M source tokens in each of B pairs; `index` counts target tokens."""

    index: Tensor  # (B, M) int64, the target token of largest cosine
    mutual: Tensor  # (B, M) bool: of all source tokens asked, this one is that target token's nearest


def match(source_BMD: Tensor, target_BND: Tensor, asked_BM: Tensor) -> Matches:
    """`asked` (B, M) bool: the source tokens that take part. In float32, on the tokens' device."""
    source, target = (F.normalize(t.float(), dim=-1) for t in (source_BMD, target_BND))
    index, mutual = [], []
    for s, t, asked in zip(*(x.split(_rows(source, target)) for x in (source, target, asked_BM)), strict=True):
        similarity = s @ t.transpose(1, 2)  # (b, M, N)
        there = similarity.argmax(dim=2)
        back = similarity.masked_fill_(~asked[..., None], -torch.inf).argmax(dim=1)  # (b, N)
        own = torch.arange(s.shape[1], device=s.device)
        index.append(there)
        mutual.append((back.gather(1, there) == own) & asked)
    return Matches(torch.cat(index), torch.cat(mutual))


def _rows(a: Tensor, b: Tensor) -> int:
    return max(1, ELEMENTS // (a.shape[1] * b.shape[1]))


@dataclass(frozen=True)
class Measured:
    """What one way of finding places is worth, for each of B pairs; all tensors (B,) float32."""

    within: dict[float, Tensor]  # radius in pixels → share of the asked points found no farther from the truth
    error: Tensor  # mean distance from the truth, pixels


def measure(distance_BM: Tensor, asked_BM: Tensor, radii: tuple[float, ...]) -> Measured:
    """From the distances of predictions to the truth, over the asked points; NaN where a pair has none."""
    n = asked_BM.sum(dim=1)
    within = {r: ((distance_BM <= r) & asked_BM).sum(dim=1) / n for r in radii}
    return Measured(within, distance_BM.masked_fill(~asked_BM, 0).sum(dim=1) / n)


def bounds(truth_BM2: Tensor, asked_BM: Tensor, centres_N2: Tensor, radii: tuple[float, ...]) -> list[Measured]:
    """[chance, oracle]: what any target token, drawn alike, and the one nearest to the truth are worth."""
    parts: list[list[Measured]] = [[], []]
    centres_1N2 = centres_N2[None]
    for truth, asked in zip(*(x.split(_rows(truth_BM2, centres_1N2)) for x in (truth_BM2, asked_BM)), strict=True):
        # Not by a matrix product, which loses the digits that decide what is within a radius.
        distance = torch.cdist(truth, centres_1N2, compute_mode="donot_use_mm_for_euclid_dist")  # (b, M, N)
        every = asked[..., None].expand_as(distance)
        parts[0].append(measure(distance.flatten(1), every.flatten(1), radii))
        parts[1].append(measure(distance.amin(dim=2), asked, radii))
    return [
        Measured({r: torch.cat([p.within[r] for p in part]) for r in radii}, torch.cat([p.error for p in part]))
        for part in parts
    ]
