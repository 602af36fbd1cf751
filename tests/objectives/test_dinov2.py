"""DINOv2 against the official code's numbers, whole steps included, and what it promises the trainer."""

import math
import random

import numpy as np
import pytest
import torch

from selfsight.errors import UserError
from selfsight.masks import NUMBERS
from selfsight.objectives import Progress
from selfsight.objectives.dinov2 import DINOv2, DINOv2Config, dino_losses, pair_cross_entropy
from selfsight.recipe import EncoderConfig, OptimizerConfig
from selfsight.training import schedules
from selfsight.training.optim import parameter_groups

DTYPES = [torch.float32, torch.float64]
ENCODER = EncoderConfig(
    "vit_tiny_patch16_224", img_size=32, args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
)
START = Progress(step=0, steps_per_epoch=4, total_steps=16)


def small(**keys) -> DINOv2Config:
    sizes = {"out_dim": 48, "hidden_dim": 40, "bottleneck_dim": 16, "global_crops_size": 32, "local_crops_size": 16}
    return DINOv2Config(**{**sizes, "local_crops_number": 3, **keys})


def encoder(**args) -> EncoderConfig:
    return EncoderConfig(ENCODER.name, 32, args={**ENCODER.args, **args})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["centering_shared", "sinkhorn_knopp_shared", "sinkhorn_knopp_separate"])
def test_two_whole_steps(golden, case, dtype):
    """Losses, gradients of every parameter and centres of two forward passes with the same weights."""
    numbers = golden.load("dinov2_meta", dtype)
    hyper, inputs = numbers.hyper(case), numbers.inputs(case)
    config = small(
        centering=hyper["centering"],
        shared_head=not hyper["separate_ibot_head"],
        patch_out_dim=hyper["ibot_prototypes"],
        dino_weight=hyper["dino_weight"],
        ibot_weight=hyper["ibot_weight"],
        koleo_weight=hyper["koleo_weight"],
        student_temp=hyper["student_temp"],
        center_momentum=hyper["center_momentum"],
        warmup_teacher_temp=float(hyper["teacher_temps"][0]),
        teacher_temp=float(hyper["teacher_temps"][1]),
        warmup_teacher_temp_epochs=2,
    )
    model = DINOv2(config, encoder(init_values=hyper["init_values"])).to(dtype)
    model.load_state_dict(golden.to_dinov2(numbers.weights(case)), strict=True)
    names = {ours: official for official in numbers.weights(case) for ours in golden.to_dinov2({official: model.center})}
    for step in range(2):
        batch = {
            "global": inputs["global_crops"][step].unflatten(0, (2, hyper["batch"])),
            "local": inputs["local_crops"][step].unflatten(0, (hyper["n_local"], hyper["batch"])),
        }
        outcome = model.distil(batch, inputs["masks"][step], Progress(step, 1, 2))
        model.zero_grad()
        outcome.loss.backward()
        found = outcome.metrics
        numbers.check(case, f"step{step}.dino_local_crops_loss", found["dino_local"])
        numbers.check(case, f"step{step}.dino_global_crops_loss", found["dino_global"])
        numbers.check(case, f"step{step}.koleo_loss", found["koleo"] * hyper["koleo_weight"] / 2)  # as it is logged
        numbers.check(case, f"step{step}.ibot_loss", found["ibot"] / 2)
        gradients = {names[n]: p.grad for n, p in model.named_parameters() if p.grad is not None}
        start = f"step{step}.gradnorm."
        expected = [n.removeprefix(start) for n in numbers.outputs(case) if n.startswith(start)]
        assert sorted(gradients) in (sorted(expected), sorted(f"student.{n}" for n in expected))
        for name, gradient in gradients.items():
            short = name if name in expected else name.removeprefix("student.")
            numbers.check(case, start + short, gradient.norm())
        if hyper["centering"] == "centering":
            numbers.check(case, f"step{step}.center_dino", model.center)
            numbers.check(case, f"step{step}.center_ibot", model.patch_center.value)
        model.after_step()
    print("worst", case, numbers.worst)
