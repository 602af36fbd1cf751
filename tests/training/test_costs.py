"""What is counted before a run, against runs: FLOPs by torch's own counter, memory by the kernel's high-water mark."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import memory as benchmark
from selfsight import objectives
from selfsight.errors import UserError
from selfsight.objectives import Progress
from selfsight.training import resolve
from selfsight.training.costs import Trace, Weights, find_gpu, per_gpu, trace
from selfsight.training.costs.memory import BUCKET
from selfsight.training.costs.plan import build

FEWER = {
    "data2vec2": ["objective.average_top_k_layers=1"],
    "distillation": ["objective.teacher_args.depth=1"],
}
START = Progress(0, 10, 20)
RECIPES = {
    "dinov2": ("dinov2/vit_tiny_patch4_cifar10", "encoder.args={patch_size: 4, depth: 3}", "objective.out_dim=64"),
    "mae": ("mae/vit_tiny_patch4_cifar10", "objective.decoder_depth=1", "encoder.checkpointing=full"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_flops_are_those_of_a_real_step(name):
    """DINOv2's masks make tensors whose sizes are numbers of the batch: they follow from the same noise."""
    recipe = resolve.load(RECIPES[name][0], RECIPES[name][1:])
    imagined = trace(build(recipe), 4, START, bf16=True)
    kind = objectives.find(recipe.objective_name)
    objective = kind(kind.Config(**{k: v for k, v in recipe.objective.items() if k != "name"}), recipe.encoder)
    spec = objective.views()
    generator = torch.Generator().manual_seed(0)
    batch = {n.name: torch.rand(4, n.length, generator=generator) for n in spec.noise}
    batch |= {c.name: torch.randn(c.count, 4, 3, c.size, c.size) for c in spec.crops}
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(batch, START).loss
        loss.backward()
    assert imagined.flops == counter.get_total_flops()


@pytest.mark.parametrize("name", objectives.available())
def test_every_objective_can_be_imagined(name):
    fewer = FEWER.get(name, [])
    recipe = resolve.load(f"{name}/vit_tiny_patch4_cifar10", ["encoder.args.depth=1", *fewer])
    step = trace(build(recipe), 4, START, bf16=False)
    assert step.flops > 0
    assert step.peak() > step.views


def test_memory_is_within_a_tenth_of_what_steps_take():
    """The benchmark has more of them; its table is in docs/training.md."""
    for name, (measured, planned) in benchmark.measure(("DINO, batch 8", "MAE, ZeRO 1, 4 micro-batches")).items():
        assert planned == pytest.approx(measured, rel=benchmark.AIM), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_memory_on_a_gpu():
    test_memory_is_within_a_tenth_of_what_steps_take()


def test_stages_share_what_they_say():
    """By hand: 4 GB of weights and as much of a teacher, AdamW, eight GPUs; 10 GB of activations."""
    gb = 10**9
    weights = Weights(trained=4 * gb, frozen=4 * gb, buffers=0, moments=8 * gb)
    step = Trace(8, flops=1.0, views=gb, buffers=0, changes=[(gb, 0), (9 * gb, 0), (-9 * gb, 4 * gb)])
    totals = {stage: per_gpu(stage, 8, weights, step).total / gb for stage in range(4)}
    assert 2 * gb == BUCKET
    assert totals[0] == 4 + 4 + 8 + 10  # weights, teacher, moments; gradients come as activations go
    assert totals[1] == totals[2] == 4 + 4 + 8 / 8 + 4 / 8 + 2 + 10  # its share of moments and weights, one bucket
    assert totals[3] == 4 / 8 + 4 / 8 + 8 / 8 + 4 / 8 + 4 / 8 + 2 + 4 + 10  # of gradients too; 4 GB gathered at a time
    away = {stage: per_gpu(stage, 8, weights, step, offload=True).total / gb for stage in range(4)}
    assert away[0] == totals[0]  # stage 0 has nothing to move
    assert away[2] == totals[2] - 8 / 8 - 4 / 8  # moments and the optimiser's copy of its share of the weights
    assert away[3] == totals[3] - 8 / 8 - 4 / 8 - 4 / 8  # and its share of the gradients
    split = {stage: per_gpu(stage, 8, weights, step, accumulation=2) for stage in (1, 2)}
    assert split[1].gradients / gb == 4  # of earlier micro-batches: whole
    assert split[2].gradients / gb == 4 / 8
    assert split[1].activations / gb == 10 + 1  # the views of both are there


@pytest.mark.parametrize(
    ("text", "sentence"), [("h20", "did you mean h200"), ("x:1", "cannot read"), ("0:9", "memory")]
)
def test_gpus_that_are_none(text, sentence):
    with pytest.raises(UserError, match=sentence):
        find_gpu(text)
    assert find_gpu("48:181").bf16 == 181e12


def test_the_command(capsys, selfsight, corpora):
    small = ["plan", "mae/vit_tiny_patch4_cifar10", "encoder.args.depth=2", "objective.decoder_depth=1", "epochs=10"]
    small.append("optimizer.warmup_epochs=0")
    assert (
        selfsight([*small, "--gpus", "2", "--gpu", "a100-80", "--json", f"corpus={corpora['one']}", "batch_size=48"])
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["micro_batch"] == 24
    assert plan["total_steps"] == 10
    assert plan["memory"]["full"]["0"]["activations"] < plan["memory"]["none"]["0"]["activations"]
    seconds = plan["total_steps"] * 48 * plan["flops_per_image"] / (2 * 312e12 * plan["utilisation"])
    assert plan["days"] == pytest.approx(seconds / 86400)
    assert selfsight([*small, "--gpu", "1:10", "batch_size=2048"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert "GiB are missing on each GPU: try training.zero=0 with encoder.checkpointing=full" in shown
    for wrong in (["--gpus", "3"], ["--gpus", "0"], ["--gpu", "gtx"], ["--utilisation", "2"]):
        assert selfsight([*small, *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
