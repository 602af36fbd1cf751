"""DINO against the official code's numbers, and what it promises the trainer."""

import math

import pytest
import torch

from selfsight.errors import UserError
from selfsight.objectives import Progress
from selfsight.objectives.dino import DINO, DINOConfig, dino_loss
from selfsight.recipe import EncoderConfig

DTYPES = [torch.float32, torch.float64]
ENCODER = EncoderConfig(
    "vit_tiny_patch16_224", img_size=32, args={"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
)


def small(**keys) -> DINOConfig:
    """The golden files' head and crops."""
    sizes = {"out_dim": 96, "hidden_dim": 64, "bottleneck_dim": 32, "global_crops_size": 32, "local_crops_size": 16}
    return DINOConfig(**{**sizes, "local_crops_number": 4, **keys})


def epoch(e: int) -> Progress:
    return Progress(step=e, steps_per_epoch=1, total_steps=6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["crops2p4", "crops2p8"])
def test_loss_and_centre(golden, case, dtype):
    numbers = golden.load("dino_loss", dtype)
    hyper, inputs = numbers.hyper(case), numbers.inputs(case)
    keys = ("out_dim", "warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs", "student_temp")
    dino = DINO(small(center_momentum=hyper["center_momentum"], **{k: hyper[k] for k in keys}), ENCODER).to(dtype)
    losses, centers, grads = [], [], []
    for e, student, teacher in zip(hyper["epoch_per_step"], inputs["student"], inputs["teacher"], strict=True):
        logits_s = student.unflatten(0, (hyper["ncrops"], hyper["batch"])).requires_grad_()
        loss, metrics = dino.compare(logits_s, teacher.unflatten(0, (2, hyper["batch"])), epoch(int(e)))
        loss.backward()
        dino.after_step()
        losses.append(loss.detach())
        centers.append(dino.center.clone())
        grads.append(logits_s.grad.flatten(0, 1))
        assert 0 <= metrics["teacher_entropy"] <= math.log(hyper["out_dim"])
        assert metrics["kl"] >= 0
    numbers.check(case, "loss", torch.stack(losses))
    numbers.check(case, "center", torch.stack(centers))
    numbers.check(case, "grad_student", torch.stack(grads))
    temperatures = [dino.teacher_temperature(epoch(e)) for e in range(hyper["nepochs"])]
    numbers.check(case, "teacher_temp_schedule", temperatures)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multicrop_forward(golden, dtype):
    numbers = golden.load("dino_vit", dtype)
    dino = DINO(small(), ENCODER).to(dtype)
    weights = numbers.weights("weights")
    state = {**golden.to_dino(weights), **golden.to_dino(weights, "teacher"), "center": dino.center}
    dino.load_state_dict(state, strict=True)
    assert golden.from_dino(dino.state_dict()).keys() == weights.keys()

    crops = numbers.inputs("multicrop")
    batch = [torch.stack([crops[f"global{i}"] for i in range(2)]), torch.stack([crops[f"local{i}"] for i in range(4)])]
    with torch.no_grad():
        _, teacher = dino._project(dino.teacher, dino.teacher_head, batch[:1])
    _, student = dino._project(dino.student, dino.student_head, batch)
    numbers.check("multicrop", "teacher_out", teacher.flatten(0, 1))
    numbers.check("multicrop", "student_out", student.flatten(0, 1))

    (student.flatten(0, 1) * crops["cotangent"]).sum().backward()
    grads = golden.from_dino({n: p.grad for n, p in dino.named_parameters() if p.grad is not None})
    outputs = numbers.outputs("multicrop")
    assert {f"gradnorm.{n}" for n in grads} == {n for n in outputs if n.startswith("gradnorm.")}
    for name, grad in grads.items():
        numbers.check("multicrop", f"gradnorm.{name}", grad.norm())
    for name in ("backbone.pos_embed", "backbone.cls_token"):
        numbers.check("multicrop", f"grad.{name}", grads[name])


def test_loss_is_the_mean_over_pairs_of_different_crops():
    logits = torch.randn(5, 3, 7, dtype=torch.float64)
    q = torch.randn(2, 3, 7, dtype=torch.float64).softmax(-1)
    pairs = [-(q[t] * (logits[v] / 0.1).log_softmax(-1)).sum(-1).mean() for t in range(2) for v in range(5) if v != t]
    torch.testing.assert_close(dino_loss(logits, q, 0.1), torch.stack(pairs).mean())


def test_teacher_starts_as_the_student_and_stands_outside_the_graph():
    dino = DINO(small(), EncoderConfig(ENCODER.name, 32, drop_path_rate=0.3, args=ENCODER.args))
    for student, teacher in dino.teacher_pairs():
        pairs = zip(student.state_dict().items(), teacher.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
        assert not any(p.requires_grad for p in teacher.parameters())
    frozen = [n for n, p in dino.named_parameters() if not p.requires_grad and n.startswith("student")]
    assert frozen == ["student_head.last_layer.weight_g"]
    drops = [m.drop_prob for m in dino.modules() if type(m).__name__ == "DropPath"]
    assert drops == pytest.approx([0.3, 0.3])  # of the student's second block alone


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    dino = DINO(small(), ENCODER)
    vit, head = dino.student.vit, dino.student_head
    for weight in (vit.cls_token, vit.pos_embed, vit.blocks[0].mlp.fc1.weight, head.mlp[0].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not head.mlp[0].bias.any()
    assert (head.last_layer.weight_g == 1).all()
    assert head.last_layer.weight_v.abs().max() <= 32**-0.5  # torch's own for a linear layer of 32 inputs


def test_momentum_follows_the_official_cosine():
    dino = DINO(small(momentum_teacher=0.9), ENCODER)
    actual = [dino.teacher_momentum(Progress(i, 1, 5)) for i in range(5)]
    official = [0.9, 0.9095491502812526, 0.9345491502812526, 0.9654508497187474, 0.9904508497187474]
    assert actual == pytest.approx(official, rel=1e-12)


def test_the_last_layer_is_frozen_for_its_epochs():
    (rule,) = DINO(small(freeze_last_layer=2), ENCODER).parameter_rules()
    assert [rule.lr_scale(Progress(step, 10, 100)) for step in (0, 19, 20, 99)] == [0.0, 0.0, 1.0, 1.0]
    assert "student_head.last_layer.weight_v".startswith(rule.prefix)


def test_centre_moves_in_training_only_and_after_the_step_only():
    dino = DINO(small(local_crops_number=0), ENCODER)
    batch = {"global": torch.randn(2, 3, 3, 32, 32)}
    dino(batch, epoch(0))
    assert not dino.center.any()
    dino.discard_step()
    dino.eval()(batch, epoch(0))
    assert not dino.pending_sum.any()
    dino.train()(batch, epoch(0))
    dino.after_step()
    assert dino.center.abs().sum() > 0
    assert not dino.pending_sum.any()


def test_views_are_the_published_ones():
    dino = DINO(DINOConfig(out_dim=8), EncoderConfig(args={"depth": 1}))
    large, local = dino.views().crops
    assert (large.name, large.count, large.size, large.blur, large.solarize) == ("global", 2, 224, (1.0, 0.1), (0, 0.2))
    assert (local.name, local.count, local.size, local.blur, local.solarize) == ("local", 8, 96, (0.5,) * 8, ())
    assert (large.jitter, large.brightness, large.contrast, large.saturation, large.hue) == (0.8, 0.4, 0.4, 0.2, 0.1)
    assert [c.name for c in DINO(small(local_crops_number=0), ENCODER).views().crops] == ["global"]


def test_loss_leaves_autocast():
    dino = DINO(small(), ENCODER)
    batch = {"global": torch.randn(2, 2, 3, 32, 32), "local": torch.randn(4, 2, 3, 16, 16)}
    with torch.autocast("cpu", torch.bfloat16):
        outcome = dino(batch, epoch(0))
    assert outcome.loss.dtype == torch.float32
    outcome.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in dino.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("config", "encoder", "sentence"),
    [
        (small(blur=[0.5]), ENCODER, "objective.blur should be three"),
        (small(local_crops_scale=[0.1]), ENCODER, "objective.local_crops_scale should be two"),
        (small(teacher_temp=0.0), ENCODER, "objective.teacher_temp should be above 0"),
        (small(), EncoderConfig("vit_medium_patch16_gap_256", 32, args={"depth": 1}), "compares class tokens"),
    ],
)
def test_wrong_recipes(config, encoder, sentence):
    with pytest.raises(UserError, match=sentence):
        DINO(config, encoder)


def test_crops_that_patches_do_not_fill():
    with pytest.raises(UserError, match="20 pixels is not a multiple of the patch size 8"):
        DINO(small(local_crops_size=20), ENCODER).views()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lightlys_loss_and_centre(golden, dtype):
    """lightly's DINOLoss gives the same numbers; it holds its temperatures in float32, in the float64 run too."""
    numbers = golden.load("lightly_dino_ibot_koleo", dtype)
    hyper, inputs = numbers.hyper("dino"), numbers.inputs("dino")
    temperatures = torch.linspace(hyper["warmup_teacher_temp"], hyper["teacher_temp"], 3)
    losses, centers, grads, center = [], [], [], torch.zeros(hyper["output_dim"])
    for e in range(3):
        keys = dict.fromkeys(("warmup_teacher_temp", "teacher_temp"), temperatures[e].item())
        dino = DINO(small(out_dim=hyper["output_dim"], center_momentum=hyper["center_momentum"], **keys), ENCODER)
        dino = dino.to(dtype)
        dino.center.copy_(center)
        student = inputs["student"][e].requires_grad_()
        loss, _ = dino.compare(student, inputs["teacher"][e], epoch(e))
        grads.append(torch.autograd.grad(loss, student)[0])
        dino.after_step()
        center = dino.center
        losses.append(loss.detach())
        centers.append(center.clone())
    numbers.check("dino", "loss", torch.stack(losses))
    numbers.check("dino", "center", torch.stack(centers))
    numbers.check("dino", "grad_student", torch.stack(grads))
