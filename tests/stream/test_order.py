import hashlib
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("world_size", range(1, 65))
def test_ranks_share_out_one_batch(world_size):
    """Any number of ranks, those too that do not divide the lanes."""
    batch_size = 64 if 64 % world_size == 0 else 3 * world_size
    o = order(np.full(100, 16), batch_size=batch_size, lanes=batch_size // 2 if batch_size % 2 == 0 else 1)
    for t in (0, 3, 77):
        ordinals, visits = o.step(t)
        share = o.batch_size // world_size
        parts = [
            order(np.full(100, 16), o.batch_size, o.lanes).step(t, r * share, (r + 1) * share)
            for r in range(world_size)
        ]
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


def test_lanes_are_never_more_than_a_sample_apart():
    o = order(np.full(18, 11), batch_size=8, lanes=8, window=2)
    for position in (0, 24, 25, 1000, 10**12):
        epochs = [o.epochs_over(lane, position) for lane in range(8)]
        assert max(epochs) - min(epochs) <= 1
        assert min(o.epochs_over(lane, position + 1) for lane in range(8)) >= min(epochs)
    for epoch in (8, 16, 8 * 10**6):  # after as many epochs as lanes each has played every segment
        assert [o._start(lane, epoch) for lane in range(8)] == [epoch // 8 * o.n] * 8


def test_any_step_is_reached_at_once():
    """1.7 billion samples, the billionth step: what it takes is one permutation of the chunks."""
    o = Order(np.full(6_640_625, 256, dtype=np.uint16), batch_size=4096, lanes=256, window=16, seed=0)
    assert o.n == 1_700_000_000
    ordinals, visits = o.step(10**9)
    assert len(np.unique(ordinals)) == 4096
    assert set(visits.tolist()) <= {4096 * 10**9 // o.n + d for d in (-1, 0, 1)}
    assert len(o._epochs) <= 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_table_of_1_7_billion_samples_takes_less_than_500_mb():
    script = """
import numpy as np
from selfsight.stream.order import Order
order = Order(np.full(6_640_625, 256, dtype=np.uint16), batch_size=4096, lanes=256, window=16, seed=0)
for t in (0, 10**9, 10**6):
    order.step(t)
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))  # kB, since it began
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(child.stdout) < 500 * 1024


def test_stand_ins_are_the_other_samples_of_the_window():
    o = order(np.full(8, 5), batch_size=4, lanes=2, window=2)
    for lane, position in ((0, 0), (1, 13), (0, 77)):
        _, window = o._window(lane, position)
        own = window.samples[window.at]
        assert o.lane(lane, position, 1)[0] == own
        named = [o.stand_in(lane, position, a) for a in range(len(window.samples) - 1)]
        assert sorted([*named, own]) == sorted(window.samples.tolist())
        assert o.stand_in(lane, position, len(named)) is None
        assert [order(np.full(8, 5), 4, 2, 2).stand_in(lane, position, a) for a in range(len(named))] == named


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
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "f3aef18c6632fb32"


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
