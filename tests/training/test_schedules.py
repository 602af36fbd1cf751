"""Schedules against the official functions, step by step."""

import numpy as np
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


def test_truncated_cosine_is_the_official_one(golden):
    numbers = golden.load("dinov3_misc")
    h, values = numbers.hyper("cosine_trunc"), numbers.outputs("cosine_trunc")["values"]
    total, warmup, keys = h["total_iters"], h["warmup_iters"], (h["base_value"], h["final_value"])
    mine = [schedules.truncated_cosine(i, total, *keys, warmup, h["trunc_extra"]) for i in range(total)]
    assert np.abs(mine - values[:total]).max() <= numbers.arrays["cosine_trunc/tol/values"]
    assert mine[-1] == keys[1]  # reached


def test_linear_warmup_cosine_is_the_official_one(golden):
    numbers = golden.load("dinov3_misc")
    h = numbers.hyper("linear_warmup_cosine")
    keys = (h["peak"], h["end"], h["warmup_iterations"], h["cosine_iterations"])
    mine = [schedules.linear_warmup_cosine(i, *keys) for i in range(h["total_iterations"])]
    numbers.check("linear_warmup_cosine", "values", mine)


def test_each_schedule_of_a_recipe_is_the_function_of_its_name():
    """20 epochs of 5 steps, 2 of them warm-up, from 1e-3 to 1e-5."""
    times = [Progress(step, 5, 100) for step in range(100)]
    ends = (1e-3, 1e-5)

    def rates(schedule: str, **keys) -> list[float]:
        config = OptimizerConfig(base_lr=1e-3, min_lr=1e-5, warmup_epochs=2.0, schedule=schedule, **keys)
        return [schedules.learning_rate(config, 256, t) for t in times]

    assert rates("dino_cosine") == [schedules.dino_cosine(i, 100, *ends, 10) for i in range(100)]
    assert rates("mae_cosine") == [schedules.mae_cosine(i / 5, 20.0, *ends, 2.0) for i in range(100)]
    truncated = [schedules.truncated_cosine(i, 100, *ends, 10, 0.2) for i in range(100)]
    assert rates("truncated_cosine", trunc_extra=0.2) == truncated
    assert rates("linear_warmup_cosine") == [schedules.linear_warmup_cosine(i, *ends, 10, 90) for i in range(100)]
    early = rates("linear_warmup_cosine", cosine_epochs=8.0)
    assert early == [schedules.linear_warmup_cosine(i, *ends, 10, 40) for i in range(100)]
    assert set(early[49:]) == {1e-5}
    constant = rates("constant")
    assert constant[:10] == pytest.approx([1e-4 * i for i in range(10)])
    assert set(constant[10:]) == {1e-3}


@pytest.mark.parametrize(
    ("scaling", "reference", "peak"),
    [("linear", 256, 8e-3), ("linear", 512, 4e-3), ("sqrt", 1024, 1e-3 * 2**0.5), ("none", 256, 1e-3)],
)
def test_scaling_rules(scaling, reference, peak):
    """1e-3 at the reference, for 2048 images."""
    config = OptimizerConfig(base_lr=1e-3, scaling=scaling, reference_batch=reference)
    assert schedules.scaled_lr(config, 2048) == pytest.approx(peak, rel=1e-15)


def test_the_rate_of_a_step_is_scaled_by_the_batch():
    config = OptimizerConfig(base_lr=1e-3, min_lr=0.0, warmup_epochs=2.0)
    rates = [schedules.learning_rate(config, 512, Progress(step, 5, 50)) for step in range(50)]
    assert rates[0] == 0
    assert rates[9] == rates[10] == 2e-3  # the base value comes twice
    mae = OptimizerConfig(base_lr=1e-3, min_lr=0.0, warmup_epochs=2.0, schedule="mae_cosine")
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
    [
        ("schedule", "linear", "dino_cosine, mae_cosine"),
        ("scaling", "cubic", "linear, sqrt or none"),
        ("reference_batch", 0, "1 or more"),
        ("warmup_epochs", 11.0, "longer"),
        ("cosine_epochs", -1.0, "0 or more"),
    ],
)
def test_schedules_that_cannot_be_drawn_are_refused(key, value, said):
    with pytest.raises(UserError, match=said):
        schedules.check(OptimizerConfig(**{key: value}), epochs=10)
