"""SimMIM against its equation, worked by hand, and what it promises the trainer."""

import pytest
import torch
from einops import rearrange

from selfsight.errors import UserError
from selfsight.objectives import Progress
from selfsight.objectives.simmim import SimMIM, SimMIMConfig, hidden_patches, patchify, simmim_loss
from selfsight.recipe import EncoderConfig

START = Progress(0, 1, 1)


def encoder(**args) -> EncoderConfig:
    tiny = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return EncoderConfig("vit_tiny_patch16_224", img_size=64, args={**tiny, **args})


def small(**keys) -> SimMIMConfig:
    return SimMIMConfig(**{"mask_patch_size": 16, "crop_size": 64, **keys})


def make_batch(n: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"crop": torch.randn(1, n, 3, 64, 64), "noise": torch.rand(n, 16)}


def test_squares_of_least_noise_are_hidden_whole():
    mask = hidden_patches(torch.tensor([[0.3, 0.1, 0.9, 0.2]]), 2, 2)
    assert mask.view(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize(("ratio", "hidden"), [(0.6, 30), (0.5, 25), (0.02, 1)])
def test_hidden_squares_are_rounded_up_as_in_the_official_code(ratio, hidden):
    simmim = SimMIM(SimMIMConfig(mask_ratio=ratio), EncoderConfig(args={"depth": 1}))
    assert simmim.squares == 49  # 224 / 32 squared
    assert simmim.n_hidden == hidden


def test_loss_by_hand():
    # Two hidden patches of three values with errors (1, 1, 1) and (0, 3, 0), one shown with any: 6 / 6 hidden values.
    target = torch.zeros(1, 3, 3)
    pred = torch.tensor([[[1.0, -1.0, 1.0], [9.0, 9.0, 9.0], [0.0, 3.0, 0.0]]])
    assert simmim_loss(pred, target, torch.tensor([[1.0, 0.0, 1.0]])).item() == pytest.approx(1.0)


def test_loss_is_the_papers_in_pixels():
    # Equation 1: the ℓ1 norm over the hidden pixels of all channels, divided by their number.
    simmim, batch = SimMIM(small(), encoder()), make_batch(3)
    images = batch["crop"][0]
    mask = hidden_patches(batch["noise"], simmim.n_hidden, simmim.scale)
    pred = torch.randn(3, 64, 192)
    pixels = rearrange(pred, "b (h w) (c p q) -> b c (h p) (w q)", h=8, p=8, q=8)
    hidden = mask.view(3, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
    expected = ((pixels - images).abs() * hidden).sum() / hidden.sum()
    torch.testing.assert_close(simmim_loss(pred, patchify(images, 8), mask), expected)


def test_the_mask_token_stands_at_the_place_of_a_hidden_patch():
    simmim, batch = SimMIM(small(), encoder()), make_batch(2)
    seen = []
    simmim.student.vit.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    simmim(batch, START)
    simmim.student(batch["crop"][0])
    masked, plain = (tokens[:, simmim.student.num_prefix :] for tokens in seen)
    hidden = hidden_patches(batch["noise"], simmim.n_hidden, simmim.scale).bool()
    positions = simmim.student.vit.pos_embed[:, simmim.student.num_prefix :]
    expected = (simmim.mask_token + positions).expand(2, -1, -1)
    torch.testing.assert_close(masked[hidden], expected[hidden])
    torch.testing.assert_close(masked[~hidden], plain[~hidden])  # and outside this objective's forward nothing is


def test_hidden_pixels_never_reach_the_encoder_and_visible_ones_never_the_loss():
    simmim, batch = SimMIM(small(), encoder()).eval(), make_batch(2)
    mask = hidden_patches(batch["noise"], simmim.n_hidden, simmim.scale)
    hidden = mask.bool().view(1, 2, 1, 8, 8).repeat_interleave(8, 3).repeat_interleave(8, 4)
    features = simmim(batch, START).features
    changed = torch.where(hidden, torch.randn_like(batch["crop"]), batch["crop"])
    assert torch.equal(simmim({**batch, "crop": changed}, START).features, features)
    pred, target = torch.randn(2, 64, 192), torch.randn(2, 64, 192)
    other = torch.where(mask.bool().unsqueeze(-1), target, torch.randn_like(target))
    assert torch.equal(simmim_loss(pred, target, mask), simmim_loss(pred, other, mask))


def test_loss_leaves_autocast_and_no_class_token_is_needed():
    simmim = SimMIM(small(), encoder(class_token=False))
    with torch.autocast("cpu", torch.bfloat16):
        outcome = simmim(make_batch(2), START)
    assert outcome.loss.dtype == torch.float32
    outcome.loss.backward()


def test_views_are_the_published_ones():
    views = SimMIM(SimMIMConfig(), EncoderConfig(args={"depth": 1})).views()
    (crop,), (noise,) = views.crops, views.noise
    assert (crop.count, crop.size, crop.scale, crop.flip, crop.jitter) == (1, 224, (0.67, 1.0), 0.5, 0.0)
    assert noise.length == 49


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"mask_patch_size": 12}, "mask_patch_size=12 should be a multiple of the patch size 8"),
        ({"mask_patch_size": 24}, "and divide objective.crop_size=64"),
        ({"mask_ratio": 0.0}, "hides nothing"),
        ({"crop_scale": [0.2]}, "objective.crop_scale should be two"),
    ],
)
def test_wrong_recipes(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        SimMIM(small(**keys), encoder())
