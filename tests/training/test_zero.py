"""Every ZeRO stage is the same training; and what DeepSpeed does by itself, so that it cannot come back.

The reference is torch alone in one process: no engine, no DeepSpeed, one batch a step.
"""

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from selfsight.objectives import Objective, Outcome, Progress
from selfsight.training import cluster, sharding
from selfsight.training.engine import Engine

# Of parameters of about 1 after 20 steps; measured: 5e-7 with AdamW at a rate of 1e-3, 1e-7 with SGD.
ATOL = 3e-6
RTOL_NORM = 1e-4  # of the gradient's norm at every step; measured: 1.3e-5
PLACES = [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    path = Path(__file__).parent / "zero_harness.py"
    spec = importlib.util.spec_from_file_location("zero_harness", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.plain = cache(module.plain)
    return module


if torch.cuda.is_available():
    pytestmark = pytest.mark.skip(reason="compares the last bits of a CPU")


@pytest.fixture(scope="module")
def alone() -> cluster.Cluster:
    """One process, one thread, as the ranks have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield cluster.join()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_stage_is_the_same_training(ranks, harness, alone, warm, tmp_path):
    """Parameters, buffers and teacher after 20 steps, and the gradient's norm at each of them."""
    if ranks == 1:
        results = {case: harness.train(case, alone) for case in harness.cases(1)}
    else:
        answer = warm("zero_harness:main", str(tmp_path / "results.pt"), ranks=ranks)
        assert answer["codes"] == [0] * ranks, answer["err"]
        results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert len(results) == len(harness.cases(ranks))
    wrong = []
    for case, found in ((harness.Case(*case), found) for case, found in results.items()):
        joint = case.objective == "simclr"  # then a step of two micro-batches is not one of one batch
        accumulation = case.accumulation if joint else 1
        expected = harness.plain(harness.Case(case.objective, 0, accumulation), ranks if joint else 1)
        apart = harness.differences(case, found["state"], expected["state"])
        wrong += [f"{case}: {name} by {d:.1e}" for name, d in apart.items() if not d < ATOL]
        assert found["norms"] == pytest.approx(expected["norms"], rel=RTOL_NORM), case
        assert found["refused"] is not False, f"{case}: a step that was not finite on one rank has moved something"
    assert wrong == []


def test_gradients_are_long_enough_to_tell_whether_deepspeed_clips_them_at_its_default_of_one(harness):
    assert "clip" not in harness.OPTIMIZERS["simclr"]
    assert min(harness.plain(harness.Case("simclr", 0), 1)["norms"]) > 1


def test_micro_batches_are_their_own_batch_statistics(harness):
    """What docs/training.md says of `joint`: two micro-batches give another gradient than one batch, that of the mean
    of their losses, which is what the engine is held to above."""
    one, two = (harness.plain(harness.Case("simclr", 0, accumulation), 1)["norms"] for accumulation in (1, 2))
    assert abs(one[0] - two[0]) > 0.01 * one[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("zero", "offload"), PLACES)
def test_nothing_moves_before_the_first_step_and_weights_stay_fp32(zero, offload, precision, harness, alone):
    """DeepSpeed's own bf16 mode rounds the weights, and at stage 0 takes a step with weight decay at start-up."""
    case = harness.Case("dino", zero, offload=offload)
    before = {k: v.clone() for k, v in harness.objective_of(case).state_dict().items()}
    objective = harness.objective_of(case, alone)
    engine = Engine(objective, harness.recipe_of(case, precision), alone)
    after = engine.whole_state()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any("exp_avg" in state for state in engine.optimizer.state.values())
    seen = []
    objective.student.vit.norm.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    batch = harness.micro_batches(objective, 0, 1, [0], 1)
    linear, progress = F.linear, Progress(6, 5, 20)
    done = engine.step(batch, progress)
    assert F.linear is linear  # DeepSpeed replaces it for good under stage 3
    assert set(seen) == {precision == "bf16"}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        assert done.loss == pytest.approx(harness.objective_of(case)(batch[0], progress).loss.item(), rel=1e-5)
    state = engine.whole_state()
    moments = [x for p, state in engine.optimizer.state.items() for x in (p, *state.values())]
    assert {x.dtype for x in (*state.values(), *moments)} == {torch.float32}
    # By (1 − m) of the student's step, which is less than half a unit in the last place of bf16.
    assert any(not torch.equal(v, before[k]) for k, v in state.items() if k.startswith("teacher."))


class Sometimes(Objective):
    """Uses one of its layers in every other step only."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.always, self.sometimes = nn.Linear(5, 3), nn.Linear(5, 3)

    def views(self):
        raise NotImplementedError

    def forward(self, batch, progress):
        x = batch["x"]
        y = self.always(x) + (0 if progress.step % 2 else self.sometimes(x))
        return Outcome(y.square().sum(), features=y.detach())


@pytest.mark.parametrize(("zero", "offload"), PLACES)
def test_a_parameter_that_a_step_does_not_use_has_a_gradient_of_zero(zero, offload, harness, alone):
    """Not its last one, which DeepSpeed's stage 3 and offload keep; and the others move as ever."""
    case = harness.Case("mae", zero, offload=offload)
    recipe = harness.recipe_of(case)
    recipe.optimizer.name, recipe.optimizer.momentum, recipe.optimizer.warmup_epochs = "sgd", 0.0, 0.0
    recipe.optimizer.weight_decay = 0.0
    objective = Sometimes()
    engine = Engine(objective, recipe, alone)
    batch = {"x": torch.randn(harness.BATCH, 5)}
    engine.step([batch], Progress(0, 5, 20))
    first = engine.whole_state()
    norm = engine.step([batch], Progress(1, 5, 20)).grad_norm
    second = engine.whole_state()
    assert torch.equal(first["sometimes.weight"], second["sometimes.weight"])
    assert not torch.equal(first["always.weight"], second["always.weight"])
    reference = Sometimes()
    reference.load_state_dict(first)
    reference(batch, Progress(1, 5, 20)).loss.backward()
    always = [p.grad for p in reference.always.parameters()]
    assert norm == pytest.approx(nn.utils.get_total_norm(always).item(), rel=1e-5)


@pytest.mark.parametrize(("zero", "offload"), PLACES)
def test_whole_weights_go_back_into_any_stage(zero, offload, harness, alone):
    case = harness.Case("dino", zero, offload=offload)
    recipe = harness.recipe_of(case)
    recipe.optimizer.name = "sgd"
    engine = Engine(harness.objective_of(case, alone), recipe, alone)
    other = {k: v + 0.25 if v.is_floating_point() else v for k, v in engine.whole_state().items()}
    sharding.load_state(engine.engine, other)
    back = engine.whole_state()
    assert all(torch.equal(other[k], back[k]) for k in other)
    shapes = sharding.shapes(engine.objective)
    assert {k: v.shape for k, v in shapes.items()} == {k: v.shape for k, v in other.items()}
    # The optimiser's fp32 weights are those, too: a step at a rate of nearly nothing leaves them there.
    recipe.optimizer.base_lr = recipe.optimizer.min_lr = 1e-12
    assert engine.step(harness.micro_batches(engine.objective, 0, 1, [0], 1), Progress(6, 5, 20)).taken
    torch.testing.assert_close(
        {k: v for k, v in engine.whole_state().items() if k.startswith("student")},
        {k: v for k, v in other.items() if k.startswith("student")},
        atol=1e-6,
        rtol=0,
    )


def test_no_parameter_stays_whole_under_stage_3(harness, alone):
    """DeepSpeed keeps small ones whole unless told otherwise, in a copy that the teacher's average does not reach."""
    engine = Engine(
        harness.objective_of(harness.Case("dino", 3), alone), harness.recipe_of(harness.Case("dino", 3)), alone
    )
    assert engine.engine.optimizer.persistent_parameters == []
    assert all(p.numel() == 0 and p.ds_tensor.numel() == p.ds_numel for p in engine.objective.parameters())
