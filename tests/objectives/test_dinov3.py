"""DINOv3 against the official code's numbers, Gram anchoring's calendar, and what it promises the trainer."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfsight.collective import Collective, DistributedCollective
from selfsight.encoders import DINOHead
from selfsight.errors import UserError
from selfsight.losses import gram_loss, ibot_loss, koleo, sinkhorn_knopp
from selfsight.losses.ibot import masked_rows
from selfsight.masks import block_masks, top_up
from selfsight.objectives import Progress
from selfsight.objectives.dino import dino_loss
from selfsight.objectives.dinov2 import pair_cross_entropy
from selfsight.objectives.dinov3 import DINOv3, DINOv3Config
from selfsight.recipe import EncoderConfig, OptimizerConfig
from selfsight.training import optim, schedules

ALONE = Collective()
ENCODER = EncoderConfig(
    "vit_tiny_patch16_224", img_size=32, args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
)
START = Progress(step=0, steps_per_epoch=4, total_steps=16)


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request) -> torch.dtype:
    return request.param


def small(collective: Collective | None = None, encoder: EncoderConfig = ENCODER, **keys) -> DINOv3:
    sizes = {"out_dim": 48, "hidden_dim": 40, "bottleneck_dim": 16, "global_crops_size": 32, "local_crops_size": 16}
    torch.manual_seed(0)
    config = DINOv3Config(**{**sizes, "local_crops_number": 3, "gram_crops_size": 64, **keys})
    return DINOv3(config, encoder, collective)


@pytest.mark.parametrize("case", ["default", "keep_neg", "teacher_neg", "batch_level", "no_norm"])
def test_gram_loss(golden, case, dtype):
    numbers = golden.load("dinov3_gram", dtype)
    hyper, inputs = numbers.hyper(case), numbers.inputs(case)
    student, teacher = inputs["student"].requires_grad_(), inputs["teacher"]
    negatives = {(True, False): "drop", (False, True): "drop_teacher", (False, False): "keep"}
    kind = negatives[hyper["remove_neg"], hyper["remove_only_teacher_neg"]]
    pair = (student, teacher) if hyper["img_level"] else (student.flatten(0, 1)[None], teacher.flatten(0, 1)[None])
    loss = gram_loss(*pair, normalize=hyper["apply_norm"], negatives=kind)
    loss.backward()
    numbers.check(case, "loss", loss)
    numbers.check(case, "grad_student", student.grad)


@pytest.mark.parametrize("b", [10, 24])
@pytest.mark.parametrize(("kind", "topk"), [("koleo", 1), ("dist_top1", 1), ("dist_top3", 3)])
def test_koleo(golden, kind, topk, b, dtype):
    case = f"{kind}_b{b}"
    numbers = golden.load("dinov3_koleo", dtype)
    x = numbers.inputs(case)["x"].requires_grad_()
    loss = koleo(x, ALONE, topk=topk)
    loss.backward()
    numbers.check(case, "loss", loss)
    numbers.check(case, "grad", x.grad)


def test_koleo_in_groups_is_koleo_of_each():
    x = torch.randn(11, 5, dtype=torch.float64)
    groups = [x[:4], x[4:]]  # what is left over, 3, belongs to the last group of 4
    expected = sum(len(g) * koleo(g, ALONE, topk=2) for g in groups) / 11
    torch.testing.assert_close(koleo(x, ALONE, topk=2, group=4), expected)
    torch.testing.assert_close(koleo(x, ALONE, group=16), koleo(x, ALONE))


@pytest.mark.parametrize("case", ["forward_all", "forward_ignore_diagonal"])
def test_class_token_loss(golden, case, dtype):
    """The mean over pairs: all of them for local crops, those of different crops for the global ones."""
    numbers = golden.load("dinov3_dino_ibot_loss", dtype)
    hyper, inputs = numbers.hyper(case), numbers.inputs(case)
    student, q = inputs["student"].requires_grad_(), inputs["teacher_probs"]
    if hyper["ignore_diagonal"]:
        loss = dino_loss(student, q, hyper["student_temp"])
    else:
        loss = pair_cross_entropy(student, q, hyper["student_temp"]) / (len(student) * len(q))
    loss.backward()
    numbers.check(case, "loss", loss)
    numbers.check(case, "grad_student", student.grad)


@pytest.mark.parametrize("case", ["sinkhorn_cls", "sinkhorn_patch"])
def test_sinkhorn(golden, case, dtype):
    numbers = golden.load("dinov3_dino_ibot_loss", dtype)
    hyper = numbers.hyper(case)
    probs = sinkhorn_knopp(numbers.inputs(case)["teacher"], hyper["temp"], ALONE, hyper["n_iterations"])
    numbers.check(case, "probs", probs)


def test_ibot_loss(golden, dtype):
    numbers = golden.load("dinov3_dino_ibot_loss", dtype)
    inputs = numbers.inputs("ibot_masked")
    student, mask = inputs["student"].requires_grad_(), inputs["masks"]
    _, weight = masked_rows(mask)
    temp = numbers.hyper("ibot_masked")["student_temp"]
    loss = ibot_loss(student, inputs["teacher_probs"], weight, len(mask), temp)
    loss.backward()
    numbers.check("ibot_masked", "loss", loss)
    numbers.check("ibot_masked", "grad_student", student.grad)


def test_head(golden, dtype):
    numbers = golden.load("dinov3_dino_ibot_loss", dtype)
    hyper, inputs = numbers.hyper("head"), numbers.inputs("head")
    sizes = {k: hyper[k] for k in ("hidden_dim", "bottleneck_dim")}
    head = DINOHead(hyper["in_dim"], hyper["out_dim"], weight_norm=False, **sizes).to(dtype)
    head.load_state_dict(numbers.weights("head"), strict=True)
    x = inputs["x"].requires_grad_()
    y = head(x)
    y.backward(inputs["cotangent"])
    numbers.check("head", "y", y)
    numbers.check("head", "y_no_last", F.normalize(head.mlp(x), dim=-1))
    numbers.check("head", "grad_x", x.grad)
    for name, p in head.named_parameters():
        numbers.check("head", f"grad_w.{name}", p.grad)


def test_masks_are_the_official_ones(golden):
    """Blocks from python's stream; numpy's says in which order the patches that are still free join."""
    numbers = golden.load("dinov3_misc")
    hyper = numbers.hyper("masks")
    side = hyper["input_size"]
    recorded = golden.MaskRecorder(hyper["random_seed"], (side, side), hyper["max_num_patches"])
    for count in numbers.outputs("masks")["asked"]:
        recorded.draw(int(count))
    asked = torch.tensor(recorded.asked)
    blocks = block_masks(recorded.noise(), asked, (side, side), min_area=4, max_area=recorded.max_area)
    keys, random = torch.zeros(blocks.shape), np.random.RandomState(hyper["numpy_seed"])
    for i, block in enumerate(blocks):
        free = (~block).nonzero().squeeze(1)
        keys[i, free[random.permutation(len(free))]] = torch.arange(len(free)) / len(free)
    masks = top_up(blocks, asked, keys)
    assert (blocks.sum(dim=1) < asked).any()  # or there would be nothing to see
    numbers.check("masks", "masks", masks.unflatten(1, (side, side)))


def test_every_batch_has_the_same_number_of_masked_patches():
    """Of 2·16 crops the i-th masked one, of 16, has all of its int(256 · (0.1 + 0.4·(i + 1)/16)) patches."""
    model = small(global_crops_size=128)
    (spec,) = model.views().noise
    expected = (256 * torch.linspace(0.1, 0.5, 17)[1:]).int()
    for _ in range(3):
        counts = model.masks(torch.rand(16, spec.length)).sum(dim=1)
        assert torch.equal(counts[counts > 0].sort().values.int(), expected)


def test_the_cosine_is_the_official_one(golden):
    numbers = golden.load("dinov3_misc")
    plain = numbers.hyper("cosine_plain")
    total, frozen = plain["total_iters"], plain["freeze_iters"]
    ends = plain["base_value"], plain["final_value"], plain["warmup_iters"]
    # The official one counts the frozen steps, of value 0, as part of the run but not of the warm-up.
    found = [0.0] * frozen + [schedules.dino_cosine(i, total - frozen, *ends) for i in range(total - frozen)]
    values = numbers.outputs("cosine_plain")["values"][:total]
    assert np.abs(found - values).max() <= numbers.arrays["cosine_plain/tol/values"]


def test_schedules_that_end_where_they_begin_are_constant():
    """A recipe says so with schedule=constant, no weight_decay_end, and final_momentum_teacher = momentum_teacher."""
    model = small(momentum_teacher=0.994, final_momentum_teacher=0.994)
    optimizer = OptimizerConfig(base_lr=1e-3, schedule="constant", warmup_epochs=1.0)
    times = [Progress(i, 4, 40) for i in range(4, 40)]
    assert {model.teacher_momentum(t) for t in times} == {0.994}
    np.testing.assert_allclose([schedules.learning_rate(optimizer, 1024, t) for t in times], 4e-3, rtol=1e-15)
    rising = small(momentum_teacher=0.992, final_momentum_teacher=1.0)
    assert rising.teacher_momentum(Progress(20, 4, 40)) == pytest.approx(0.996)


def seen_of_local(model, batch) -> torch.Tensor:
    """The student's class tokens of the local crops, (n·B, D)."""
    return model.see_as_student(batch, mask=None)[1][batch["global"].flatten(0, 1).shape[0] :]


