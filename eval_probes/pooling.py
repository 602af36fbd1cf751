"""From tokens to one feature vector per image, as the published linear probes build it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from selfsight.encoders import Tokens
from selfsight.errors import UserError


@dataclass(frozen=True)
class Pooling:
    """Which tokens become the feature.

    `n_last_blocks` class tokens are concatenated, oldest block first; with `avgpool` the mean patch token of the last
    block follows (DINOv2, `create_linear_input`). `n_last_blocks=0` with `avgpool` is the mean patch token alone.
    `interleave` is DINO's own ViT-B feature (`eval_linear.py`): class token and mean alternate channel by channel, n=1.
    """

    n_last_blocks: int = 1
    avgpool: bool = False
    interleave: bool = False

    def __post_init__(self) -> None:
        if self.n_last_blocks < 0 or (self.n_last_blocks == 0 and not self.avgpool):
            raise UserError(f"no tokens are left with {self.n_last_blocks} blocks: ask for one or more, or for avgpool")
        if self.interleave and (self.n_last_blocks != 1 or not self.avgpool):
            raise UserError("interleaved features are DINO's avgpool with one block: set n_last_blocks=1 and avgpool")

    @property
    def blocks(self) -> int:
        """How many blocks' tokens are looked at."""
        return max(1, self.n_last_blocks)

    @property
    def stored(self) -> "Pooling":
        """What is kept of it: the same tokens, one after the other."""
        return replace(self, interleave=False)

    @property
    def tag(self) -> str:
        """Its name: cls, cls4, avg, cls+avg, cls4+avg; cls~avg where they are interleaved."""
        cls = "cls" + (str(self.n_last_blocks) if self.n_last_blocks > 1 else "") if self.n_last_blocks else ""
        return ("~" if self.interleave else "+").join(filter(None, (cls, "avg" if self.avgpool else "")))

    @classmethod
    def parse(cls, tag: str) -> "Pooling":
        """The pooling called `tag`. Raises UserError when there is none."""
        if not (found := re.fullmatch(r"(?:cls(\d*))?([+~]?)(avg)?", tag)) or tag != _named(found).tag:
            raise UserError(f"there are no tokens {tag!r}: choose cls, avg, cls+avg, cls4, cls4+avg or the like")
        return _named(found)

    def width(self, embed_dim: int) -> int:
        """Of a feature."""
        return embed_dim * (self.n_last_blocks + self.avgpool)

    def covers(self, other: "Pooling") -> bool:
        """Whether all tokens of `other` are among its own."""
        return self.n_last_blocks >= other.n_last_blocks and self.avgpool >= other.avgpool

    def __or__(self, other: "Pooling") -> "Pooling":
        """The smallest that covers both."""
        return Pooling(max(self.n_last_blocks, other.n_last_blocks), self.avgpool or other.avgpool)

    def columns(self, width: int, of: "Pooling") -> slice:
        """Where its tokens lie in the `width` columns that `of`, which covers it, has stored, one after the other."""
        embed_dim = width // (of.n_last_blocks + of.avgpool)
        first = (of.n_last_blocks - self.n_last_blocks) * embed_dim
        return slice(first, first + self.width(embed_dim))

    def take(self, features: np.ndarray, of: "Pooling") -> np.ndarray:
        """Its features out of those (N, D') that `of`, which covers it, has stored; a view where it can be one."""
        found = features[:, self.columns(features.shape[1], of)]
        return rearrange(found, "n (two d) -> n (d two)", two=2) if self.interleave else found

    def __call__(self, tokens: Sequence[Tokens]) -> Tensor:
        """`tokens` of the last blocks after the final norm, oldest first, at least `blocks` of them → (B, D')."""
        # An encoder without a class token speaks through its mean patch token.
        summaries = [t.avg if t.cls is None else t.cls for t in tokens[len(tokens) - self.n_last_blocks :]]
        return pool(summaries, tokens[-1].patches, self)


def _named(found: re.Match[str]) -> Pooling:
    blocks, sign, average = found.groups()
    n = 0 if blocks is None else int(blocks or 1)
    return Pooling(n, bool(average), sign == "~") if n or average else Pooling()


def pool(cls_tokens: Sequence[Tensor], patches: Tensor, pooling: Pooling) -> Tensor:
    """`cls_tokens`: `n_last_blocks` times (B, D), oldest first. `patches`: (B, N, D) of the last block. → (B, D')."""
    if not pooling.avgpool:
        return torch.cat(list(cls_tokens), dim=-1)
    average = patches.mean(dim=1)
    if pooling.interleave:
        return rearrange([cls_tokens[0], average], "two b d -> b (d two)")
    return torch.cat([*cls_tokens, average], dim=-1)
