"""LeJEPA against its equations, worked by hand, and what it promises the trainer."""

import math

import pytest
import torch

from selfsight.collective import Collective
from selfsight.errors import UserError
from selfsight.objectives import Progress
from selfsight.objectives.lejepa import LeJEPA, LeJEPAConfig, directions, prediction_loss, sigreg
from selfsight.recipe import EncoderConfig

ENCODER = EncoderConfig(
    "vit_tiny_patch16_224", img_size=32, args={"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
)
AXIS = torch.ones(1, 1, dtype=torch.float64)  # the one direction there is in one dimension


def small(**keys) -> LeJEPAConfig:
    sizes = {"out_dim": 8, "hidden_dim": 16, "num_slices": 32, "global_crops_size": 32, "local_crops_size": 16}
    return LeJEPAConfig(**{**sizes, "local_crops_number": 2, **keys})


def statistic(samples: torch.Tensor) -> float:
    """The Epps–Pulley statistic of samples (N,) in one dimension."""
    return sigreg(samples.double()[None, :, None], AXIS, Collective()).item()


# With ∫ e^(−a·t²) cos(b·t) dt = √(π/a)·e^(−b²/(4a)) over the whole line, the integral is elementary where the samples'
# characteristic function is. Cutting it at ±5 leaves out less than e^(−12.5), and 17 points of the trapezoid rule are
# exact to about as much on functions as smooth as these: hence 1e-5.


def test_statistic_of_a_collapsed_batch():
    # All samples 0: φ_N = 1, and ∫ (1 − e^(−t²/2))² e^(−t²/2) dt = √(2π)·(1 − √2 + 1/√3).
    expected = 10 * math.sqrt(2 * math.pi) * (1 - math.sqrt(2) + 1 / math.sqrt(3))
    assert statistic(torch.zeros(10)) == pytest.approx(expected, abs=1e-4)
    # All samples c: the same modulus against a real Gaussian, so the cross term alone changes, by e^(−c²/4).
    for c in (0.5, 2.0):
        cross = math.sqrt(2) * math.exp(-(c**2) / 4)
        expected = 10 * math.sqrt(2 * math.pi) * (1 - cross + 1 / math.sqrt(3))
        assert statistic(torch.full((10,), c)) == pytest.approx(expected, abs=1e-3)


def test_statistic_of_two_points():
    # Samples ±1: φ_N = cos t. ∫ cos² t e^(−t²/2) = √(2π)(1 + e^−2)/2, ∫ cos t e^(−t²) = √π e^(−1/4), ∫ e^(−3t²/2).
    integral = math.sqrt(2 * math.pi) * (1 + math.exp(-2)) / 2 - 2 * math.sqrt(math.pi) * math.exp(-0.25)
    integral += math.sqrt(2 * math.pi / 3)
    assert statistic(torch.tensor([1.0, -1.0, 1.0, -1.0])) == pytest.approx(4 * integral, abs=1e-4)


def test_statistic_of_gaussian_samples_is_that_of_the_null_hypothesis():
    # E|φ_N − φ|² = (1 − φ²)/N, so the statistic's mean is ∫ (1 − e^(−t²)) e^(−t²/2) dt = √(2π)(1 − 1/√3), whatever N.
    torch.manual_seed(0)
    z = torch.randn(2000, 50, 1, dtype=torch.float64)
    values = sigreg(z, AXIS, Collective())
    assert values.shape == (2000,)
    # their standard deviation is about their mean: four standard errors of 2000 draws are a tenth of it
    assert values.mean().item() == pytest.approx(math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3)), rel=0.1)
    assert sigreg(3 * z, AXIS, Collective()).mean() > 5 * values.mean()


def test_statistic_is_the_mean_over_directions():
    torch.manual_seed(0)
    z, a = torch.randn(3, 6, 4, dtype=torch.float64), directions(4, 5, step=3).double()
    each = [sigreg((z @ a[:, i : i + 1]), AXIS, Collective()) for i in range(5)]
    torch.testing.assert_close(sigreg(z, a, Collective()), torch.stack(each).mean(dim=0))


def test_directions_are_functions_of_the_step():
    state = torch.get_rng_state()
    a, again, other = directions(16, 7, step=5), directions(16, 7, step=5), directions(16, 7, step=6)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a, again)
    assert not torch.equal(a, other)
    torch.testing.assert_close(a.norm(dim=0), torch.ones(7))


def test_prediction_loss_by_hand():
    # One image in two dimensions, two global views (0, 0) and (2, 0) of mean (1, 0), one local view (1, 3):
    # squared distances 1, 1, 9 over 3 views × 2 dimensions.
    z = torch.tensor([[[0.0, 0.0]], [[2.0, 0.0]], [[1.0, 3.0]]])
    assert prediction_loss(z, 2).item() == pytest.approx(11 / 6)


def test_loss_weighs_the_two_by_lambda():
    torch.manual_seed(0)
    batch = {"global": torch.randn(2, 4, 3, 32, 32), "local": torch.randn(2, 4, 3, 16, 16)}
    for lambd in (0.0, 0.3, 1.0):
        torch.manual_seed(1)
        found = LeJEPA(small(lambd=lambd), ENCODER)(batch, Progress(0, 1, 1))
        expected = (1 - lambd) * found.metrics["prediction"] + lambd * found.metrics["sigreg"]
        torch.testing.assert_close(found.loss.detach(), expected)


def test_views_are_the_published_ones():
    large, local = LeJEPA(LeJEPAConfig(hidden_dim=8), EncoderConfig(args={"depth": 1})).views().crops
    assert (large.name, large.count, large.size, large.scale) == ("global", 2, 224, (0.3, 1.0))
    assert (local.name, local.count, local.size, local.scale) == ("local", 6, 96, (0.05, 0.3))
    assert (local.blur, local.solarize, local.jitter, local.hue) == ((0.5,) * 6, (0.2,) * 6, 0.8, 0.1)


def test_loss_leaves_autocast_and_patches_stand_in_for_a_class_token():
    lejepa = LeJEPA(
        small(local_crops_number=0), EncoderConfig(ENCODER.name, 32, args={**ENCODER.args, "class_token": False})
    )
    with torch.autocast("cpu", torch.bfloat16):
        outcome = lejepa({"global": torch.randn(2, 4, 3, 32, 32)}, Progress(0, 1, 1))
    assert outcome.loss.dtype == torch.float32
    outcome.loss.backward()


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"lambd": 1.5}, "objective.lambd is 1.5"),
        ({"knots": 8}, "give an odd number"),
        ({"local_crops_scale": [0.1]}, "objective.local_crops_scale should be two"),
        ({"t_max": 0.0}, "objective.t_max should be above 0"),
    ],
)
def test_wrong_recipes(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        LeJEPA(small(**keys), ENCODER)
