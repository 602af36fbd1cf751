"""Alarms: each sign, when it is told, and when it is not."""

import math

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
    told(monitor, 1, **HEALTHY)
    assert len(told(monitor, PATIENCE, **changes)) == 1  # it came back


def test_health_warm_up_and_short_lapses_are_silent():
    monitor = Monitor(COLLAPSE, warmup_steps=100)
    assert not told(monitor, 50)
    assert not told(monitor, 100, dino=K)
    assert not told(monitor, PATIENCE - 1, first=101, dino=K)
    assert not told(monitor, 1, first=120)
    assert told(monitor, PATIENCE, first=121, dino=K)


def test_an_objective_without_a_teacher_or_a_known_collapse():
    assert not told(Monitor({}), 2 * PATIENCE, dino=K)
    mae = Monitor({"loss": 0.98})
    record = {"loss": 0.98, "feature_spread": 0.3, "rankme": 9.0}
    (sentence,) = [s for i in range(9) for s in mae.look({**record, "step": i + 1})]
    assert "teacher" not in sentence
