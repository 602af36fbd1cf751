import hashlib
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from selfsight.errors import UserError
from selfsight.shards.selection import Selection
from selfsight.stream.mixture import ALONE, STAND_IN, Mixture, Part, identity
from selfsight.stream.order import Order

BATCH, LANES = 24, 4


def selection(ordinals, repeats):
    return Selection(np.array(ordinals, dtype=np.int64), np.array(repeats, dtype=np.int64), "f" * 64)


def mixture(parts, seed=3):
    return Mixture(parts, batch_size=BATCH, lanes=LANES, window=2, seed=seed)


@pytest.fixture
def three(images):
    """A large part, a small one, and one of which a tenth of the steps is made alone."""
    return [
        Part(images([8] * 30), weight=Fraction("0.7")),
        Part(images([5] * 10, name="1" * 64), weight=Fraction("0.2")),
        Part(images([7] * 9, name="2" * 64), weight=Fraction("0.1"), alone=Fraction("0.1")),
    ]


def test_one_corpus_is_played_as_its_order_says(images):
    order = Order(images().chunks["n"], batch_size=BATCH, lanes=LANES, window=2, seed=3)
    for t in (0, 7, 1234):
        slots, (ordinals, visits) = mixture([Part(images())]).step(t), order.step(t)
        np.testing.assert_array_equal(slots.ordinal, ordinals)
        np.testing.assert_array_equal(slots.visit, visits)
        assert not slots.part.any()


def test_ranks_share_out_one_batch_and_any_step_is_reached_at_once(three):
    walked = mixture(three)
    want = {t: walked.step(t) for t in range(60)}
    for t in (59, 0, 31):
        for world_size in (1, 2, 3, 8, 24):
            share = BATCH // world_size
            parts = [mixture(three).step(t, r * share, (r + 1) * share) for r in range(world_size)]
            for name in ("part", "ordinal", "visit", "epoch"):
                joined = np.concatenate([getattr(p, name) for p in parts])
                np.testing.assert_array_equal(joined, getattr(want[t], name))


def test_weights_hold_and_every_epoch_of_every_part_is_whole(three):
    m, steps = mixture(three), 2000
    drawn = [m.step(t) for t in range(steps)]
    alone = [s for s in drawn if s.epoch[0] < 0]
    assert abs(len(alone) - steps / 10) < 60  # exact at every block of 4096 steps
    assert all((s.part == 2).all() and (s.epoch == -1).all() and (s.visit >= ALONE).all() for s in alone)
    blended = [s for s in drawn if s.epoch[0] >= 0]
    share = np.bincount(np.concatenate([s.part for s in blended])) / (len(blended) * BATCH)
    np.testing.assert_allclose(share, [0.7, 0.2, 0.1], atol=0.01)
    seen = Counter((p, e) for s in blended for p, e in zip(s.part.tolist(), s.epoch.tolist(), strict=True))
    for part, (least, most) in enumerate(m.epochs_over(steps)):
        assert 0 < least <= most
        for epoch in range(least):
            assert seen[part, epoch] == three[part].n
        assert max(e for p, e in seen if p == part) <= most
    every = Counter(x for s in drawn for x in zip(s.part.tolist(), s.ordinal.tolist(), s.visit.tolist(), strict=True))
    assert set(every.values()) == {1}


def test_weights_are_exact_over_whole_blocks(images):
    m = Mixture(
        [Part(images([9] * 4), weight=Fraction("0.9")), Part(images([9] * 4, name="1" * 64), weight=Fraction("0.1"))],
        batch_size=32, lanes=2, window=2, seed=0,
    )  # fmt: skip
    drawn = np.concatenate([m.step(t).part for t in range(256)])  # 4096 slots in each of the two lanes
    assert abs(int((drawn == 1).sum()) - 819.2) < 2


def test_a_selection_is_a_view(images):
    chosen = selection([3, 17, 18, 40, 79], [1, 1, 3, 1, 2])
    part = Part(images([4] * 20), chosen)
    assert (part.n, part.chunks) == (8, 4)
    m = Mixture([part], batch_size=4, lanes=2, window=2, seed=1)
    for epoch in range(3):
        slots = [m.step(t) for t in (2 * epoch, 2 * epoch + 1)]
        ordinals = np.concatenate([s.ordinal for s in slots])
        assert Counter(ordinals.tolist()) == {3: 1, 17: 1, 18: 3, 40: 1, 79: 2}
        visits = np.concatenate([s.visit for s in slots])
        assert set(visits[ordinals == 18]) == {3 * epoch, 3 * epoch + 1, 3 * epoch + 2}


def test_the_id_names_what_is_shown(images, three):
    one = Part(images())
    ids = {
        identity(parts)
        for parts in (
            [one],
            [Part(images(), selection(range(80), [1] * 79 + [2]))],
            three,
            three[::-1],
            [*three[:2], Part(three[2].corpus, weight=Fraction("0.1"), alone=Fraction("0.2"))],
        )
    }
    assert len(ids) == 5
    assert identity([one]) == one.corpus.id


def test_stand_ins_come_from_the_same_part(three):
    m = mixture(three)
    for t in (0, 3, 55, next(t for t in range(99) if m.step(t).epoch[0] < 0)):
        slots = m.step(t)
        for place in range(BATCH):
            ordinal, visit = m.stand_in(t, place, 0)
            assert ordinal != slots.ordinal[place]
            assert 0 <= ordinal < three[slots.part[place]].n
            assert visit >= STAND_IN
            assert mixture(three).stand_in(t, place, 0) == (ordinal, visit)


def test_the_sequence_is_what_it_was(three):
    """Checkpoints count on it."""
    slots = [mixture(three).step(t) for t in range(20)]
    text = repr([[x.tolist() for x in (s.part, s.ordinal, s.visit)] for s in slots])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "1db0a8929f62abff"


def test_shares_that_make_no_mixture(images):
    for weights, alone in (([0, 0], [0, 0]), ([1, -1], [0, 0]), ([1, 1], [Fraction(1, 2), Fraction(1, 2)])):
        parts = [Part(images(), None, Fraction(w), Fraction(a)) for w, a in zip(weights, alone, strict=True)]
        with pytest.raises(UserError, match="alone sum to less than 1"):
            mixture(parts)