def test_local_crops_have_a_norm_of_their_own_in_training(harness):
    model = small()
    batch = harness.make_batch(model, 4)
    with torch.no_grad():
        model.local_norm.weight *= 2
        same = model(batch, START).metrics["dino_local"]
        model.student.vit.norm.weight *= 3  # goes with the teacher's patches and global crops only
    images = batch["local"].flatten(0, 1)
    plain = model.student(images).cls
    torch.testing.assert_close(seen_of_local(model, batch), plain * 2 / 3, atol=1e-5, rtol=1e-4)
    assert same.isfinite()
    model.eval()
    seen = seen_of_local(model, batch)
    # Packed with the global crops, so of matrices of other shapes, whose products are summed in another order.
    torch.testing.assert_close(seen, plain, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        model.local_norm.weight.zero_()
    assert torch.equal(seen_of_local(model, batch), seen)  # the norm of their own has no part in it
    assert small(local_cls_norm=False).local_norm is None


def test_rotary_positions_and_registers(harness):
    """timm's DINOv3 encoder: positions of the crops, of any size, come from RoPE, which training rescales."""
    args = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "rope_rescale_coords": 2.0}
    model = small(encoder=EncoderConfig("vit_tiny_patch16_dinov3_qkvb", 32, args=args), gram_start=0)
    assert model.gram_teacher.vit.reg_token.shape == (1, 4, 32)
    losses = harness.train(model, range(3))
    assert all(loss.isfinite() for loss in losses)
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {n for n, p in model.named_parameters() if p.requires_grad}
    assert optim.layer_scales(model, 0.98, 0.2)["student.vit.reg_token"] == pytest.approx(0.98**3)


