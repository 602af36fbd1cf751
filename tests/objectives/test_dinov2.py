"""DINOv2 against the official code's numbers, whole steps included, and what it promises the trainer."""

import sys

import numpy as np
import pytest
import torch

from selfsight.collective import Collective, DistributedCollective
from selfsight.errors import UserError
from selfsight.losses.ibot import masked_rows
from selfsight.masks import NUMBERS
from selfsight.objectives import Progress
from selfsight.objectives.dinov2 import DINOv2, DINOv2Config, dino_losses, pair_cross_entropy
from selfsight.recipe import EncoderConfig, OptimizerConfig
from selfsight.training import schedules
from selfsight.training.optim import parameter_groups

DTYPES = [torch.float32, torch.float64]
ENCODER = EncoderConfig(
    "vit_tiny_patch16_224", img_size=32, args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
)
START = Progress(step=0, steps_per_epoch=4, total_steps=16)


def small(**keys) -> DINOv2Config:
    sizes = {"out_dim": 48, "hidden_dim": 40, "bottleneck_dim": 16, "global_crops_size": 32, "local_crops_size": 16}
    return DINOv2Config(**{**sizes, "local_crops_number": 3, **keys})


def encoder(**args) -> EncoderConfig:
    return EncoderConfig(ENCODER.name, 32, args={**ENCODER.args, **args})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["centering_shared", "sinkhorn_knopp_shared", "sinkhorn_knopp_separate"])
def test_two_whole_steps(golden, case, dtype):
    """Losses, gradients of every parameter and centres of two forward passes with the same weights."""
    numbers = golden.load("dinov2_meta", dtype)
    hyper, inputs = numbers.hyper(case), numbers.inputs(case)
    config = small(
        centering=hyper["centering"],
        shared_head=not hyper["separate_ibot_head"],
        patch_out_dim=hyper["ibot_prototypes"],
        dino_weight=hyper["dino_weight"],
        ibot_weight=hyper["ibot_weight"],
        koleo_weight=hyper["koleo_weight"],
        student_temp=hyper["student_temp"],
        center_momentum=hyper["center_momentum"],
        warmup_teacher_temp=float(hyper["teacher_temps"][0]),
        teacher_temp=float(hyper["teacher_temps"][1]),
        warmup_teacher_temp_epochs=2,
    )
    model = DINOv2(config, encoder(init_values=hyper["init_values"])).to(dtype)
    model.load_state_dict(golden.to_dinov2(numbers.weights(case)), strict=True)
    official = {f"student.{n.split('gradnorm.')[1]}" for n in numbers.outputs(case) if "gradnorm" in n}
    for step in range(2):
        batch = {
            "global": inputs["global_crops"][step].unflatten(0, (2, hyper["batch"])),
            "local": inputs["local_crops"][step].unflatten(0, (hyper["n_local"], hyper["batch"])),
        }
        outcome = model.distil(batch, inputs["masks"][step], Progress(step, 1, 2))
        model.zero_grad()
        outcome.loss.backward()
        found = outcome.metrics
        numbers.check(case, f"step{step}.dino_local_crops_loss", found["dino_local"])
        numbers.check(case, f"step{step}.dino_global_crops_loss", found["dino_global"])
        numbers.check(case, f"step{step}.koleo_loss", found["koleo"] * hyper["koleo_weight"] / 2)  # as it is logged
        numbers.check(case, f"step{step}.ibot_loss", found["ibot"] / 2)
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == golden.to_dinov2(dict.fromkeys(official)).keys()
        for name in official:
            (ours,) = golden.to_dinov2({name: None})
            numbers.check(case, f"step{step}.gradnorm.{name.removeprefix('student.')}", gradients[ours].norm())
        if hyper["centering"] == "centering":
            numbers.check(case, f"step{step}.center_dino", model.center)
            numbers.check(case, f"step{step}.center_ibot", model.patch_center.value)
        model.after_step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_of_all_pairs(golden, dtype):
    numbers = golden.load("dinov2_dino_loss", dtype)
    inputs = numbers.inputs("forward")
    student = inputs["student"].requires_grad_()
    loss = pair_cross_entropy(student, inputs["teacher_probs"], numbers.hyper("forward")["student_temp"])
    loss.backward()
    numbers.check("forward", "loss", loss)
    numbers.check("forward", "grad_student", student.grad)


