import hashlib

import numpy as np
import pytest

from selfsight.errors import UserError
from selfsight.stream.order import Order, auto_lanes

UNEVEN = np.array([7, 3, 12, 1, 9, 9, 4, 16, 2, 5, 11, 8, 16, 6, 10, 13, 3], dtype=np.uint16)


def order(sizes=UNEVEN, batch_size=12, lanes=4, window=2, seed=5):
    return Order(sizes, batch_size=batch_size, lanes=lanes, window=window, seed=seed)


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("window", [1, 2, 16])
def test_every_epoch_visits_every_sample_once(lanes, window):
    o = order(lanes=lanes, window=window)
    steps = [o.step(t) for t in range(8 * o.n // o.batch_size)]
    ordinals, visits = (np.concatenate(x) for x in zip(*steps, strict=True))
    pairs = set(zip(ordinals.tolist(), visits.tolist(), strict=True))
    assert len(pairs) == len(ordinals)
    for epoch in range(4):  # the lanes are within a few chunks of each other: these epochs are over in all of them
        assert sorted(o for o, e in pairs if e == epoch) == list(range(o.n))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_out_one_batch(world_size):
    o = order(np.full(40, 16), batch_size=48, lanes=16)
    for t in (0, 3, 77):
        ordinals, visits = o.step(t)
        share = o.batch_size // world_size
        parts = [order(np.full(40, 16), 48, 16).step(t, r * share, (r + 1) * share) for r in range(world_size)]
        np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), ordinals)
        np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), visits)
        assert ordinals.dtype == visits.dtype == np.int64


def test_a_step_does_not_depend_on_what_was_asked_before():
    walked = order()
    want = {t: walked.step(t) for t in range(200)}
    jumped = order()
    for t in [199, 0, 57, 58, 3, 120, 57]:
        np.testing.assert_array_equal(order().step(t), want[t])
        np.testing.assert_array_equal(jumped.step(t), want[t])


def test_lanes_stay_together_over_many_epochs():
    o = order(np.full(18, 10), batch_size=8, lanes=8, window=2)  # 18 chunks for 8 lanes: 2 or 3 each
    o.step(40 * o.n // o.batch_size)
    drift = np.ptp(np.stack(o._starts[:40]), axis=1)
    assert drift.max() <= 2 * 10
    assert drift[8] == drift[16] == 0  # after as many epochs as lanes each lane has had its share of the long rows


def test_seeds_and_epochs_differ():
    first, other = order().step(0)[0], order(seed=6).step(0)[0]
    assert not np.array_equal(first, other)
    o = order(np.full(40, 16), batch_size=64, lanes=4)
    epochs = [np.concatenate([o.step(10 * e + t)[0] for t in range(10)]) for e in range(2)]
    assert not np.array_equal(*epochs)
    np.testing.assert_array_equal(*(np.sort(e) for e in epochs))


def test_the_sequence_is_what_it_was():
    """Checkpoints count on it: a numpy that permutes otherwise would resume in another order."""
    o = order()
    text = repr([[x.tolist() for x in o.step(t)] for t in range(40)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "b99972cefaa9e7bd"


@pytest.mark.parametrize(("lanes", "distinct"), [(64, 212), (256, 226)])
def test_class_sorted_data_is_mixed(lanes, distinct):
    """1.28 M images sorted by class: distinct classes of 1000 in a batch of 256, where random sampling sees 226."""
    o = order(np.full(5000, 256, dtype=np.uint16), batch_size=256, lanes=lanes, window=16)
    classes = np.arange(o.n) * 1000 // o.n
    assert round(np.mean([len(np.unique(classes[o.step(t)[0]])) for t in range(0, 10_000, 41)])) >= distinct


def test_a_lane_shorter_than_its_share_of_a_step_passes_through_several_epochs():
    o = order(np.array([1, 1, 1, 29]), batch_size=32, lanes=4, window=1)
    pairs = {p for t in range(50) for p in zip(*(x.tolist() for x in o.step(t)), strict=True)}
    assert len(pairs) == 50 * 32


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"fewer images than the batch.*lower batch_size"):
        order(np.array([3, 4]), batch_size=8, lanes=2)
    with pytest.raises(UserError, match=r"no multiple of stream.lanes 5"):
        order(lanes=5)
    with pytest.raises(UserError, match=r"2 chunks for 4 lanes: set stream.lanes to 2"):
        order(np.array([30, 40]), batch_size=12, lanes=4)
    with pytest.raises(UserError, match="at least"):
        order(window=0)
    with pytest.raises(ValueError, match="every chunk"):
        order(np.array([30, 0]), lanes=1)
    with pytest.raises(ValueError, match="no positions"):
        order().step(0, 4, 13)


@pytest.mark.parametrize(
    ("batch_size", "n_chunks", "lanes"), [(256, 5000, 256), (256, 20, 16), (1024, 5000, 256), (96, 50, 48), (7, 3, 1)]
)
def test_auto_lanes(batch_size, n_chunks, lanes):
    assert auto_lanes(batch_size, n_chunks) == lanes
