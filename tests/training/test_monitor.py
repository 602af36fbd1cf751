"""Alarms: each sign, when it is told, and when it is not."""

import math
import random

import pytest

from selfsight.training.monitor import PATIENCE, Monitor

K = math.log(4096)
COLLAPSE = {"loss": 4.5, "dino": K, "local": 0.0, "teacher_entropy": K}
HEALTHY = {
    "loss": 0.7 * K,
    "dino": 0.7 * K,
    "local": 0.0,
    "feature_spread": 0.8,
    "rankme": 30.0,
    "teacher_entropy": 0.5 * K,
}


def told(monitor: Monitor, records: int, first: int = 1, **changes: float) -> list[str]:
    return [s for i in range(records) for s in monitor.look({**HEALTHY, **changes, "step": first + i})]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": 4.5}, "the loss 4.5000 stays at 4.5000"),
        ({"dino": K}, "the term dino 8.3178 stays at 8.3178"),
        ({"feature_spread": 0.001}, "hardly differ between images"),
        ({"rankme": 1.1}, "along one direction"),
        ({"teacher_entropy": 0.0}, "a single prototype"),
        ({"dead_prototypes": 0.95}, "95% of the prototypes are chosen by no image"),
        ({"teacher_entropy": K}, "no difference between prototypes"),
    ],
)
def test_each_sign_is_told_once_while_it_lasts(changes, said):
    monitor = Monitor(COLLAPSE)
    sentences = told(monitor, 3 * PATIENCE, **changes)
    assert len(sentences) == 1
    assert said in sentences[0]
    assert sentences[0].startswith(f"step {PATIENCE}: ")
    assert "try" in sentences[0]
    told(monitor, 1, **HEALTHY | dict.fromkeys(changes.keys() & {"dead_prototypes"}, 0.0))
    assert len(told(monitor, PATIENCE, **changes)) == 1  # it came back


def test_health_warm_up_and_short_lapses_are_silent():
    monitor = Monitor(COLLAPSE, warmup_steps=100)
    assert not told(monitor, 50)
    assert not told(monitor, 100, dino=K)
    assert not told(monitor, PATIENCE - 1, first=101, dino=K)
    assert not told(monitor, 1, first=120)
    assert told(monitor, PATIENCE, first=121, dino=K)


def test_targets_that_are_sharp_are_no_collapse_while_all_prototypes_are_in_use():
    assert not told(Monitor(COLLAPSE), 3 * PATIENCE, teacher_entropy=0.0, dead_prototypes=0.02)
    monitor = Monitor(COLLAPSE)
    told(monitor, 1, dead_prototypes=0.95)  # it is not in every record, and holds until it is told again
    assert len(told(monitor, 2 * PATIENCE, first=2)) == 1
    assert not told(monitor, 2 * PATIENCE, first=20, dead_prototypes=0.1)


def losses(monitor: Monitor, values: list[float]) -> list[str]:
    first = len(monitor._losses) + 1
    return [s for i, loss in enumerate(values) for s in monitor.look({**HEALTHY, "loss": loss, "step": first + i})]


def test_a_loss_that_leaves_its_band_is_told_and_a_loss_that_drifts_is_not():
    rng = random.Random(0)
    noisy = [5 - 0.02 * i + rng.gauss(0, 0.05) for i in range(60)]
    monitor = Monitor({})
    assert not losses(monitor, noisy)
    assert not losses(monitor, [*[6.0] * (PATIENCE - 1), noisy[-1]])  # it came back
    assert monitor.spiking == 0
    (sentence,) = losses(monitor, [6.0] * 2 * PATIENCE)
    assert "the loss 6.0000 stays far above the 4." in sentence
    assert "return_on_spike" in sentence
    # DINO's rises while the teacher's temperature does, and a constant loss has no band of its own.
    assert not losses(Monitor({}), [3 + 0.01 * i + rng.gauss(0, 0.02) for i in range(300)])
    assert not losses(Monitor({}), [2.0] * 40 + [2.05] * 40)


def test_an_objective_without_a_teacher_or_a_known_collapse():
    assert not told(Monitor({}), 2 * PATIENCE, dino=K)
    mae = Monitor({"loss": 0.98})
    record = {"loss": 0.98, "feature_spread": 0.3, "rankme": 9.0}
    (sentence,) = [s for i in range(9) for s in mae.look({**record, "step": i + 1})]
    assert "teacher" not in sentence
