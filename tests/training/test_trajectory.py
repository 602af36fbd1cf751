"""Whole training steps through DeepSpeed against the official training loops of DINO and MAE: losses, gradients,
schedules, parameters and teacher after every step, at the tolerances of the golden files.
"""

import numpy as np
import pytest
import torch

from selfsight.objectives import Objective, Progress, find
from selfsight.recipe import EncoderConfig, OptimizerConfig, Recipe
from selfsight.training import cluster
from selfsight.training.engine import Engine, Step


def encoder(h) -> EncoderConfig:
    args = {k: h[k] for k in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    return EncoderConfig("vit_tiny_patch16_224", h["img_size"], args=args)


def dino(h) -> Objective:
    kind = find("dino")
    config = kind.Config(
        out_dim=h["head_out_dim"],
        hidden_dim=h["head_hidden_dim"],
        bottleneck_dim=h["head_bottleneck_dim"],
        head_layers=h["head_nlayers"],
        norm_last_layer=h["norm_last_layer"],
        freeze_last_layer=h["freeze_last_layer"],
        student_temp=h["student_temp"],
        warmup_teacher_temp=h["warmup_teacher_temp"],
        teacher_temp=h["teacher_temp"],
        warmup_teacher_temp_epochs=h["warmup_teacher_temp_epochs"],
        center_momentum=h["center_momentum"],
        momentum_teacher=h["momentum_teacher"],
        global_crops_size=h["global_size"],
        local_crops_size=h["local_size"],
        local_crops_number=h["n_local"],
    )
    return kind(config, encoder(h))


def recipe_of(h, zero: int, **optimizer) -> Recipe:
    recipe = Recipe(batch_size=h["batch"], epochs=h["epochs"])
    recipe.optimizer = OptimizerConfig(
        base_lr=h["lr"] * 256 / h["batch"],
        min_lr=h["min_lr"],
        warmup_epochs=h["warmup_epochs"],
        weight_decay=h["weight_decay"],
        **optimizer,
    )
    recipe.training.zero, recipe.training.precision = zero, "fp32"
    return recipe


def split_qkv(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The key third of a qkv bias has no true gradient and moves by rounding: the files hold its thirds apart."""
    split = {}
    for name, p in parameters.items():
        if name.endswith("attn.qkv.bias"):
            split |= {f"{name}.{part}": third for part, third in zip("qkv", p.chunk(3), strict=True)}
        else:
            split[name] = p
    return split


def sums(parameters: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Sum and l2 norm over all parameters but the key thirds."""
    flat = torch.cat([p.double().flatten() for n, p in split_qkv(parameters).items() if not n.endswith("bias.k")])
    return flat.sum().item(), flat.norm().item()


def norms(parameters: dict[str, torch.Tensor], order: list[str]) -> list[float]:
    split = {n: p for n, p in split_qkv(parameters).items() if not n.endswith("bias.k")}
    thirds = {n: [split[n]] if n in split else [split[f"{n}.q"], split[f"{n}.v"]] for n in order}
    return [torch.cat([p.double().flatten() for p in t]).norm().item() for t in thirds.values()]


def snapshot(objective: Objective) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in objective.named_parameters()}


def stacked(values: list) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


@pytest.mark.parametrize("zero", [0, 1])
def test_dino_trains_as_the_official_loop(golden, zero):
    numbers = golden.load("dino_trajectory")
    h, crops = numbers.hyper("train"), numbers.inputs("train")
    objective = dino(h)
    weights = numbers.weights("train")
    objective.load_state_dict(golden.to_dino(weights) | golden.to_dino(weights, "teacher"), strict=False)
    recipe = recipe_of(h, zero, weight_decay_end=h["weight_decay_end"], clip=h["clip_grad"], clip_per="tensor")
    engine = Engine(objective, recipe, cluster.join())
    crops = {name: crop.to(engine.cluster.device) for name, crop in crops.items()}
    order = h["parameter_order"].tolist()
    steps: list[Step] = []
    after, centers = [], []
    for step in range(h["steps"]):
        locals_ = torch.stack([crops[f"crop{2 + i}"][step] for i in range(h["n_local"])])
        batch = {"global": torch.stack([crops["crop0"][step], crops["crop1"][step]]), "local": locals_}
        steps.append(engine.step([batch], Progress(step, h["niter_per_ep"], h["epochs"] * h["niter_per_ep"])))
        after.append(snapshot(objective))
        centers.append(objective.get_buffer("center").clone())

    assert [s.lr for s in steps] == pytest.approx(h["lr_schedule"].tolist(), rel=1e-12)
    assert [s.weight_decay for s in steps] == pytest.approx(h["wd_schedule"].tolist(), rel=1e-12)
    assert [s.momentum for s in steps] == pytest.approx(h["momentum_schedule"].tolist(), rel=1e-12)
    numbers.check("train", "loss", stacked([s.loss for s in steps]))
    numbers.check("train", "center", torch.stack(centers))
    position = {n: i for i, g in enumerate(engine.optimizer.param_groups) for n in g["names"]}
    trained = [golden_name for golden_name in order if next(iter(golden.to_dino({golden_name: 0}))) in position]
    grad_norms = [[s.grad_norms[position[next(iter(golden.to_dino({n: 0})))]] for n in trained] for s in steps]
    numbers.check("train", "grad_norms", stacked(grad_norms))
    for part in ("student", "teacher"):
        official = [golden.from_dino(a, part) for a in after]
        numbers.check("train", f"{part}_sum_no_kbias", stacked([sums(p)[0] for p in official]))
        numbers.check("train", f"{part}_l2_no_kbias", stacked([sums(p)[1] for p in official]))
        numbers.check("train", f"{part}_param_l2", stacked([norms(p, order) for p in official]))
        for name, p in split_qkv(official[-1]).items():
            numbers.check("train", f"final_{part}.{name}", p)
    print(f"\nDINO under ZeRO-{zero}: worst error {numbers.worst:.2f} of its tolerance")


@pytest.mark.parametrize("zero", [0, 1])
def test_mae_trains_as_the_official_loop(golden, zero):
    numbers = golden.load("mae_trajectory")
    h, inputs = numbers.hyper("train"), numbers.inputs("train")
    kind = find("mae")
    config = kind.Config(
        mask_ratio=h["mask_ratio"],
        norm_pix_loss=h["norm_pix_loss"],
        decoder_embed_dim=h["decoder_embed_dim"],
        decoder_depth=h["decoder_depth"],
        decoder_num_heads=h["decoder_num_heads"],
        crop_size=h["img_size"],
    )
    objective = kind(config, encoder(h))
    objective.load_state_dict(golden.to_mae(numbers.weights("train")))
    recipe = recipe_of(h, zero, schedule="mae_cosine", betas=h["betas"].tolist())
    engine = Engine(objective, recipe, cluster.join())
    inputs = {name: x.to(engine.cluster.device) for name, x in inputs.items()}
    steps: list[Step] = []
    trainable = []
    for step in range(h["steps"]):
        batch = {"crop": inputs["images"][step][None], "noise": inputs["noise"][step]}
        steps.append(engine.step([batch], Progress(step, h["niter_per_ep"], h["epochs"] * h["niter_per_ep"])))
        moving = {n for n, p in objective.named_parameters() if p.requires_grad}
        trainable.append(golden.from_mae({n: p for n, p in snapshot(objective).items() if n in moving}))
    numbers.check("train", "loss", stacked([s.loss for s in steps]))
    numbers.check("train", "lr", [s.lr for s in steps])
    numbers.check("train", "grad_norm", stacked([s.grad_norm for s in steps]))
    numbers.check("train", "sum_no_kbias", stacked([sums(p)[0] for p in trainable]))
    numbers.check("train", "l2_no_kbias", stacked([sums(p)[1] for p in trainable]))
    final = split_qkv(golden.from_mae(snapshot(objective)))
    official = [n.removeprefix("final.") for n in numbers.outputs("train") if n.startswith("final.")]
    assert set(official) <= set(final)
    for name in official:
        numbers.check("train", f"final.{name}", final[name])
    print(f"\nMAE under ZeRO-{zero}: worst error {numbers.worst:.2f} of its tolerance")


def bf16_losses(golden, zero: int) -> tuple[Engine, list[float], list[float]]:
    """MAE's golden trajectory under autocast: the engine afterwards, its losses, the official ones in fp32."""
    numbers = golden.load("mae_trajectory")
    h, inputs = numbers.hyper("train"), numbers.inputs("train")
    kind = find("mae")
    config = kind.Config(decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=4, crop_size=32)
    objective = kind(config, encoder(h))
    objective.load_state_dict(golden.to_mae(numbers.weights("train")))
    recipe = recipe_of(h, zero, schedule="mae_cosine", betas=h["betas"].tolist())
    recipe.training.precision = "bf16"
    engine = Engine(objective, recipe, cluster.join())
    device, losses, seen = engine.cluster.device, [], set()
    objective.student.register_forward_pre_hook(lambda *_: seen.add(torch.is_autocast_enabled(device.type)))
    for step in range(h["steps"]):
        batch = {"crop": inputs["images"][step][None], "noise": inputs["noise"][step]}
        batch = {name: x.to(device) for name, x in batch.items()}
        losses.append(engine.step([batch], Progress(step, h["niter_per_ep"], h["epochs"] * h["niter_per_ep"])).loss)
    assert seen == {True}  # on a GPU DeepSpeed turns an autocast off that begins outside of its forward
    return engine, losses, numbers.outputs("train")["loss"].tolist()


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_bf16_keeps_weights_and_moments_in_fp32(golden, zero):
    """DeepSpeed's own bf16 mode would round the weights, and at stage 0 take a hidden step before the first one."""
    engine, losses, official = bf16_losses(golden, zero)
    assert losses == pytest.approx(official, rel=2e-2)
    assert losses != pytest.approx(official, rel=1e-6)  # it was bf16 indeed
    assert {p.dtype for p in engine.objective.parameters()} == {torch.float32}
    states = list(engine.optimizer.state.values())
    assert {s[m].dtype for s in states for m in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    assert {int(s["step"]) for s in states} == {len(losses)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_takes_the_fused_optimiser(golden):
    engine, losses, official = bf16_losses(golden, 1)
    assert engine.cluster.device.type == "cuda"
    assert all(group["fused"] for group in engine.optimizer.param_groups)
    assert losses == pytest.approx(official, rel=2e-2)
