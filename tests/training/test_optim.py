"""Parameter groups, clipping and freezing against the official functions."""

import pytest
import torch
from torch import nn

from selfsight.objectives import ParameterRule, Progress, find
from selfsight.recipe import EncoderConfig
from selfsight.training import optim

TINY = EncoderConfig("vit_tiny_patch16_224", 32, args={"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3})


def dino(norm_last_layer: bool = True, freeze: int = 1):
    kind = find("dino")
    config = kind.Config(
        out_dim=96,
        hidden_dim=64,
        bottleneck_dim=32,
        norm_last_layer=norm_last_layer,
        freeze_last_layer=freeze,
        global_crops_size=32,
        local_crops_size=16,
    )
    return kind(config, TINY)


def names(module: nn.Module, decay: bool, per_tensor: bool = False) -> list[str]:
    groups = optim.parameter_groups(module, [], per_tensor=per_tensor)
    return [n for g in groups if g["decay"] == decay for n in g["names"]]


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("norm", [True, False])
def test_dino_groups_are_the_official_ones(golden, norm, per_tensor):
    case = f"norm_last_layer_{str(norm).lower()}"
    official = golden.load("dino_param_groups").outputs(case)
    for group, decay in (("group0", True), ("group1", False)):
        ours = dict.fromkeys(names(dino(norm), decay, per_tensor))
        assert sorted(golden.from_dino(ours)) == sorted(official[group])


def test_mae_groups_are_the_official_ones(golden):
    kind = find("mae")
    config = kind.Config(decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4, crop_size=32)
    encoder = EncoderConfig(
        "vit_tiny_patch16_224", 32, args={"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    )
    mae = kind(config, encoder)
    official = golden.load("mae_param_groups").outputs("pretrain")
    for group, decay in (("group0", False), ("group1", True)):
        ours = list(golden.from_mae(dict.fromkeys(names(mae, decay))))
        assert {depthless(n) for n in ours} == {depthless(n) for n in official[group].tolist()}


def depthless(name: str) -> str:
    """Blocks are alike; the official model may have more or fewer of them."""
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


@pytest.mark.parametrize("case", ["clip_3.0", "clip_0.3"])
def test_clipping_per_tensor_is_the_official_one(golden, case):
    numbers = golden.load("dino_gradients")
    gradients = {n.removeprefix("grad."): g.clone() for n, g in numbers.inputs(case).items()}
    groups = [[g] for g in gradients.values()]
    norms = optim.squared_norms(groups, torch.device("cpu")).sqrt()
    numbers.check(case, "norms", norms)
    optim.clip(groups, norms.tolist(), numbers.hyper(case)["clip"], per_group=True)
    for name, gradient in gradients.items():
        numbers.check(case, f"grad.{name}", gradient)


def test_clipping_globally_is_torchs():
    generator = torch.Generator().manual_seed(0)
    ours = [[torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)], [torch.randn(7, 2)]]
    theirs = [nn.Parameter(torch.zeros_like(g)) for group in ours for g in group]
    for p, g in zip(theirs, (g for group in ours for g in group), strict=True):
        p.grad = g.clone()
    nn.utils.clip_grad_norm_(theirs, 0.7)
    norms = optim.squared_norms(ours, torch.device("cpu")).sqrt().tolist()
    optim.clip(ours, norms, 0.7, per_group=False)
    for p, g in zip(theirs, (g for group in ours for g in group), strict=True):
        torch.testing.assert_close(g, p.grad)


@pytest.mark.parametrize(("epoch", "freeze"), [(0, 1), (1, 1), (2, 3)])
def test_the_frozen_are_those_without_a_gradient_in_dino(golden, epoch, freeze):
    case = f"cancel_epoch{epoch}_freeze{freeze}"
    official = {n for n in golden.load("dino_gradients").outputs(case)["names_with_grad_none"].tolist() if n}
    module = dino(norm_last_layer=False, freeze=freeze)
    rules = module.parameter_rules()
    optimizer = optim.AdamW(optim.parameter_groups(module, rules, per_tensor=False), lr=1.0)
    optim.set_schedule(optimizer, rules, Progress(epoch, 1, 9), lr=1.0, weight_decay=0.1)
    frozen = [n for g in optimizer.param_groups if g["frozen"] for n in g["names"]]
    assert {n.removeprefix("head.") for n in golden.from_dino(dict.fromkeys(frozen))} == {
        n.removeprefix("head.") for n in official
    }


def test_a_frozen_group_does_not_move_at_all():
    moving, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    common = {"names": [], "decay": True, "rule": -1}
    optimizer = optim.AdamW(
        [{"params": [moving], "frozen": False, **common}, {"params": [frozen], "frozen": True, **common}],
        lr=0.1,
        weight_decay=0.5,
    )
    for _ in range(3):
        moving.grad = frozen.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(frozen, torch.ones(3))
    assert frozen not in optimizer.state  # no moments, no step count
    assert not torch.equal(moving, torch.ones(3))


def test_rules_scale_the_rate_and_decay_is_only_for_matrices():
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    rules = [ParameterRule("b", lambda progress: 0.5 * progress.step)]
    optimizer = optim.AdamW(optim.parameter_groups(module, rules, per_tensor=False), lr=1.0)
    optim.set_schedule(optimizer, rules, Progress(1, 1, 2), lr=2.0, weight_decay=0.3)
    seen = {g["names"][0]: (g["lr"], g["weight_decay"], g["frozen"]) for g in optimizer.param_groups}
    assert seen == {
        "a.weight": (2.0, 0.3, False),
        "a.bias": (2.0, 0.0, False),
        "b.weight": (1.0, 0.3, False),
        "b.bias": (1.0, 0.0, False),
    }
