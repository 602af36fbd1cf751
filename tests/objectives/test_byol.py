"""BYOL's loss and momentum against solo-learn's numbers and by hand."""

import pytest
import torch

from selfsight.objectives import Progress
from selfsight.objectives.base import cosine_momentum
from selfsight.objectives.byol import BYOL, BYOLConfig, byol_loss
from selfsight.recipe import EncoderConfig
from selfsight.training.teacher import Teacher

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["byol", "wmse", "simsiam"])
def test_loss(golden, case, dtype):
    """SimSiam's is −cos where BYOL's is 2 − 2·cos; W-MSE's is BYOL's."""
    numbers = golden.load("solo_losses", dtype)
    q, z = numbers.inputs(case).values()
    q.requires_grad_()
    loss = byol_loss(q, z)
    if case == "simsiam":
        loss = (loss - 2) / 2
    loss.backward()
    numbers.check(case, "loss", loss)
    numbers.check(case, "grad_a", q.grad)


def test_the_squared_distance_on_the_unit_sphere():
    """‖q̄ − z̄‖²: 0 for the same direction, 2 at right angles, 4 for the opposite, at any lengths; rows are averaged."""
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]], dtype=torch.float64)
    q = torch.tensor([[5.0, 0.0], [1.0, 0.0], [0.1, 0.0]], dtype=torch.float64)
    assert [byol_loss(q[i : i + 1], z[i : i + 1]).item() for i in range(3)] == pytest.approx([0, 2, 4], abs=1e-12)
    assert byol_loss(q, z).item() == pytest.approx(2)


def test_no_gradient_flows_into_the_target():
    q, z = torch.randn(2, 4, 3).requires_grad_()
    q.retain_grad()
    z.retain_grad()
    byol_loss(q, z).backward()
    assert q.grad.any()
    assert z.grad is None


def test_target_momentum(golden):
    numbers = golden.load("solo_losses")
    hyper, inputs = numbers.hyper("momentum"), numbers.inputs("momentum")
    student, target = torch.nn.Linear(12, 8, bias=False), torch.nn.Linear(12, 8, bias=False)
    with torch.no_grad():
        student.weight.copy_(inputs["model"])
        target.weight.copy_(inputs["ema_before"])
    teacher = Teacher([(student, target.requires_grad_(False))])
    current, taus, targets = hyper["base_tau"], [], []
    for step in range(len(numbers.outputs("momentum")["tau"])):
        teacher.follow(current)
        current = cosine_momentum(hyper["base_tau"], Progress(step, 1, hyper["max_steps"]))
        taus.append(current)
        targets.append(target.weight.clone())
    numbers.check("momentum", "tau", taus)
    numbers.check("momentum", "ema", torch.stack(targets))


def test_the_heads_are_the_papers():
    byol = BYOL(BYOLConfig(), EncoderConfig("vit_tiny_patch16_224", args={"embed_dim": 96, "depth": 1}))
    shapes = [
        [tuple(layer.weight.shape) for layer in head if isinstance(layer, torch.nn.Linear)]
        for head in (byol.student_projector, byol.predictor)
    ]
    assert shapes == [[(4096, 96), (256, 4096)], [(4096, 256), (256, 4096)]]
    assert isinstance(byol.predictor[-1], torch.nn.Linear)  # unlike SimCLR's, the output is not normalised
    assert byol.teacher_momentum(Progress(0, 1, 10)) == 0.996
