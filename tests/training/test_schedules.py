"""Schedules against the official functions, step by step."""

import pytest

from selfsight.errors import UserError
from selfsight.objectives import Progress
from selfsight.recipe import OptimizerConfig
from selfsight.training import schedules


@pytest.mark.parametrize("case", ["lr", "wd", "momentum", "warm_from"])
def test_dino_cosine_is_the_official_one(golden, case):
    numbers = golden.load("dino_schedule")
    h = numbers.hyper(case)
    total, warmup = h["epochs"] * h["niter_per_ep"], h["warmup_epochs"] * h["niter_per_ep"]
    mine = [
        schedules.dino_cosine(i, total, h["base_value"], h["final_value"], warmup, h["start_warmup_value"])
        for i in range(total)
    ]
    numbers.check(case, "schedule", mine)


@pytest.mark.parametrize("case", ["a", "b"])
def test_mae_cosine_is_the_official_one(golden, case):
    numbers = golden.load("mae_lr_sched")
    h = numbers.hyper(case)
    epochs = numbers.kind(case, "in")["epoch"].tolist()
    mine = [schedules.mae_cosine(e, h["epochs"], h["lr"], h["min_lr"], h["warmup_epochs"]) for e in epochs]
    numbers.check(case, "lr", mine)


def test_the_rate_of_a_step_is_scaled_by_the_batch():
    config = OptimizerConfig(base_lr=1e-3, min_lr=0.0, warmup_epochs=2.0, warmup="dino")
    rates = [schedules.learning_rate(config, 512, Progress(step, 5, 50)) for step in range(50)]
    assert rates[0] == 0
    assert rates[9] == rates[10] == 2e-3  # the base value comes twice
    mae = OptimizerConfig(base_lr=1e-3, min_lr=0.0, warmup_epochs=2.0, warmup="mae")
    rates = [schedules.learning_rate(mae, 512, Progress(step, 5, 50)) for step in range(50)]
    assert rates[:2] == [0, 2e-4]
    assert rates[10] == 2e-3
    assert max(rates) == rates[10]


def test_constant_weight_decay_stays_and_cosine_moves():
    constant, moving = OptimizerConfig(weight_decay=0.05), OptimizerConfig(weight_decay=0.04, weight_decay_end=0.4)
    assert {schedules.weight_decay(constant, Progress(s, 1, 9)) for s in range(9)} == {0.05}
    assert schedules.weight_decay(moving, Progress(0, 1, 9)) == pytest.approx(0.04)
    assert 0.3 < schedules.weight_decay(moving, Progress(8, 1, 9)) < 0.4


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("warmup", "linear", "dino or mae"), ("warmup_epochs", 11.0, "longer"), ("clip_per", "x", "global")],
)
def test_schedules_that_cannot_be_drawn_are_refused(key, value, said):
    with pytest.raises(UserError, match=said):
        schedules.check(OptimizerConfig(**{key: value}), epochs=10)
