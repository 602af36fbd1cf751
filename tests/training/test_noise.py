"""The gradient noise scale, on gradients of which it is known."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from selfsight.objectives import Objective, Outcome, Progress
from selfsight.recipe import OptimizerConfig, Recipe
from selfsight.training import cluster, noise
from selfsight.training.engine import Engine

BATCH, WIDTH = 32, 200


class Linear(Objective):
    """loss = mean of ⟨w, x⟩ over the batch: the gradient of an image is the image, whatever the weights."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.w = nn.Parameter(torch.ones(WIDTH // 10, 10))
        self.register_buffer("pending", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))

    def views(self):
        raise NotImplementedError

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Outcome:
        x = batch["draws"]
        self.pending += len(x)
        return Outcome((x @ self.w.flatten()).mean(), x)

    def after_step(self) -> None:
        self.seen += self.pending
        self.discard_step()

    def discard_step(self) -> None:
        self.pending.zero_()


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("scale", [10.0, 200.0])
def test_it_is_that_of_the_gradients(scale, accumulation):
    """Images of mean G and covariance Σ with tr(Σ) = scale·|G|²: within a twentieth over 300 steps, on one process
    with micro-batches and without, while clipped gradients move the weights."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(WIDTH, generator=generator)
    squared = true.square().sum().item()
    sigma = math.sqrt(scale * squared / WIDTH)
    recipe = Recipe(batch_size=BATCH, epochs=1)
    recipe.optimizer = OptimizerConfig(name="lamb", clip=0.1, warmup_epochs=0.0)
    recipe.training.precision, recipe.training.accumulation, recipe.training.zero = "fp32", accumulation, 1
    engine = Engine(Linear(), recipe, cluster.join())
    signals, spreads = [], []
    for step in range(300):
        images = true + sigma * torch.randn(BATCH, WIDTH, generator=generator)
        batches = [{"draws": part.to(engine.cluster.device)} for part in images.chunk(accumulation)]
        result = engine.step(batches, Progress(step, 300, 300), measure=True)
        signals.append(result.grad_signal)
        spreads.append(result.grad_noise)
        assert result.grad_norm == pytest.approx(images.mean(dim=0).norm().item(), rel=1e-4)
    assert engine.objective.seen == 300 * BATCH  # a part that goes through once more leaves no trace
    assert sum(spreads) / 300 == pytest.approx(scale * squared, rel=0.05)
    assert sum(spreads) / sum(signals) == pytest.approx(scale, rel=0.05 if scale < 100 else 0.1)
    assert math.isnan(engine.step(batches, Progress(299, 300, 300)).grad_noise)  # nobody asked


def test_blocks_are_compiled_for_the_whole_batch_alone():
    graphs, objective = CompileCounter(), Linear()
    objective.forward = torch.compile(objective.forward, backend=graphs)
    batch, progress = {"draws": torch.randn(BATCH, WIDTH)}, Progress(0, 1, 1)
    part, few = noise.part_of(batch)
    assert few == BATCH // 8
    assert len(noise.squares_of(objective, [objective.w], part, progress)) == 1
    assert graphs.frame_count == 0
    objective(batch, progress).loss.backward()
    assert graphs.frame_count > 0


def test_steps_that_tell_nothing_are_passed_over():
    follow = noise.NoiseScale()
    nothing = {"grad_signal": math.nan, "grad_noise": math.nan}
    assert math.isnan(follow.look(nothing))
    assert follow.look({"grad_signal": 2.0, "grad_noise": 600.0}) == pytest.approx(300.0)
    assert follow.look(nothing) == pytest.approx(300.0)
    assert math.isnan(follow.look({"grad_signal": -50.0, "grad_noise": 600.0}))  # the noise drowns the gradient