@pytest.mark.parametrize("local", [0, 3])
def test_loss_is_the_mean_over_pairs_of_different_crops(local):
    logits = torch.randn(2 + local, 3, 7, dtype=torch.float64)
    q = torch.randn(2, 3, 7, dtype=torch.float64).softmax(-1)
    v_and_t = [(v, t) for t in range(2) for v in range(len(logits)) if v != t]
    pairs = torch.stack([-(q[t] * (logits[v] / 0.1).log_softmax(-1)).sum(-1).mean() for v, t in v_and_t])
    is_local = torch.tensor([v > 1 for v, _ in v_and_t])
    found_local, found_global = dino_losses(logits, q, 0.1)
    torch.testing.assert_close(found_local, (pairs * is_local).sum() / len(pairs))
    torch.testing.assert_close(found_global, (pairs * ~is_local).sum() / len(pairs))


@pytest.mark.parametrize("case", ["collate_p0.5", "collate_p1.0"])
def test_masks_of_a_batch_are_the_official_ones(golden, case):
    """The official collate function draws ratio and mask of one crop after the other and shuffles them; given the
    same numbers and the places to which the shuffle took them, so do we."""
    numbers = golden.load("dinov2_masking")
    hyper = numbers.hyper(case)
    crops, grid = numbers.outputs(case)["collated_masks"].shape[0], hyper["grid"]
    n = int(crops * hyper["mask_probability"])
    bounds = torch.linspace(*hyper["mask_ratio_min_max"], n + 1)
    recorded = golden.MaskRecorder(hyper["random_seed"], (grid, grid), hyper["max_num_patches"])
    ratios = []
    for i in range(n):
        ratios.append(recorded.random.random())
        recorded.draw(int(grid**2 * (bounds[i] + (bounds[i + 1] - bounds[i]) * ratios[-1])))
    places = list(range(crops))
    recorded.random.shuffle(places)  # places[j] is which of the masks the j-th crop gets; from n on, none

    noise = torch.zeros(crops, 2 + NUMBERS, dtype=torch.float64)
    for j, i in enumerate(places):
        noise[j, 0] = (i + 0.5) / crops
        if i < n:
            noise[j, 1] = ratios[i]
            noise[j, 2 : 2 + len(recorded.numbers[i])] = torch.tensor(recorded.numbers[i])
    ratio = [float(x) for x in hyper["mask_ratio_min_max"]]
    config = small(mask_probability=hyper["mask_probability"], mask_ratio=ratio, global_crops_size=8 * grid)
    masks = DINOv2(config, ENCODER).masks(torch.cat(noise.chunk(2), dim=1))
    numbers.check(case, "collated_masks", masks)
    at, weight = masked_rows(masks)
    numbers.check(case, "mask_indices_list", at)
    numbers.check(case, "masks_weight", weight)
    numbers.check(case, "n_masked_patches", [len(at)])


def test_ratios_are_spread_over_the_batch_in_random_order():
    model = DINOv2(small(global_crops_size=128), ENCODER)
    counts = model.masks(torch.rand(32, model.views().noise[0].length)).sum(dim=1)
    assert (counts > 0).sum() == 32  # half of the crops of 32 images
    # In order of size the i-th lies in [0.1 + 0.4·i / 32, 0.1 + 0.4·(i + 1) / 32] of 256 patches, or falls short.
    upper = 256 * (0.1 + 0.4 * (torch.arange(32) + 1) / 32)
    assert (counts.sort().values[-32:] <= upper).all()
    assert counts.sum() > 0.95 * 32 * 0.3 * 256
    assert counts[:32].count_nonzero() not in (0, 32)


