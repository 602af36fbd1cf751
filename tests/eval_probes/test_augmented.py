"""Probes on random crops: the same images, encoder and schedules as published, heads as torch would train them."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from eval_probes import attentive, augmented, linear_crops, linprobe
from eval_probes.bench import Bench
from eval_probes.extraction import How
from eval_probes.grid import Grid
from eval_probes.pooling import Pooling
from launch.cli import main
from selfsight import encoders
from selfsight.corpus import build
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig
from selfsight.weights import export_encoder

TINY = EncoderConfig("vit_tiny_patch16_224", 32, args={"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3})
N = 30  # images of each corpus


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """train and test corpora of a dark and a light class, and weights."""
    root = tmp_path_factory.mktemp("augmented")
    for name, seed in (("train", 0), ("test", 1)):
        generator = np.random.default_rng(seed)
        for i in range(N):
            folder = root / f"{name}-images" / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 100, (40, 36 + i, 3)) + 120 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        build([root / f"{name}-images"], root / name)
    torch.manual_seed(0)
    export_encoder(encoders.build(TINY), TINY, root / "weights", meta={"step": 4})
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))


def bench(place: Path, weights: str | None = None, **how) -> Bench:
    return Bench.open(weights or place / "weights", place / "train", place / "test", How(**{"workers": 2, **how}))


def drawn(rest: str, count: int, n: int = 5, batch: int = 3) -> list[tuple[list[int], list[int]]]:
    pairs = islice(augmented.order(np.arange(n), batch, 0, rest), count)
    return [(ordinals.tolist(), visits.tolist()) for ordinals, visits in pairs]


def test_every_pass_shows_every_image_once():
    carried = drawn("carry", 5)
    assert [visits for _, visits in carried] == [[0, 0, 0], [0, 0, 1], [1, 1, 1], [1, 2, 2], [2, 2, 2]]
    seen = [i for ordinals, _ in carried for i in ordinals]
    passes = [seen[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in passes)
    assert passes[0] != passes[1]
    kept, dropped = drawn("keep", 4), drawn("drop", 2)
    assert [len(ordinals) for ordinals, _ in kept] == [3, 2, 3, 2]
    assert sorted(kept[2][0] + kept[3][0]) == [0, 1, 2, 3, 4]
    assert [visits for _, visits in dropped] == [[0, 0, 0], [1, 1, 1]]
    assert [len(o) for o, _ in drawn("carry", 2, n=2, batch=5)] == [5, 5]  # a batch larger than the corpus


def test_whole_images_have_the_features_that_are_kept_of_them(place):
    table = bench(place, batch_size=4)
    train, pooling = table.need("train"), Pooling(2, True)
    once = augmented.once(np.arange(N), 7)
    parts = list(augmented.encoded(table, train, once, augmented.frames(table, train), pooling, pooling.blocks))
    assert [len(y) for _, y in parts] == [7, 7, 7, 7, 2]
    x, y = (torch.cat(both) for both in zip(*parts, strict=True))
    kept = table.features(train, pooling)
    torch.testing.assert_close(x, kept.tensor(), rtol=1e-5, atol=1e-5)
    assert torch.equal(y, kept.labels())


def test_crops_depend_on_the_visit_and_on_nobody_who_makes_them(place):
    protocol = replace(linear_crops.PRESETS["dino-linear"], batch_size=20)

    def made(**how) -> torch.Tensor:
        table = bench(place, **how)
        train = table.need("train")
        order = islice(augmented.order(np.arange(N), 20, 0), 3)
        return torch.cat(
            [x for x, _, _ in augmented.images(table, train, order, augmented.crops(table, train, protocol))]
        )

    crops = made(workers=1)
    assert crops.shape == (60, 3, 32, 32)
    assert torch.equal(crops, made(workers=3, batch_size=7))
    first, again = (np.concatenate([o for o, _ in islice(augmented.order(np.arange(N), 20, 0), 3)]) == 0).nonzero()[0]
    assert not torch.equal(crops[first], crops[again])
    sharp = replace(protocol, interpolation="bicubic")
    make = augmented.crops(bench(place), bench(place).need("train"), sharp)
    assert not np.array_equal(make(0, 0), crops[first].numpy())


@pytest.mark.parametrize("preset", ["dino-linear", "dinov2-linear"])
def test_rates_are_annealed_as_torch_does(place, monkeypatch, preset):
    """`CosineAnnealingLR`, stepped after every epoch by DINO and after every step by DINOv2."""
    protocol = replace(linear_crops.PRESETS[preset], batch_size=20, epochs=3, epoch_steps=2 * (preset != "dino-linear"))
    factors = []
    monkeypatch.setattr(Grid, "step", lambda self, inputs, y, factor: factors.append(factor))
    protocol.run(bench(place))
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    by_step = preset == "dinov2-linear"
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 6 if by_step else 3)
    published = []
    for step in range(6):  # two of 20 and 10 images, or twice two of 20
        published.append(sgd.param_groups[0]["lr"])
        sgd.step()
        if by_step or step % 2:
            annealing.step()
    assert factors == pytest.approx(published, abs=1e-12)


def test_dinos_probe_reports_its_best_epoch_and_says_so(place):
    protocol = replace(linear_crops.PRESETS["dino-linear"], tokens=("cls2",), lrs=(1.0,), batch_size=15, epochs=4)
    (score,) = protocol.run(bench(place))
    assert score.value == max(score.details["best_by_epoch"]) > 0.9
    assert score.details["best_by_epoch"][score.details["epoch"] - 1] == score.value
    assert score.details["chosen_on"] == "the test images"
    assert (score.details["steps"], len(score.details["best_by_epoch"]), score.n) == (8, 4, N)
    (twice,) = protocol.run(bench(place))
    assert np.array_equal(twice.items, score.items)


def test_dinov2s_probe_has_all_its_heads(place, capsys):
    numbers = ["epochs=1", "epoch_steps=3", "batch_size=16", "scale=[0.5, 1]"]
    corpora = ["--train", str(place / "train"), "--test", str(place / "test")]
    assert main(["eval", "dinov2-linear", str(place / "weights"), *corpora, "--json", *numbers]) == 0
    said = json.loads(capsys.readouterr().out)
    heads = said["details"]["heads"]
    assert len(heads) == len({(h["tokens"], h["lr"]) for h in heads}) == 52
    assert said["value"] == max(h["accuracy"] for h in heads)


def test_maes_probe_on_crops(place):
    protocol = linprobe.MAELinprobe(base_lr=20.0, batch_size=15, epochs=4, warmup_epochs=1, scale=(0.5, 1.0))
    (score,) = protocol.run(bench(place))
    assert score.value == max(score.details["by_epoch"]) > 0.9
    assert (score.details["steps"], len(score.details["by_epoch"])) == (8, 4)
    assert score.details["lr"] == pytest.approx(20 * 15 / 256)


def test_attentive_heads_equal_attention_written_out():
    torch.manual_seed(0)
    heads = attentive.AttentiveHeads(3, 24, 5, head_dim=8, init_std=0.5).double()
    nn.init.normal_(heads.value_bias)
    nn.init.normal_(heads.bias)
    x = torch.randn(4, 7, 24, dtype=torch.float64)
    for i, logits in enumerate(heads(x)):
        key, value = (
            x @ heads.key[i].T + 3.0,
            x @ heads.value[i].T + heads.value_bias[i],
        )  # a bias of the keys is nothing
        q, k, v = (
            t.unflatten(-1, (3, 8)).transpose(-3, -2) for t in (heads.query[i].expand(4, 1, 24), key, value)
        )  # (B, attention heads, N, 8)
        pooled = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)
        torch.testing.assert_close(logits, pooled @ heads.weight[i].T + heads.bias[i], rtol=1e-9, atol=1e-9)


def test_each_head_is_stepped_by_torchs_adamw():
    torch.manual_seed(0)
    lrs, decays, betas = torch.tensor([1e-3, 1e-2]), torch.tensor([0.0, 0.3]), (0.9, 0.95)
    heads = attentive.AttentiveHeads(2, 8, 3, head_dim=4, init_std=0.5)
    nn.init.normal_(heads.bias)
    slices = [[p[i].detach().clone().requires_grad_() for p in heads.parameters()] for i in range(2)]
    decayed = [any(p is d for d in heads.decayed()) for p in heads.parameters()]
    ours, factors = attentive.HeadwiseAdamW(heads, lrs, decays, betas), (0.0, 1.0, 0.5)
    theirs = []
    for i, tensors in enumerate(slices):
        groups = [
            {"params": [t], "weight_decay": float(decays[i]) if d else 0.0}
            for t, d in zip(tensors, decayed, strict=True)
        ]
        theirs.append(torch.optim.AdamW(groups, betas=betas))
    for factor in factors:
        for k, p in enumerate(heads.parameters()):
            p.grad = torch.randn_like(p)
            for i in range(2):
                slices[i][k].grad = p.grad[i].clone()
        ours.step(factor)
        for lr, adamw in zip(lrs, theirs, strict=True):
            for group in adamw.param_groups:
                group["lr"] = factor * float(lr)
            adamw.step()
    for k, p in enumerate(heads.parameters()):
        for i in range(2):
            torch.testing.assert_close(p[i].detach(), slices[i][k].detach(), rtol=1e-5, atol=1e-6)


def test_capis_schedule():
    protocol = attentive.Attentive(steps=50, warmup_steps=10)
    decay = (np.cos(np.linspace(0, np.pi, 40)) + 1) / 2
    expected = np.concatenate([np.linspace(0.0, 1.0, 10), decay])
    np.testing.assert_allclose([protocol.factor(step) for step in range(50)], expected, atol=1e-12)


def test_capis_probe_chooses_on_training_images(place):
    protocol = replace(
        attentive.PRESETS["capi-attentive"],
        lrs=(1e-9, 0.1), weight_decays=(1e-3,), steps=20, warmup_steps=2, batch_size=16, head_dim=16,
        scale=(0.5, 1.0), held_out=0.2,
    )  # fmt: skip
    (score,) = protocol.run(bench(place))
    assert score.details["lr"] == 0.1
    assert [head["lr"] for head in score.details["held_out"]] == [1e-9, 0.1]
    assert score.value > 0.9
    assert score.n == N


def test_what_cannot_be_probed_is_said_in_a_sentence(place):
    with pytest.raises(UserError, match="set head_dim"):
        attentive.PRESETS["capi-attentive"].run(bench(place))
    with pytest.raises(UserError, match="needs weights"):
        replace(linear_crops.PRESETS["dino-linear"], epochs=1).run(bench(place, "pixels"))
    with pytest.raises(UserError, match="epochs or steps"):
        linear_crops.LinearOnCrops(anneal="never")
