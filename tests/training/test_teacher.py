"""The moving average against DINO's, and what it must not do."""

import pytest
import torch
from torch import nn

from selfsight.training.teacher import Teacher


def modules(values: list[torch.Tensor]) -> nn.Module:
    return nn.ParameterList([nn.Parameter(v.clone()) for v in values])


def test_average_is_the_official_one(golden):
    numbers = golden.load("dino_ema")
    inputs, h = numbers.inputs("ema"), numbers.hyper("ema")
    teacher = modules([inputs[f"teacher_init{i}"] for i in range(3)]).requires_grad_(False)
    student = modules([inputs[f"student{i}"][0] for i in range(3)])
    average = Teacher([(student, teacher)])
    steps = []
    for t, momentum in enumerate(h["momentum"]):
        with torch.no_grad():
            for i, p in enumerate(student.parameters()):
                p.copy_(inputs[f"student{i}"][t])
        average.follow(float(momentum))
        steps.append([p.clone() for p in teacher.parameters()])
    for i in range(3):
        numbers.check("ema", f"teacher{i}", torch.stack([s[i] for s in steps]))


def test_average_is_lightlys_too(golden):
    numbers = golden.load("lightly_dino_ibot_koleo")
    inputs = numbers.inputs("update_momentum")
    student, teacher = modules([inputs["model"]]), modules([inputs["ema_before"]]).requires_grad_(False)
    Teacher([(student, teacher)]).follow(numbers.hyper("update_momentum")["m"])
    numbers.check("update_momentum", "ema", next(teacher.parameters()))


def test_momentum_of_one_and_no_pairs_move_nothing():
    student, teacher = modules([torch.ones(3)]), modules([torch.zeros(3)]).requires_grad_(False)
    Teacher([(student, teacher)]).follow(1.0)
    assert not any(p.any() for p in teacher.parameters())
    Teacher([]).follow(0.5)


def test_a_teacher_in_low_precision_is_refused():
    with pytest.raises(AssertionError, match="fp32"):
        Teacher([(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16().requires_grad_(False))])
