"""The shared losses against the numbers of DINOv2's code and of lightly's."""

import pytest
import torch

from selfsight.collective import Collective
from selfsight.losses import Center, ibot_loss, koleo, sinkhorn_knopp
from selfsight.losses.ibot import masked_rows

ALONE = Collective()


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.mark.parametrize(
    ("file", "case"),
    [
        ("dinov2_dino_loss", "sinkhorn_t0.07_i3"),
        ("dinov2_dino_loss", "sinkhorn_t0.04_i3"),
        ("dinov2_dino_loss", "sinkhorn_t0.07_i1"),
        ("dinov2_ibot_loss", "sinkhorn_i3"),
    ],
)
def test_sinkhorn(golden, file, case, dtype):
    numbers = golden.load(file, dtype)
    hyper, teacher = numbers.hyper(case), numbers.inputs(case)["teacher"]
    numbers.check(case, "probs", sinkhorn_knopp(teacher, hyper["temp"], ALONE, hyper["n_iterations"]))


@pytest.mark.parametrize("file", ["dinov2_dino_loss", "dinov2_ibot_loss"])
def test_centre(golden, file, dtype):
    """The official centre takes a batch in at the start of the next call, ours at the end of the step."""
    numbers = golden.load(file, dtype)
    hyper, teacher = numbers.hyper("softmax_center"), numbers.inputs("softmax_center")["teacher"]
    center = Center(teacher.shape[-1], hyper["center_momentum"]).to(dtype)
    probs, centers = [], []
    for i, logits in enumerate(teacher):
        centers.append(center.value.clone())
        probs.append(((logits - center.value) / (hyper["temps"][i] if "temps" in hyper else hyper["temp"])).softmax(-1))
        center.add(logits)
        center.commit(ALONE)
    numbers.check("softmax_center", "probs", torch.stack(probs))
    numbers.check("softmax_center", "center", torch.stack([*centers, center.value]))


@pytest.mark.parametrize("case", ["masked_auto_weight", "masked_given_weight", "masked_padded", "forward_full"])
def test_ibot_loss(golden, case, dtype):
    numbers = golden.load("dinov2_ibot_loss", dtype)
    inputs = numbers.inputs(case)
    student, mask = inputs["student"].requires_grad_(), inputs["masks"]
    at, weight = masked_rows(mask)
    if case == "forward_full":  # all patches came in, masked or not
        count = mask.sum(dim=1)
        weight = (1 / count.to(dtype)).repeat_interleave(count)  # not rounded to float32, in this one
        logits, q = student.flatten(0, 1)[at], inputs["teacher_probs"].flatten(0, 1)[at]
    else:  # the masked ones, and in one case padding after them
        logits, q = student[: len(at)], inputs["teacher_probs"][: len(at)]
    loss = ibot_loss(logits, q, inputs.get("masks_weight", weight), len(mask), numbers.hyper(case)["student_temp"])
    loss.backward()
    numbers.check(case, "loss", loss)
    numbers.check(case, "grad_student", student.grad)


@pytest.mark.parametrize("case", ["b8_d16", "b33_d24"])
def test_koleo(golden, case, dtype):
    numbers = golden.load("dinov2_koleo", dtype)
    x = numbers.inputs(case)["x"].requires_grad_()
    loss = koleo(x, ALONE)
    loss.backward()
    numbers.check(case, "loss", loss)
    numbers.check(case, "grad", x.grad)


def test_lightlys_koleo(golden, dtype):
    numbers = golden.load("lightly_dino_ibot_koleo", dtype)
    x = numbers.inputs("koleo")["x"].requires_grad_()
    loss = koleo(x, ALONE)
    loss.backward()
    numbers.check("koleo", "loss", loss)
    numbers.check("koleo", "grad_x", x.grad)


def test_lightlys_ibot(golden, dtype):
    numbers = golden.load("lightly_dino_ibot_koleo", dtype)
    hyper, inputs = numbers.hyper("ibot"), numbers.inputs("ibot")
    center = Center(hyper["output_dim"], hyper["center_momentum"]).to(dtype)
    _, weight = masked_rows(inputs["mask"].flatten(1))
    temp = torch.tensor(hyper["teacher_temp"]).item()  # lightly holds it in float32, in the float64 run too
    losses, centers, grads = [], [], []
    for teacher, student in zip(inputs["teacher"], inputs["student"].requires_grad_().unbind(), strict=True):
        q = ((teacher - center.value) / temp).softmax(-1)
        losses.append(ibot_loss(student, q, weight, len(inputs["mask"]), hyper["student_temp"]))
        grads.append(torch.autograd.grad(losses[-1], student)[0])
        center.add(teacher)
        center.commit(ALONE)
        centers.append(center.value.clone())
    numbers.check("ibot", "loss", torch.stack(losses))
    numbers.check("ibot", "center", torch.stack(centers))
    numbers.check("ibot", "grad_student", torch.stack(grads))
