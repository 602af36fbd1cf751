"""SwAV against lightly's numbers, and what it promises the trainer."""

import math
import sys

import pytest
import torch

from selfsight.collective import Collective, DistributedCollective
from selfsight.errors import UserError
from selfsight.losses import sinkhorn_knopp
from selfsight.objectives import Progress
from selfsight.objectives.swav import SwAV, SwAVConfig, codes, swapped_prediction_loss
from selfsight.recipe import EncoderConfig

DTYPES = [torch.float32, torch.float64]
ENCODER = EncoderConfig(
    "vit_tiny_patch16_224", img_size=32, args={"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
)


def small(**keys) -> SwAVConfig:
    sizes = {"nmb_prototypes": 10, "out_dim": 8, "hidden_dim": 16, "global_crops_size": 32, "local_crops_size": 16}
    return SwAVConfig(**{**sizes, "local_crops_number": 2, **keys})


def make_batch(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"global": torch.randn(2, n, 3, 32, 32), "local": torch.randn(2, n, 3, 16, 16)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["plain", "queue"])
def test_loss(golden, case, dtype):
    numbers = golden.load("lightly_swav", dtype)
    hyper, inputs = numbers.hyper(case), numbers.inputs(case)
    high, low = ([x.requires_grad_() for k, x in inputs.items() if k.startswith(name)] for name in ("high", "low"))
    older = torch.stack([inputs[f"queue{i}"] for i in range(2)]) if case == "queue" else torch.zeros(2, 0, 9).to(dtype)
    with torch.no_grad():
        q = codes(torch.stack(high), older, hyper["sinkhorn_epsilon"], hyper["sinkhorn_iterations"], Collective())
    loss = swapped_prediction_loss(torch.stack([*high, *low]), q, hyper["temperature"])
    loss.backward()
    numbers.check(case, "loss", loss)
    for name, crops in (("high", high), ("low", low)):
        for i, crop in enumerate(crops):
            numbers.check(case, f"grad_{name}{i}", crop.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinkhorn(golden, dtype):
    numbers = golden.load("lightly_swav", dtype)
    hyper, scores = numbers.hyper("sinkhorn"), numbers.inputs("sinkhorn")["out"]
    numbers.check("sinkhorn", "codes", sinkhorn_knopp(scores, hyper["epsilon"], Collective(), hyper["iterations"]))


def test_sinkhorn_balances_the_prototypes():
    torch.manual_seed(0)
    q = sinkhorn_knopp(torch.rand(12, 4, dtype=torch.float64), 0.5, Collective(), 50)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(q.sum(dim=0), torch.full((4,), 3.0, dtype=torch.float64))


def test_loss_is_the_mean_over_swapped_pairs():
    scores, q = torch.randn(4, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64).softmax(-1)
    pairs = [-(q[s] * (scores[t] / 0.1).log_softmax(-1)).sum(-1).mean() for s in range(2) for t in range(4) if s != t]
    torch.testing.assert_close(swapped_prediction_loss(scores, q, 0.1), torch.stack(pairs).mean())


def test_queue_takes_the_newest_after_the_step_and_forgets_the_oldest():
    swav = SwAV(small(queue_length=5, queue_start_epoch=1), ENCODER)
    with torch.no_grad():
        swav(make_batch(3, seed=0), Progress(0, 4, 8))
        assert not swav.queue.any()
        swav.after_step()
        first = swav.queue.clone()
        assert not first[:, 3:].any()
        torch.testing.assert_close(first[:, :3].norm(dim=-1), torch.ones(2, 3))
        swav(make_batch(3, seed=1), Progress(1, 4, 8))
        swav.discard_step()
        swav.after_step()
        assert torch.equal(swav.queue, first)  # a step that was not taken leaves no trace
        swav(make_batch(3, seed=1), Progress(1, 4, 8))
        swav.after_step()
        assert torch.equal(swav.queue[:, 3:], first[:, :2])
        before = swav.queue.clone()
        swav.eval()(make_batch(3, seed=2), Progress(2, 4, 8))
        swav.after_step()
        assert torch.equal(swav.queue, before)


def test_queue_is_used_from_its_epoch_on_when_it_is_full():
    batch = make_batch(3)

    def loss(step: int, **keys) -> float:
        torch.manual_seed(0)
        swav = SwAV(small(**keys), ENCODER)
        swav.queue.copy_(torch.nn.functional.normalize(torch.randn(swav.queue.shape), dim=-1))
        return swav(batch, Progress(step, 4, 8)).loss.item()

    assert loss(3, queue_length=6, queue_start_epoch=1) == loss(3)
    assert loss(4, queue_length=6, queue_start_epoch=1) != loss(4)
    assert loss(1, queue_length=6, queue_start_epoch=0) == loss(1)  # two steps of three images fill it
    assert loss(2, queue_length=6, queue_start_epoch=0) != loss(2)


def queued(collective: Collective, start: int, stop: int) -> list[torch.Tensor]:
    """Loss, gradient and queue of a third step, which uses the queue of the first two, on images `start` to `stop`."""
    torch.manual_seed(0)
    swav = SwAV(small(queue_length=7, queue_start_epoch=0), ENCODER, collective).double()
    loss = torch.zeros(())
    for step in range(3):
        swav.zero_grad()
        batch = {name: crops[:, start:stop].double() for name, crops in make_batch(4, seed=step).items()}
        loss = swav(batch, Progress(step, 4, 8)).loss
        loss.backward()
        swav.after_step()
    found = [loss.detach(), swav.prototypes.grad]
    return [*(collective.all_reduce_sum(x) / collective.world_size for x in found), swav.queue]


def test_two_processes_share_one_queue(run_two, tmp_path):
    run_two(__file__, str(tmp_path / "found.pt"))
    torch.testing.assert_close(torch.load(tmp_path / "found.pt", weights_only=True), queued(Collective(), 0, 4))


def test_the_length_of_a_prototype_says_nothing():
    swav, batch = SwAV(small(), ENCODER), make_batch(3)
    loss = swav(batch, Progress(0, 1, 1)).loss
    with torch.no_grad():
        swav.prototypes *= 3
    torch.testing.assert_close(swav(batch, Progress(0, 1, 1)).loss, loss)


def test_prototypes_are_frozen_for_their_steps():
    (rule,) = SwAV(small(), ENCODER).parameter_rules()
    assert [rule.lr_scale(Progress(step, 10, 1000)) for step in (0, 312, 313)] == [0.0, 0.0, 1.0]
    assert "prototypes".startswith(rule.prefix)


def test_collapse_and_views():
    swav = SwAV(SwAVConfig(hidden_dim=8), EncoderConfig(args={"depth": 1}))
    assert swav.collapse_values() == {"loss": math.log(3000)}
    large, local = swav.views().crops
    assert (large.name, large.count, large.size, large.scale) == ("global", 2, 224, (0.14, 1.0))
    assert (local.name, local.count, local.size, local.scale) == ("local", 6, 96, (0.05, 0.14))
    assert (large.brightness, large.hue, large.blur, large.solarize) == (0.8, 0.2, (0.5, 0.5), ())


def test_loss_leaves_autocast():
    swav = SwAV(small(), ENCODER)
    with torch.autocast("cpu", torch.bfloat16):
        outcome = swav(make_batch(4), Progress(0, 1, 1))
    assert outcome.loss.dtype == torch.float32
    outcome.loss.backward()


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"temperature": 0.0}, "objective.temperature should be above 0"),
        ({"epsilon": 0.0}, "objective.epsilon should be above 0"),
        ({"queue_length": -1}, "objective.queue_length is -1"),
        ({"global_crops_scale": [0.1]}, "objective.global_crops_scale should be two"),
    ],
)
def test_wrong_recipes(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        SwAV(small(**keys), ENCODER)


def one_rank(rank: int, rendezvous: str, output: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    found = queued(DistributedCollective(), 2 * rank, 2 * rank + 2)
    if rank == 0:
        torch.save(found, output)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), sys.argv[2], sys.argv[3])