def test_schedules_are_the_official_ones(golden):
    numbers = golden.load("dinov2_schedule")
    plain = numbers.hyper("plain")
    values = numbers.outputs("plain")["values"]
    lr = [
        schedules.dino_cosine(i, plain["total_iters"], plain["base_value"], plain["final_value"], plain["warmup_iters"])
        for i in range(plain["total_iters"])
    ]
    assert np.abs(lr - values[: len(lr)]).max() <= numbers.arrays["plain/tol/values"]

    late = numbers.hyper("freeze")  # nothing for so long, then warm-up and cosine: the same curve, begun later
    begin, steps = late["freeze_iters"], late["total_iters"] - late["freeze_iters"]
    values = numbers.outputs("freeze")["values"][begin : begin + steps]
    keys = (late["base_value"], late["final_value"], late["warmup_iters"], late["start_warmup_value"])
    lr = [schedules.dino_cosine(i, steps, *keys) for i in range(steps)]
    assert np.abs(lr - values).max() <= numbers.arrays["freeze/tol/values"]

    temp = numbers.hyper("temp")
    model = DINOv2(
        small(
            warmup_teacher_temp=temp["start_warmup_value"],
            teacher_temp=temp["base_value"],
            warmup_teacher_temp_epochs=3,
        ),
        ENCODER,
    )
    steps = len(numbers.outputs("temp")["values"])
    numbers.check("temp", "values", [model.teacher_temperature(Progress(i, 4, 24)) for i in range(steps)])


def test_a_whole_runs_schedules_are_the_official_ones(golden):
    numbers = golden.load("dinov2_schedule")
    hyper = {k.split(".")[1]: v for k, v in numbers.hyper("build_schedulers").items()}
    steps_per_epoch, epochs = hyper["OFFICIAL_EPOCH_LENGTH"], hyper["epochs"]
    config = small(
        freeze_last_layer=hyper["freeze_last_layer_epochs"],
        momentum_teacher=hyper["momentum_teacher"],
        warmup_teacher_temp=hyper["warmup_teacher_temp"],
        teacher_temp=hyper["teacher_temp"],
        warmup_teacher_temp_epochs=hyper["warmup_teacher_temp_epochs"],
    )
    optimizer = OptimizerConfig(
        base_lr=hyper["lr"],
        min_lr=hyper["min_lr"],
        warmup_epochs=hyper["warmup_epochs"],
        weight_decay=hyper["weight_decay"],
        weight_decay_end=hyper["weight_decay_end"],
    )
    model = DINOv2(config, ENCODER)
    times = [Progress(i, steps_per_epoch, steps_per_epoch * epochs) for i in range(steps_per_epoch * epochs)]
    lr = np.array([schedules.learning_rate(optimizer, 256, t) for t in times])
    numbers.check("build_schedulers", "lr", lr)
    numbers.check("build_schedulers", "wd", [schedules.weight_decay(optimizer, t) for t in times])
    numbers.check("build_schedulers", "momentum", [model.teacher_momentum(t) for t in times])
    numbers.check("build_schedulers", "teacher_temp", [model.teacher_temperature(t) for t in times])
    last_layer = np.array([lr_scale(model, "student_head.last_layer.weight_v", t) for t in times])
    numbers.check("build_schedulers", "last_layer_lr", lr * last_layer)


def lr_scale(model: DINOv2, name: str, progress: Progress) -> float:
    rules = (rule for rule in model.parameter_rules() if name.startswith(rule.prefix))
    return next((rule.lr_scale(progress) for rule in rules), 1.0)


