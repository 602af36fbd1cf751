"""The benchmark of the training step on a tiny recipe: what it prints, and that its peers compute what we compute and
train. Nothing is timed."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.layers.config import set_fused_attn

from benchmarks import step_peers, train_step
from benchmarks.harness import Absent, Sample
from benchmarks.train_step import PARTS, Contestant
from selfsight.objectives import Progress

ROOT = Path(__file__).resolve().parents[2]
TINY = ["batch_size=4", "encoder.img_size=32", "encoder.args={patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}"]
DINO = ["dino/vit_tiny_patch4_cifar10", *TINY, "objective.out_dim=32", "objective.hidden_dim=32", "training.zero=0"]
MAE = [
    *("mae/vit_tiny_patch4_cifar10", *TINY, "objective.decoder_embed_dim=32", "objective.decoder_depth=1"),
    "objective.decoder_num_heads=2",
]


@pytest.fixture(autouse=True)
def fused_again():
    """The peers set it for the whole process."""
    yield
    set_fused_attn(True)


def given(words: list[str]) -> argparse.Namespace:
    return train_step.parser().parse_args(words)


def test_runs_and_prints_the_schema():
    paths = os.pathsep.join([str(ROOT / "ssl"), str(ROOT)])
    options = ["--json", "--steps", "1", "--repeats", "1", "--threads", "1", "--precision", "fp32"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), *DINO, *options, "--only", "ours", "reference"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plain = json.loads(done.stdout)
    assert plain["benchmark"] == "train_step"
    rows = {row["name"]: row for row in plain["rows"]}
    assert rows["ours fp32"]["against"] == "reference fp32"
    for row in rows.values():
        assert row["value"] > 0, row
        assert all(row[f"{part} ms"] > 0 for part in PARTS)


@pytest.mark.parametrize("words", [DINO, MAE], ids=["dino", "mae"])
@pytest.mark.parametrize("fused", [True, False])
def test_peers_train(words, fused):
    recipe = train_step._recipe(given(words))
    marks = []
    torch.manual_seed(0)
    device = torch.device("cpu")
    step = step_peers.build(recipe, device, bf16=False, fused_attention=fused, mark=marks.append)
    (batch,) = train_step.pixels(train_step._objective(recipe).views(), 4, 1, device)()
    losses = [step(batch) for _ in range(3)]
    assert set(marks) <= set(PARTS)
    assert marks[: len(set(marks))] == [part for part in PARTS if part in marks]
    assert len(set(losses)) == len(losses)  # every step has moved the weights


def as_dinos_peer(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of torch's weight norm and of the peer's modules for DINO's."""
    names = {"center": "loss_of.center", "weight_g": "parametrizations.weight.original0"}
    names |= {".vit.": ".backbone.", "_head.": ".head.", "weight_v": "parametrizations.weight.original1"}
    found = {}
    for name, value in state.items():
        value = value[None] if name == "center" else value
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found[name] = value
    return found


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("words", [DINO, MAE], ids=["dino", "mae"])
def test_peers_compute_the_same_loss(words, fused):
    """Of the same weights, crops and masks. A ratio of speeds says nothing of two that compute different things."""
    recipe = train_step._recipe(given([*words, "encoder.drop_path_rate=0"]))
    torch.manual_seed(0)
    ours, is_dino = train_step._objective(recipe), recipe.objective_name == "dino"
    with torch.no_grad():
        for name, x in ours.state_dict().items():  # nothing stays zero, and teachers are not their students
            x += 0.1 * torch.randn_like(x)
            if is_dino and "pos_embed" in name:  # timm resamples it in another way than DINO: one for all patches
                x[:, 1:] = x[:, 1:2]
    set_fused_attn(fused)
    peer = (step_peers.SelfDistillation if is_dino else step_peers.MaskedAutoencoder)(recipe)
    state = ours.state_dict()
    peer.load_state_dict(as_dinos_peer(state) if is_dino else {k.removeprefix("student."): x for k, x in state.items()})
    (batch,) = train_step.pixels(ours.views(), 4, 1, torch.device("cpu"))()
    expected = ours(batch, Progress(*train_step.MIDDLE)).loss
    torch.testing.assert_close(peer(batch), expected, atol=0, rtol=1e-5)


def test_an_objective_without_a_peer_stands_alone():
    words = ["simclr/vit_tiny_patch4_cifar10"]
    assert set(train_step.contestants(given([*words, "--compile"]))) == {
        *("ours fp32", "ours bf16", "ours fp32 compiled", "ours bf16 compiled"),
    }
    recipe = train_step._recipe(given(words))
    with pytest.raises(Absent, match="no peer for simclr"):
        step_peers.build(recipe, torch.device("cpu"), bf16=False, fused_attention=True, mark=lambda name: None)


def test_rows_compare_with_the_reference_and_with_the_machine():
    names = {c.name: c for c in (Contestant("ours", "bf16"), Contestant("reference", "fp32"))}
    found = {
        "ours bf16": [Sample(8, 1.0, 1.0, {"forward": 0.5, "memory": 2.0**20})],
        "reference fp32": [Sample(2, 1.0, 1.0, {})],
    }
    ours, reference = train_step.rows(found, names, None, flops=1e9, peaks={"bf16": 80e9, "fp32": None})
    assert (ours.value, ours.ratio, ours.aim) == (8.0, 4.0, 2.5)
    assert ours.more["of peak FLOP/s"] == pytest.approx(0.1)
    assert (ours.more["forward ms"], ours.more["peak MiB"]) == (500.0, 1.0)
    assert reference.more["of peak FLOP/s"] is None


def test_parts_are_summed_between_their_marks():
    parts = train_step.Parts(cuda=False)
    for name in ("", "data", "forward", "backward", "forward", "backward"):
        parts.mark(name)
    begin, *_, end = (time for _, time in parts._marks)
    spent = parts.seconds()
    assert sum(spent.values()) == pytest.approx(end - begin)
    assert spent["optimiser"] == 0.0
    assert not any(parts.seconds().values())
