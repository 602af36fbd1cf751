"""What all methods that compare two crops of an image have in common."""

import pytest
import torch

from selfsight.errors import UserError
from selfsight.objectives import find
from selfsight.objectives.base import PairConfig, pair_features
from selfsight.recipe import EncoderConfig

NAMES = ["barlow_twins", "byol", "moco_v3", "simclr", "vicreg"]


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def build(harness, name: str, **keys):
    """The harness's small objective with other `keys`."""
    cls = find(name)
    sizes = {k: v for k, v in harness.SMALL.items() if k in cls.Config.__dataclass_fields__}
    return cls(cls.Config(**{**sizes, **keys}), harness.ENCODER)


def test_the_order_of_the_crops_does_not_matter(harness, name):
    objective = harness.small(name)
    batch = harness.make_exact(objective, 5)
    loss = objective(batch, harness.START).loss
    torch.testing.assert_close(objective({"pair": batch["pair"].flip(0)}, harness.START).loss, loss)


def test_nor_does_that_of_the_images(harness, name):
    objective = harness.small(name)
    batch = harness.make_exact(objective, 5)
    loss = objective(batch, harness.START).loss
    torch.testing.assert_close(objective({"pair": batch["pair"][:, [3, 1, 4, 0, 2]]}, harness.START).loss, loss)


def test_the_final_bias_that_the_head_takes_off_again_stays_where_it_was(harness, name):
    objective = harness.small(name)
    bias = objective.student.vit.norm.bias
    with torch.no_grad():
        bias.uniform_()
    before = bias.clone()
    harness.train(objective, range(2))
    assert torch.equal(bias, before)


def test_the_loss_leaves_autocast(harness, name):
    objective = harness.small(name)
    batch = harness.make_batch(objective, 4)
    with torch.autocast("cpu", torch.bfloat16):
        outcome = objective(batch, harness.START)
    assert outcome.loss.dtype == torch.float32
    outcome.loss.backward()
    assert all(g.isfinite().all() for g in harness.gradients(objective).values())


def test_features_are_the_class_token_or_the_mean_patch(harness):
    torch.manual_seed(0)
    simclr = harness.small("simclr")
    pair = torch.randn(2, 3, 3, 32, 32)
    torch.testing.assert_close(pair_features(simclr.student, pair)[1], simclr.student(pair[1]).cls)
    without = EncoderConfig(harness.ENCODER.name, 32, args={**harness.ENCODER.args, "class_token": False})
    headless = find("simclr")(simclr.config, without)
    torch.testing.assert_close(pair_features(headless.student, pair)[1], headless.student(pair[1]).avg)
    assert headless({"pair": pair}, harness.START).features.shape == (3, 24)


def test_teachers_start_as_their_students_and_stand_outside_the_graph(harness, name):
    torch.manual_seed(0)
    objective = harness.small(name)
    for student, teacher in objective.teacher_pairs():
        for (a, x), (b, y) in zip(student.state_dict().items(), teacher.state_dict().items(), strict=True):
            assert a == b
            assert torch.equal(x, y)
        assert not any(p.requires_grad for p in teacher.parameters())
    assert len(objective.teacher_pairs()) == (2 if name in ("byol", "moco_v3") else 0)  # the predictor has none


@pytest.mark.parametrize("name", ["byol", "simclr"])
def test_the_patch_projection_can_be_frozen(harness, name):
    def frozen(**keys):
        return {n for n, p in build(harness, name, **keys).student.named_parameters() if not p.requires_grad}

    patches = {"vit.patch_embed.proj.weight", "vit.patch_embed.proj.bias"}
    assert frozen(freeze_patch_embed=True) - frozen() == patches


@pytest.mark.parametrize("name", [name for name in NAMES if name != "simclr"])
def test_views_are_byols(harness, name):
    (crop,) = build(harness, name, crop_size=64).views().crops
    assert (crop.name, crop.count, crop.size, crop.scale) == ("pair", 2, 64, (0.08, 1.0))
    assert (crop.brightness, crop.contrast, crop.saturation, crop.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (crop.blur, crop.solarize) == ((1.0, 0.1), (0.0, 0.2))


def test_simclrs_views_are_its_own(harness):
    (crop,) = harness.small("simclr").views().crops
    assert (crop.brightness, crop.contrast, crop.saturation, crop.hue) == (0.8, 0.8, 0.8, 0.2)
    assert (crop.blur, crop.solarize, crop.grayscale) == ((0.5, 0.5), (0.0, 0.0), 0.2)


def test_a_crop_that_the_patch_does_not_divide_is_refused(harness, name):
    with pytest.raises(UserError, match="not a multiple of the patch size"):
        build(harness, name, crop_size=36).views()


@pytest.mark.parametrize("key", ["crop_scale", "blur", "solarize"])
def test_pairs_need_two_numbers(key):
    with pytest.raises(UserError, match=f"objective.{key} should be two numbers"):
        PairConfig(**{key: [0.5]}).views()


@pytest.mark.parametrize(
    ("name", "key", "value", "sentence"),
    [
        ("simclr", "temperature", 0.0, "temperature should be above 0"),
        ("simclr", "projection_layers", 0, "objective.projection_layers is 0"),
        ("moco_v3", "temperature", -1.0, "temperature should be above 0"),
        ("moco_v3", "momentum_teacher", 1.5, "objective.momentum_teacher is 1.5"),
        ("byol", "momentum_teacher", -0.1, "objective.momentum_teacher is -0.1"),
        ("byol", "out_dim", 0, "objective.out_dim is 0"),
        ("vicreg", "variance_weight", -1.0, "objective.variance_weight is -1.0"),
        ("vicreg", "expander_layers", 0, "objective.expander_layers is 0"),
        ("barlow_twins", "redundancy_weight", -1.0, "objective.redundancy_weight is -1.0"),
    ],
)
def test_wrong_recipes(harness, name, key, value, sentence):
    with pytest.raises(UserError, match=sentence):
        build(harness, name, **{key: value})