def test_weight_of_local_crops(harness):
    whole, half = small(local_weight=1.0), small(local_weight=0.5)
    batch = harness.make_batch(whole, 4)
    a, b = whole(batch, START), half(batch, START)
    torch.testing.assert_close(a.loss - b.loss, 0.5 * a.metrics["dino_local"])


def test_gram_tokens_are_the_teachers_of_larger_crops(harness):
    """Bicubic from 8 × 8 to 4 × 4 without antialiasing: half-way between the inner two of four, (−3, 19, 19, −3)/32."""
    model = small(gram_start=0).double()
    batch = {k: x.double() for k, x in harness.make_batch(model, 2).items()}
    student = model.student(batch["global"].flatten(0, 1))
    found = model.gram_tokens(batch["gram"], student)
    large = model.gram_teacher(batch["gram"].flatten(0, 1)).patches.unflatten(1, (8, 8))
    w = torch.tensor([-3, 19, 19, -3], dtype=torch.float64) / 32
    inner = torch.einsum("bhwd,h,w->bd", large[:, 1:5, 1:5], w, w)
    torch.testing.assert_close(found.unflatten(1, (4, 4))[:, 1, 1], inner)
    outcome = model(batch, START)
    mask = model.masks(batch["mask"])
    masked = model.student(batch["global"].flatten(0, 1), mask=mask, mask_token=model.mask_token)
    torch.testing.assert_close(outcome.metrics["gram"], gram_loss(masked.patches, found).detach())


def test_gram_crops_are_the_global_ones_undistorted():
    model = small(gram_start=5)
    first, _, gram = model.views().crops
    assert (gram.name, gram.like, gram.count, gram.size) == ("gram", "global", 2, 64)
    assert (gram.scale, gram.ratio, gram.flip) == (first.scale, first.ratio, first.flip)
    assert (gram.jitter, gram.grayscale, gram.blur, gram.solarize) == (0.0, 0.0, (), ())
    assert [c.name for c in small().views().crops] == ["global", "local"]


def step(harness, model: DINOv3, i: int, taken: bool = True) -> dict:
    metrics = model(harness.make_batch(model, 2, seed=i), Progress(i, 4, 40)).metrics
    with torch.no_grad():
        for p in model.teacher.parameters():
            p += 0.01  # an EMA that moves
    if taken:
        model.after_step()
    else:
        model.discard_step()
    return metrics


