"""MSN and PMSN against lightly's numbers, and what they promise the trainer."""

import math

import pytest
import torch

from selfsight.collective import Collective
from selfsight.errors import UserError
from selfsight.objectives import Progress
from selfsight.objectives import msn as module
from selfsight.objectives.msn import MSN, MSNConfig, balance_loss, power_law, targets
from selfsight.recipe import EncoderConfig

DTYPES = [torch.float32, torch.float64]
PRIORS = {"msn": None, "msn_nosink": None, "pmsn": 0.25, "pmsn_uniform": 0.0}
ENCODER = EncoderConfig(
    "vit_tiny_patch16_224", img_size=32, args={"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
)


def small(**keys) -> MSNConfig:
    sizes = {"num_proto": 10, "output_dim": 8, "hidden_dim": 16, "rand_size": 32, "focal_size": 16, "focal_views": 2}
    return MSNConfig(**{**sizes, **keys})


def make_batch(n: int) -> dict[str, torch.Tensor]:
    crops = {"random": torch.randn(2, n, 3, 32, 32), "focal": torch.randn(2, n, 3, 16, 16)}
    return {**crops, "mask": torch.rand(n, 16)}


def lightlys_power_law(k: int, exponent: float) -> torch.Tensor:
    """In float32, whatever the rest is in."""
    weights = torch.arange(1, k + 1) ** -exponent
    return weights / weights.sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PRIORS)
def test_loss(golden, case, dtype, monkeypatch):
    if case == "pmsn":
        torch.testing.assert_close(power_law(11, 0.25).float(), lightlys_power_law(11, 0.25), atol=0, rtol=1e-6)
        monkeypatch.setattr(module, "power_law", lightlys_power_law)
    numbers = golden.load("lightly_msn", dtype)
    hyper, inputs = numbers.hyper(case), numbers.inputs(case)
    assert hyper.get("power_law_exponent", 0.25) == 0.25
    config = small(
        num_proto=11,
        temperature=hyper["temperature"],
        sharpen=hyper["target_sharpen_temperature"],
        sinkhorn_iterations=hyper["sinkhorn_iterations"],
        memax_weight=hyper["regularization_weight"],
        prior_exponent=PRIORS[case],
    )
    msn = MSN(config, ENCODER).to(dtype)
    msn.load_state_dict({"prototypes": inputs["prototypes"]}, strict=False)
    anchors = inputs["anchors"].requires_grad_()
    loss, metrics = msn.compare(anchors.unflatten(0, (hyper["views"], -1)), inputs["targets"])
    loss.backward()
    torch.testing.assert_close(metrics["match"] + config.memax_weight * metrics["balance"], loss.detach())
    if case == "pmsn":  # so does it take the law's own entropy, which no gradient sees
        t = lightlys_power_law(11, 0.25)
        loss = loss + config.memax_weight * (torch.xlogy(t, t).to(dtype) - torch.xlogy(t.to(dtype), t.to(dtype))).sum()
    numbers.check(case, "loss", loss)
    numbers.check(case, "grad_anchors", anchors.grad)
    numbers.check(case, "grad_prototypes", msn.prototypes.grad)


def test_me_max_by_hand():
    # Two samples on two of four prototypes: p̄ = (1/2, 1/2, 0, 0), so ln 4 − H = ln 2. All four alike: 0.
    p = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]])
    assert balance_loss(p, None, Collective()).item() == pytest.approx(math.log(2))
    assert balance_loss(torch.full((2, 3, 4), 0.25), None, Collective()).item() == pytest.approx(0.0, abs=1e-6)


def test_targets_are_sharpened():
    # p = (1/3, 2/3) at τ = 1 and T = 1/2: p² ∝ (1, 4).
    scores = torch.tensor([[0.0, math.log(2)]])
    torch.testing.assert_close(targets(scores, 1.0, 0.5, 0, Collective()), torch.tensor([[0.2, 0.8]]))


def test_power_law():
    assert power_law(3, 1.0).tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11])


def test_dropped_patches_are_not_seen():
    msn, batch = MSN(small(focal_views=0, patch_drop=0.5), ENCODER).eval(), make_batch(3)
    del batch["focal"]
    loss = msn(batch, Progress(0, 1, 1)).loss
    dropped = batch["mask"].argsort(dim=1).argsort(dim=1) >= 8
    pixels = dropped.view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    batch["random"][1] = torch.where(pixels, torch.randn(3, 3, 32, 32), batch["random"][1])
    assert torch.equal(msn(batch, Progress(0, 1, 1)).loss, loss)
    batch["random"][1] += 1
    assert not torch.equal(msn(batch, Progress(0, 1, 1)).loss, loss)


def test_teacher_starts_as_the_student_and_its_momentum_rises_in_a_line():
    msn = MSN(small(), ENCODER)
    for student, teacher in msn.teacher_pairs():
        pairs = zip(student.state_dict().items(), teacher.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
        assert not any(p.requires_grad for p in teacher.parameters())
    assert [msn.teacher_momentum(Progress(i, 1, 4)) for i in range(4)] == pytest.approx([0.996, 0.997, 0.998, 0.999])


@torch.no_grad()
def test_collapse_with_a_power_law():
    msn = MSN(small(prior_exponent=0.25), ENCODER)
    for p in msn.parameters():
        p.zero_()
    assert msn(make_batch(3), Progress(0, 1, 1)).loss.item() == pytest.approx(msn.collapse_values()["loss"], rel=1e-5)
    assert msn.collapse_values()["loss"] > math.log(10)


def test_views_are_the_published_ones():
    views = MSN(MSNConfig(hidden_dim=8), EncoderConfig(args={"depth": 1})).views()
    large, focal = views.crops
    (noise,) = views.noise
    assert (large.name, large.count, large.size, large.scale) == ("random", 2, 224, (0.3, 1.0))
    assert (focal.name, focal.count, focal.size, focal.scale) == ("focal", 10, 96, (0.05, 0.3))
    assert (noise.name, noise.length) == ("mask", 196)


def test_loss_leaves_autocast():
    msn = MSN(small(), ENCODER)
    with torch.autocast("cpu", torch.bfloat16):
        outcome = msn(make_batch(4), Progress(0, 1, 1))
    assert outcome.loss.dtype == torch.float32
    outcome.loss.backward()


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"sharpen": 0.0}, "objective.sharpen should be above 0"),
        ({"patch_drop": 1.0}, "leaves no patch"),
        ({"rand_views": 0}, "objective.rand_views is 0"),
        ({"focal_scale": [0.1]}, "objective.focal_scale should be two"),
    ],
)
def test_wrong_recipes(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        MSN(small(**keys), ENCODER)