def test_learning_rates_and_decay_of_every_parameter(golden):
    numbers = golden.load("dinov2_vit")
    hyper = numbers.hyper("param_groups")
    model = DINOv2(small(shared_head=False, freeze_last_layer=1), encoder(init_values=0.3, reg_tokens=2))
    optimizer = OptimizerConfig(
        layer_decay=hyper["layerwise_decay"], patch_embed_lr_mult=hyper["patch_embed_lr_mult"], clip_per="tensor"
    )
    groups = parameter_groups(model, model.parameter_rules(), optimizer)
    decayed = {g["names"][0]: float(g["decay"]) for g in groups}
    scale = {g["names"][0]: g["scale"] for g in groups}
    for part, prefix in (("backbone", "student.vit."), ("dino_head", "student_head.")):
        official = numbers.outputs("param_groups")[f"{part}.name"].tolist()
        ours = ["mask_token" if n == "mask_token" else prefix + n for n in official]
        numbers.check("param_groups", f"{part}.lr_multiplier", np.array([scale[n] for n in ours]))
        numbers.check("param_groups", f"{part}.wd_multiplier", np.array([decayed[n] for n in ours]))
        frozen = [lr_scale(model, n, START) == 0 for n in ours]
        numbers.check("param_groups", f"{part}.is_last_layer", frozen)
    assert scale["student.vit.reg_token"] == pytest.approx(0.9**3)
    assert lr_scale(model, "student_patch_head.last_layer.weight_v", START) == 0.0


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    model = DINOv2(small(shared_head=False), encoder(init_values=1e-5, reg_tokens=4))
    vit = model.student.vit
    for token in (vit.cls_token, vit.reg_token):
        assert 0 < token.abs().max() < 1e-5
    assert not model.mask_token.any()
    assert (vit.blocks[0].ls1.gamma == 1e-5).all()
    assert model.student_head.last_layer.weight_g.requires_grad
    for student, teacher in model.teacher_pairs():
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
        assert not any(p.requires_grad for p in teacher.parameters())
    assert len(model.teacher_pairs()) == 3


def test_centres_move_only_where_they_are_used(harness):
    for centering, moves in (("centering", True), ("sinkhorn_knopp", False)):
        model = DINOv2(small(centering=centering), ENCODER)
        model(harness.make_batch(model, 4), START)
        assert not model.patch_center.value.any()
        model.after_step()
        assert bool(model.center.any()) == bool(model.patch_center.value.any()) == moves


def test_nothing_masked_is_no_accident(harness):
    for centering in ("centering", "sinkhorn_knopp"):
        model = DINOv2(small(centering=centering, mask_probability=0.0, local_crops_number=0), ENCODER)
        outcome = model(harness.make_batch(model, 2), START)
        outcome.loss.backward()
        assert outcome.metrics["ibot"] == 0
        model.after_step()
        assert all(v.isfinite().all() for v in model.state_dict().values())


def test_targets_and_losses_leave_autocast(harness):
    model = DINOv2(small(), encoder(reg_tokens=2))
    with torch.autocast("cpu", torch.bfloat16):
        outcome = model(harness.make_batch(model, 4), START)
    assert outcome.loss.dtype == torch.float32
    outcome.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"centering": "sinkhorn"}, "objective.centering is 'sinkhorn': choose"),
        ({"mask_ratio": [0.5, 0.1]}, "objective.mask_ratio is"),
        ({"patch_out_dim": 7}, "set objective.shared_head=false"),
        ({"koleo_weight": -1.0}, "objective.koleo_weight is -1.0"),
    ],
)
def test_wrong_recipes(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        DINOv2(small(**keys), ENCODER)


def with_centres(collective: Collective | None = None) -> DINOv2:
    torch.manual_seed(0)
    model = DINOv2(small(centering="centering", shared_head=False, patch_out_dim=24), ENCODER, collective)
    return model.double()  # in which ranks and one process differ by what they compute, not by rounding


def double(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.double() for name, x in batch.items()}


def one_rank(rank: int, rendezvous: str, output: str) -> None:
    import harness  # beside this file, when it runs as a program

    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    collective = DistributedCollective()
    model = with_centres(collective)
    batch = double(harness.make_batch(model, 6))
    model(harness.part(model, batch, 3 * rank, 3 * rank + 3), START).loss.backward()
    model.after_step()
    gradients = {k: collective.all_reduce_sum(g) / 2 for k, g in harness.gradients(model).items()}
    if rank == 0:
        torch.save([gradients, model.state_dict()], output)
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one_with_centres_and_untied_heads_too(harness, run_two, tmp_path):
    """The conformance test has it with Sinkhorn. Ranks differ in how many patches are masked; the centre is of all."""
    run_two(__file__, str(tmp_path / "found.pt"))
    gradients, state = torch.load(tmp_path / "found.pt", weights_only=True)
    alone = with_centres()
    alone(double(harness.make_batch(alone, 6)), START).loss.backward()
    alone.after_step()
    torch.testing.assert_close(gradients, harness.gradients(alone), atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(state, alone.state_dict(), atol=1e-12, rtol=1e-10)


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), sys.argv[2], sys.argv[3])
