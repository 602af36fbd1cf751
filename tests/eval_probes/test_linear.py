"""The batched grid equals heads trained one by one; features and heads equal the published evaluators'."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from eval_probes import linear, linprobe
from eval_probes.features import Features
from eval_probes.pooling import Pooling, pool
from eval_probes.subject import Subject
from selfsight.errors import UserError
from selfsight.training.lars import LARS

QUICK = linear.Linear(lrs=(0.001, 0.01, 0.1), batch_size=32, epochs=2, min_steps=60)


def blobs(n: int, seed: int, corpus: str, noise: float = 0.5) -> Features:
    generator = np.random.default_rng(seed)
    y = np.arange(n) % 4
    centres = np.random.default_rng(99).normal(size=(4, 12))
    X = centres[y] + noise * generator.normal(size=(n, 12))
    return Features(
        X=X.astype(np.float32),
        y=y.astype(np.int64),
        classes=list("abcd"),
        corpus=corpus,
        corpus_id=corpus,
        subject=Subject("w", "w" * 64, {}, {}, 12),
        pooling=Pooling(),
    )


def test_golden_features(golden):
    numbers = golden.load("linear_features")
    assert len(numbers.cases()) == 7
    for case in numbers.cases():
        given, hyper = numbers.inputs(case), numbers.hyper(case)
        if case.startswith("dinov2"):
            n, avgpool = hyper["use_n_blocks"], bool(hyper["use_avgpool"])
            X = pool(list(given["cls_tokens"][-n:]), given["patch_tokens"][-1], Pooling(n, avgpool))
            weights = numbers.weights(case)
            numbers.check(case, "logits", X @ weights["weight"].T + weights["bias"])
        else:
            n, avgpool = hyper["n_last_blocks"], bool(hyper["avgpool_patchtokens"])
            tokens = given["tokens"]
            X = pool(list(tokens[-n:, :, 0]), tokens[-1, :, 1:], Pooling(n, avgpool, interleave=avgpool))
        numbers.check(case, "features", X)


@pytest.mark.parametrize("wrong", [(0, False, False), (-1, True, False), (2, True, True), (1, False, True)])
def test_poolings_without_sense_are_refused(wrong):
    with pytest.raises(UserError):
        Pooling(*wrong)


def test_golden_mae_linprobe(golden):
    numbers = golden.load("mae_linprobe")
    (case,) = numbers.cases()
    given, hyper = numbers.inputs(case), numbers.hyper(case)
    head = linprobe.LinprobeHead(given["x"].shape[2], numbers.weights(case)["weight"].shape[0])
    norm, last = head
    last.load_state_dict(numbers.weights(case))
    optimizer = LARS(head.parameters(), **{k: hyper[k] for k in hyper})
    stacked: dict[str, list] = {}
    for x, y in zip(given["x"], given["y"], strict=True):
        logits, loss = linprobe.train_step(head, optimizer, x, y)
        now = {
            "logits": logits, "loss": loss, "grad_weight": last.weight.grad, "grad_bias": last.bias.grad,
            "weight": last.weight, "bias": last.bias,
            "running_mean": norm.running_mean, "running_var": norm.running_var,
        }  # fmt: skip
        for name, value in now.items():
            stacked.setdefault(name, []).append(value.detach().clone())
    for name, values in stacked.items():
        numbers.check(case, name, torch.stack(values))
    head.eval()
    numbers.check(case, "eval_logits", head(given["x_eval"]))


def wide(features: Features) -> Features:
    """Four blocks of class tokens and a mean token; only the first of the blocks knows the class."""
    noise = np.random.default_rng(7).normal(size=(features.n, 48)).astype(np.float32)
    return replace(features, X=np.concatenate([features.X, noise], axis=1), pooling=Pooling(4, True))


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_the_grid_equals_heads_trained_alone(decay):
    data = wide(blobs(200, 0, "a"))
    X, y = torch.from_numpy(data.X), torch.from_numpy(data.y)
    protocol = replace(QUICK, tokens=linear.DINOV2_TOKENS, weight_decay=decay)
    inputs = [p.columns(X.shape[1], data.pooling) for p in protocol.poolings()]
    grid = linear.train_heads(X, y, 4, protocol, inputs)
    for columns, heads in zip(inputs, grid.heads(), strict=True):
        for i, lr in enumerate(protocol.lrs):
            (alone,) = linear.train_heads(X[:, columns], y, 4, replace(protocol, lrs=(lr,))).heads()
            torch.testing.assert_close(heads.weight[i], alone.weight[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(heads.bias[i], alone.bias[0], rtol=1e-5, atol=1e-6)


def test_a_head_equals_torchs_own_sgd():
    data = blobs(200, 0, "a")
    X, y = torch.from_numpy(data.X), torch.from_numpy(data.y)
    (ours,) = linear.train_heads(X, y, 4, replace(QUICK, lrs=(0.05,))).heads()
    head = nn.Linear(12, 4)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    sgd = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9)
    total = QUICK.steps(200)
    cosine = torch.optim.lr_scheduler.LambdaLR(sgd, lambda t: 0.5 * (1 + np.cos(np.pi * t / total)))
    for rows in linear.batches(200, 32, total, 0):
        sgd.zero_grad()
        nn.functional.cross_entropy(head(X[rows]), y[rows]).backward()
        sgd.step()
        cosine.step()
    torch.testing.assert_close(ours.weight[0], head.weight.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.bias[0], head.bias, rtol=1e-4, atol=1e-5)


def test_the_tokens_that_know_the_class_are_chosen():
    train, test = wide(blobs(400, 0, "a")), wide(blobs(100, 1, "b"))
    score = linear.evaluate(train, test, replace(QUICK, tokens=("cls", "cls+avg", "cls4")))
    assert score.value > 0.95
    assert score.details["features"]["tokens"] == "cls4"
    told = score.details["held_out"]
    assert len(told) == 9
    assert max(told, key=lambda head: head["accuracy"])["accuracy"] == score.details["held_out_accuracy"]
    alone = linear.evaluate(train, test, replace(QUICK, tokens=("cls4",), lrs=(score.details["lr"],)))
    assert np.array_equal(alone.items, score.items)


def test_rates_that_round_alike_are_heads_of_their_own():
    score = linear.evaluate(blobs(400, 0, "a"), blobs(100, 1, "b"), replace(QUICK, lrs=(1e-6, 1.1e-6)))
    assert [head["lr"] for head in score.details["held_out"]] == [1e-6, 1.1e-6]


def test_separable_classes_are_separated_and_twice_gives_the_same():
    train, test = blobs(400, 0, "a"), blobs(100, 1, "b")
    score = linear.evaluate(train, test, QUICK)
    assert score.value > 0.95
    assert score.low < score.value <= score.high
    assert score.details["lr"] in QUICK.lrs
    assert linear.evaluate(train, test, QUICK) == score


def test_noise_gives_chance():
    score = linear.evaluate(blobs(400, 0, "a", noise=1e4), blobs(200, 1, "b", noise=1e4), QUICK)
    assert score.low <= 0.25 <= score.high


def test_a_learning_rate_that_diverges_is_not_chosen():
    score = linear.evaluate(blobs(400, 0, "a"), blobs(100, 1, "b"), replace(QUICK, lrs=(0.01, 1e30)))
    assert score.details["lr"] == 0.01
    assert score.value > 0.95


def test_the_scale_of_the_features_does_not_matter():
    train, test = blobs(400, 0, "a"), blobs(100, 1, "b")
    big, big_test = replace(train, X=train.X * 4096 + 512), replace(test, X=test.X * 4096 + 512)
    assert linear.evaluate(big, big_test, QUICK).value == pytest.approx(
        linear.evaluate(train, test, QUICK).value, abs=0.02
    )


def test_a_dead_column_stays_dead():
    fit = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    X, other = linear.standardise(fit, torch.tensor([[2.0, 6.0]]))
    assert X.tolist() == [[-1, 0], [1, 0]]
    assert other.tolist() == [[0, 0]]


def test_the_held_out_tenth_is_of_every_class_and_the_same_each_time():
    y = np.array([0] * 50 + [1] * 20 + [2] * 2 + [3])
    fit, held = linear.hold_out(y, 0.1, seed=3)
    assert np.bincount(y[held], minlength=4).tolist() == [5, 2, 1, 0]
    assert sorted([*fit, *held]) == list(range(len(y)))
    assert np.array_equal(linear.hold_out(y, 0.1, seed=3)[1], held)
    assert not np.array_equal(linear.hold_out(y, 0.1, seed=4)[1], held)


def test_one_image_per_class_is_too_few():
    few = blobs(4, 0, "a")
    with pytest.raises(UserError, match="one image per class"):
        linear.evaluate(few, blobs(8, 1, "b"), QUICK)


def test_maes_probe_learns_and_repeats():
    train, test = blobs(400, 0, "a"), blobs(100, 1, "b")
    protocol = linprobe.MAEOnFeatures(base_lr=10.0, batch_size=100)
    score = linprobe.evaluate(train, test, protocol)
    assert score.value > 0.9
    assert score.protocol == "mae-linprobe-kept"
    assert linprobe.evaluate(train, test, protocol) == score
    assert linprobe.schedule(5, protocol) == 0.5
    assert linprobe.schedule(50, protocol) == pytest.approx(0.5)