def gram_is_teacher(model: DINOv3) -> bool:
    pairs = zip(model.gram_teacher.parameters(), model.teacher.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_gram_teacher_is_refreshed_when_it_is_due(harness):
    model = small(gram_start=3, gram_refresh_every=2, gram_refreshes=2)
    counts, fresh, there = [], [], []
    for i in range(10):
        there.append("gram" in step(harness, model, i))
        counts.append(model.copies)
        fresh.append(gram_is_teacher(model))
    # Counted before step 3, 5 and 7 begin, that is after steps 2, 4 and 6.
    assert counts == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert fresh == [False, False, True, False, True, False, True, False, False, False]
    assert there == [False] * 3 + [True] * 7


def test_a_refused_step_delays_the_refresh(harness):
    model = small(gram_start=1)
    assert "gram" not in step(harness, model, 0, taken=False)
    assert "gram" not in step(harness, model, 1)  # nothing to be held to yet
    assert gram_is_teacher(model)
    assert "gram" in step(harness, model, 2)


def test_resuming_keeps_the_calendar(harness):
    first = small(gram_start=1, gram_refresh_every=3)
    for i in range(3):
        step(harness, first, i)
    second = small(gram_start=1, gram_refresh_every=3)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()}, strict=True)
    for i in range(3, 6):
        a, b = step(harness, first, i), step(harness, second, i)
        assert torch.equal(a["gram"], b["gram"])
    assert first.copies == second.copies == 2
    state = second.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in first.state_dict().items())


def test_initialisation_is_the_official_one():
    model = small(encoder=EncoderConfig(ENCODER.name, 32, args={**ENCODER.args, "reg_tokens": 4}), gram_start=0)
    for tokens in (model.student.vit.cls_token, model.student.vit.reg_token):
        assert tokens.std().item() == pytest.approx(0.02, rel=0.5)
    for head in (model.student_head, model.student_patch_head):
        assert [n for n, _ in head.last_layer.named_parameters()] == ["weight"]
        assert head.last_layer.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert gram_is_teacher(model)
    assert not any(p.requires_grad for p in model.gram_teacher.parameters())
    assert not any(model.gram_teacher is teacher for _, teacher in model.teacher_pairs())


def test_losses_leave_autocast(harness):
    model = small(gram_start=0)
    with torch.autocast("cpu", torch.bfloat16):
        outcome = model(harness.make_batch(model, 4), START)
    assert outcome.loss.dtype == outcome.metrics["gram"].dtype == torch.float32


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"centering": "centering"}, "choose dinov2"),
        ({"shared_head": True}, "choose dinov2"),
        ({"norm_last_layer": True}, "choose dinov2"),
        ({"gram_negatives": "remove"}, "choose keep, drop, drop_teacher"),
        ({"gram_refresh_every": 0}, "objective.gram_refresh_every is 0"),
        ({"koleo_group": 1}, "objective.koleo_group is 1"),
        ({"gram_start": -1}, "objective.gram_start is -1"),
    ],
)
def test_wrong_recipes(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        small(**keys)


def test_a_gram_size_that_the_patch_does_not_divide():
    with pytest.raises(UserError, match="use 56"):
        small(gram_start=0, gram_crops_size=60).views()


def grouped(collective: Collective | None = None) -> DINOv3:
    model = small(collective, koleo_group=4, koleo_topk=2, gram_start=0, patch_out_dim=24)
    return model.double()  # in which ranks and one process differ by what they compute, not by rounding


def double(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.double() for name, x in batch.items()}


def one_rank(rank: int, rendezvous: str, output: str) -> None:
    import harness  # beside this file, when it runs as a program

    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    collective = DistributedCollective()
    model = grouped(collective)
    batch = double(harness.make_batch(model, 8))
    model(harness.part(model, batch, 4 * rank, 4 * rank + 4), START).loss.backward()
    model.after_step()
    gradients = {k: collective.all_reduce_sum(g) / 2 for k, g in harness.gradients(model).items()}
    if rank == 0:
        torch.save([gradients, model.state_dict()], output)
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one_with_groups(harness, run_two, tmp_path):
    run_two(__file__, str(tmp_path / "found.pt"))
    gradients, state = torch.load(tmp_path / "found.pt", weights_only=True)
    alone = grouped()
    alone(double(harness.make_batch(alone, 8)), START).loss.backward()
    alone.after_step()
    torch.testing.assert_close(gradients, harness.gradients(alone), atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(state, alone.state_dict(), atol=1e-12, rtol=1e-10)


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), sys.argv[2], sys.argv[3])
