"""Several corpora, or selections of them, as one endless sequence of batches: still a pure function of the step.

Each part has an `Order` of its own with the same lanes. Lane l of the batch takes its slots from lane l of the parts,
as a `Blend` by weight says, so that a chunk is still read by one rank alone. At chosen steps a whole batch comes from
one part (the homogeneous batches of DINOv3, arXiv 2508.10104 §3.1), which is then walked in a second order of its own.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from selfsight.errors import UserError
from selfsight.shards import Corpus
from selfsight.shards.selection import Selection
from selfsight.stream.blend import Blend
from selfsight.stream.order import Order

# Visits of one sample that must not show the same crops: in batches of its part alone, and in place of another sample.
ALONE, STAND_IN = 1 << 40, 1 << 41


@dataclass(frozen=True)
class Part:
    """A corpus, or a selection of it; `weight` in blended batches, and the share of steps that are its `alone`."""

    corpus: Corpus
    selection: Selection | None = None
    weight: Fraction = Fraction(1)
    alone: Fraction = Fraction(0)

    @property
    def n(self) -> int:
        """Samples in an epoch, repeats counted."""
        return self.corpus.n if self.selection is None else int(self.selection.repeats.sum())

    @property
    def chunks(self) -> int:
        """Runs of bytes that have something of the part."""
        return len(self.view.sizes)

    @cached_property
    def view(self) -> "_View":
        return _View(self)

    @property
    def id(self) -> str:
        return self.corpus.id if self.selection is None else _digest([self.corpus.id, self.selection.digest])


@dataclass(frozen=True)
class Slots:
    """Places of a batch: which part, which sample of its corpus, on which visit and in which epoch of its part (−1 in a
    batch of one part alone). All int64 (k,)."""

    part: np.ndarray
    ordinal: np.ndarray
    visit: np.ndarray
    epoch: np.ndarray


class Mixture:
    """Batches of `batch_size` from `parts`. Equal arguments give equal batches. Threads must not share one.

    Raises UserError for shares that make no mixture, and as `Order` does.
    """

    def __init__(self, parts: Sequence[Part], *, batch_size: int, lanes: int, window: int, seed: int) -> None:
        self.parts, self.batch_size, self.window = tuple(parts), batch_size, window
        self.samples_per_lane = batch_size // lanes  # of each step
        blended, alone = [p.weight for p in parts], [p.alone for p in parts]
        if min(*blended, *alone) < 0 or not any(blended) or sum(alone) >= 1:
            raise UserError(
                "mixture: weights must be at least 0 and not all 0, and the parts' alone sum to less than 1"
            )
        self._views = views = [p.view for p in parts]

        def orders(salt: int, wanted: list[Fraction]) -> list[Order | None]:
            return [
                Order(v.sizes, batch_size=batch_size, lanes=lanes, window=window, seed=seed + salt) if w else None
                for v, w in zip(views, wanted, strict=True)
            ]

        # One corpus is played in the order that its seed names, whatever else a mixture may do.
        self._blended, self._alone = orders(0, blended), orders(1, alone)
        self._pace = next(order for order in self._blended if order)  # its lanes and shares are those of all
        used = [i for i, weight in enumerate(blended) if weight]
        self._only = used[0] if len(used) == 1 else None
        self._kinds = Blend([1 - sum(alone, Fraction()), *alone], [seed, 2])  # of steps: blended, or one part alone
        self._lanes = [Blend(blended, [seed, 3, lane]) for lane in range(lanes)]

    def step(self, t: int, start: int = 0, stop: int | None = None) -> Slots:
        """Positions [start, stop) of the batch of step `t`, the whole batch by default, lane after lane."""
        stop = self.batch_size if stop is None else stop
        slots = Slots(*(np.empty(stop - start, dtype=np.int64) for _ in range(4)))
        kind, u = self._kind(t)
        for piece, lane, position in self._pace.pieces(u, start, stop):
            if kind:
                self._fill(slots, kind - 1, piece, self._alone, lane, position, ALONE)
                continue
            if self._only is not None:
                self._fill(slots, self._only, piece, self._blended, lane, position, 0)
                continue
            count = piece.stop - piece.start
            parts, before = self._lanes[lane].draw(position, count), self._lanes[lane].counts(position)
            for part in np.unique(parts).tolist():
                places = piece.start + np.flatnonzero(parts == part)
                self._fill(slots, part, places, self._blended, lane, int(before[part]), 0)
        return slots

    def stand_in(self, t: int, place: int, attempt: int) -> tuple[int, int] | None:
        """(ordinal, visit) of a sample of the same part and window as the one at `place` of step `t`, or None."""
        kind, u = self._kind(t)
        ((_, lane, position),) = self._pace.pieces(u, place, place + 1)
        if kind:
            part, orders = kind - 1, self._alone
        else:
            part, orders = int(self._lanes[lane].draw(position, 1)[0]), self._blended
            position = int(self._lanes[lane].counts(position)[part])
        order = orders[part]
        assert order is not None
        entry = order.stand_in(lane, position, attempt)
        if entry is None:
            return None
        epoch = order.epochs_over(lane, position)
        ordinals, visits = self._views[part].resolve(np.array([entry]), np.array([epoch]))
        return int(ordinals[0]), int(visits[0]) + STAND_IN + (ALONE if kind else 0)

    def chunks(self, t: int, start: int, stop: int) -> set[tuple[int, int]]:
        """(part, chunk of its corpus) of all that positions [start, stop) have in hand about step `t`."""
        kind, u = self._kind(t)
        found = set()
        for _, lane, position in self._pace.pieces(u, start, stop):
            if kind:
                asked = [(kind - 1, self._alone[kind - 1], position)]
            else:
                asked = [(p, o, int(self._lanes[lane].counts(position)[p])) for p, o in enumerate(self._blended)]
            for part, order, at in asked:
                if order:
                    found |= {(part, c) for c in self._views[part].chunks(order.chunks_at(lane, at)).tolist()}
        return found

    def epochs_over(self, t: int) -> list[tuple[int, int]]:
        """Per part, how many epochs of its blended batches are over before step `t`: in all lanes, and in any."""
        position = int(self._kinds.counts(t)[0]) * self.samples_per_lane
        counts = [lane.counts(position) for lane in self._lanes]
        found = []
        for part, order in enumerate(self._blended):
            over = [order.epochs_over(lane, int(c[part])) for lane, c in enumerate(counts)] if order else [0]
            found.append((min(over), max(over)))
        return found

    def _kind(self, t: int) -> tuple[int, int]:
        """0 for a blended step, 1 + part for one of a part alone; and how many of its kind came before."""
        kind = int(self._kinds.draw(t, 1)[0])
        return kind, int(self._kinds.counts(t)[kind])

    def _fill(
        self, slots: Slots, part: int, places: np.ndarray | slice, orders: list, lane: int, position: int, extra: int
    ) -> None:
        slots.part[places] = part
        entries, epochs = orders[part].lane(lane, position, len(slots.part[places]))
        slots.ordinal[places], visits = self._views[part].resolve(entries, epochs)
        slots.visit[places] = visits + extra
        slots.epoch[places] = -1 if extra else epochs


def identity(parts: Sequence[Part]) -> str:
    """The corpus id, or a digest over the ids, weights and shares of the parts."""
    if len(parts) == 1 and not parts[0].alone:
        return parts[0].id
    return _digest([[p.id, str(p.weight), str(p.alone)] for p in parts])


class _View:
    """The entries of a part, 0 … n−1, chunk by chunk: each selected sample as often as it is repeated."""

    def __init__(self, part: Part) -> None:
        chunks = part.corpus.chunks
        self._entries = self._copies = self._chunks = None
        self._most, self.sizes = 1, chunks["n"]
        if (selection := part.selection) is not None:
            self._most = int(selection.repeats.max())
            self._entries = np.repeat(selection.ordinals, selection.repeats)
            self._copies = np.arange(len(self._entries)) - np.repeat(
                np.cumsum(selection.repeats) - selection.repeats, selection.repeats
            )
            borders = np.searchsorted(self._entries, np.append(chunks["first"].astype(np.int64), part.corpus.n))
            self._chunks = np.flatnonzero(np.diff(borders))
            self.sizes = np.diff(borders)[self._chunks]

    def chunks(self, numbers: np.ndarray) -> np.ndarray:
        """Of chunks of the part, which ones of the corpus they are."""
        return numbers if self._chunks is None else self._chunks[numbers]

    def resolve(self, entries: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ordinals in the corpus, visits): each copy of a repeated sample is a visit of its own."""
        if self._entries is None or self._copies is None:
            return entries, epochs
        return self._entries[entries], epochs * self._most + self._copies[entries]


def _digest(what: list) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
