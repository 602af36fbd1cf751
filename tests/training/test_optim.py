"""Parameter groups, clipping and freezing against the official functions."""

import pytest
import torch
from torch import nn

from selfsight.errors import UserError
from selfsight.objectives import ParameterRule, Progress, find
from selfsight.recipe import EncoderConfig, OptimizerConfig
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


def ibot():
    kind = find("ibot")
    sizes = {"out_dim": 96, "hidden_dim": 64, "bottleneck_dim": 32, "global_crops_size": 32, "local_crops_size": 16}
    return kind(kind.Config(**sizes, shared_head=False), TINY)


def names(module: nn.Module, decay: bool, **keys) -> list[str]:
    groups = optim.parameter_groups(module, [], OptimizerConfig(**keys))
    return [n for g in groups if g["decay"] == decay for n in g["names"]]


@pytest.mark.parametrize("clip_per", ["global", "tensor", "module"])
@pytest.mark.parametrize("norm", [True, False])
def test_dino_groups_are_the_official_ones(golden, norm, clip_per):
    case = f"norm_last_layer_{str(norm).lower()}"
    official = golden.load("dino_param_groups").outputs(case)
    for group, decay in (("group0", True), ("group1", False)):
        ours = dict.fromkeys(names(dino(norm), decay, clip_per=clip_per))
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
    optim.clip(groups, norms.tolist(), numbers.hyper(case)["clip"], list(range(len(groups))))
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
    optim.clip(ours, norms, 0.7, [0, 0])
    for p, g in zip(theirs, (g for group in ours for g in group), strict=True):
        torch.testing.assert_close(g, p.grad)


@pytest.mark.parametrize(("epoch", "freeze"), [(0, 1), (1, 1), (2, 3)])
def test_the_frozen_are_those_without_a_gradient_in_dino(golden, epoch, freeze):
    case = f"cancel_epoch{epoch}_freeze{freeze}"
    official = {n for n in golden.load("dino_gradients").outputs(case)["names_with_grad_none"].tolist() if n}
    module = dino(norm_last_layer=False, freeze=freeze)
    rules = module.parameter_rules()
    optimizer = optim.AdamW(optim.parameter_groups(module, rules, OptimizerConfig()), lr=1.0)
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
    optimizer = optim.AdamW(optim.parameter_groups(module, rules, OptimizerConfig()), lr=1.0)
    optim.set_schedule(optimizer, rules, Progress(1, 1, 2), lr=2.0, weight_decay=0.3)
    seen = {g["names"][0]: (g["lr"], g["weight_decay"], g["frozen"]) for g in optimizer.param_groups}
    assert seen == {
        "a.weight": (2.0, 0.3, False),
        "a.bias": (2.0, 0.0, False),
        "b.weight": (1.0, 0.3, False),
        "b.bias": (1.0, 0.0, False),
    }


def test_layers_learn_the_slower_the_deeper_they_lie():
    """Two blocks at 0.5, 0.25; tokens and positions at 0.125, the patch embedding at a fifth of that; heads, whole."""
    config = OptimizerConfig(layer_decay=0.5, patch_embed_lr_mult=0.2)
    groups = optim.parameter_groups(ibot(), [], config)
    scale = {n: g["scale"] for g in groups for n in g["names"]}
    assert scale["student.vit.blocks.1.mlp.fc1.weight"] == 0.5
    assert scale["student.vit.blocks.0.mlp.fc1.bias"] == 0.25
    assert {scale[n] for n in ("student.vit.cls_token", "student.vit.pos_embed", "mask_token")} == {0.125}
    assert scale["student.vit.patch_embed.proj.weight"] == 0.025
    assert {scale["student.vit.norm.weight"], scale["student_head.last_layer.weight_v"]} == {1.0}
    optimizer = optim.build(config, groups, fused=False)
    optim.set_schedule(optimizer, [], Progress(1, 1, 2), lr=2.0, weight_decay=0.1)
    assert {g["lr"] for g in optimizer.param_groups} == {2.0, 1.0, 0.5, 0.25, 0.05}


def test_the_encoder_and_each_head_are_clipped_by_themselves():
    """As torch's own function on each of the official code's sub-modules."""
    module = ibot()
    groups = optim.parameter_groups(module, module.parameter_rules(), OptimizerConfig(clip_per="module"))
    generator = torch.Generator().manual_seed(0)
    trained = [p for g in groups for p in g["params"]]
    for p in trained:
        p.grad = torch.randn(p.shape, generator=generator)
    gradients = [[p.grad.clone() for p in g["params"]] for g in groups]
    norms = optim.squared_norms(gradients, torch.device("cpu")).sqrt().tolist()
    optim.clip(gradients, norms, 3.0, optim.clip_units(groups, "module"))
    backbone = [*module.student.parameters(), module.mask_token]
    for parts in (backbone, module.student_head.parameters(), module.student_patch_head.parameters()):
        nn.utils.clip_grad_norm_([p for p in parts if p.requires_grad], 3.0)
    for p, g in zip(trained, (g for group in gradients for g in group), strict=True):
        torch.testing.assert_close(g, p.grad)


def test_what_is_decayed_can_be_said():
    module = dino()
    assert names(module, False, decay_vectors=True) == []  # MoCo v3
    usual = names(module, False)
    spared = names(module, False, undecayed=["pos_embed", "cls_token"])  # SimMIM
    assert set(spared) - set(usual) == {"student.vit.pos_embed", "student.vit.cls_token"}
    for group in optim.parameter_groups(module, [], OptimizerConfig(name="lamb", decay_vectors=True)):
        assert len(group["names"]) == 1
        assert group["decay"]
        assert group["adapt"] == (group["params"][0].ndim > 1 and not group["names"][0].endswith(".bias"))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("name", "adam", "adamw, sgd, lars or lamb"),
        ("clip_per", "layer", "global, tensor or module"),
        ("layer_decay", 1.5, "layer_decay is 1.5"),
        ("patch_embed_lr_mult", -0.1, "patch_embed_lr_mult is -0.1"),
        ("trust_coefficient", -1.0, "0 or more"),
    ],
)
def test_what_no_optimiser_takes_is_refused(key, value, said):
    with pytest.raises(UserError, match=said):
        optim.check(OptimizerConfig(**{key: value}))
