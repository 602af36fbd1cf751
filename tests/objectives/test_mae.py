"""MAE against the official code's numbers, and what it promises the trainer."""

import pytest
import torch

from selfsight.errors import UserError
from selfsight.objectives import Progress
from selfsight.objectives.mae import MAE, MAEConfig, kept, patchify, random_masking
from selfsight.recipe import EncoderConfig

DTYPES = [torch.float32, torch.float64]
START = Progress(0, 1, 1)


def encoder(**args) -> EncoderConfig:
    tiny = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return EncoderConfig("vit_tiny_patch16_224", img_size=32, args={**tiny, **args})


def small(**keys) -> MAEConfig:
    return MAEConfig(**{"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 4, "crop_size": 32, **keys})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["ratio0.75_raw", "ratio0.75_norm", "ratio0.6_raw", "ratio0.6_norm"])
def test_model(golden, case, dtype):
    numbers = golden.load("mae_model", dtype)
    mae = MAE(small(**numbers.hyper(case)), encoder()).to(dtype)
    weights = numbers.weights("weights")
    mae.load_state_dict(golden.to_mae(weights), strict=True)
    assert golden.from_mae(mae.state_dict()).keys() == weights.keys()

    inputs = numbers.inputs(case)
    images, noise = inputs["images"], inputs["noise"]
    ids_keep, _, ids_restore = random_masking(noise, mae.len_keep)
    mask = torch.ones_like(noise).scatter(1, ids_keep, 0)
    latent = mae.student(images, keep=ids_keep).sequence
    numbers.check(case, "ids_keep", ids_keep)
    numbers.check(case, "ids_restore", ids_restore)
    numbers.check(case, "mask", mask.to(torch.int8))
    numbers.check(case, "latent", latent)
    every = torch.arange(mae.num_patches)
    numbers.check(case, "pred", mae.forward_decoder(latent, ids_restore, every.expand(len(latent), -1)))
    if "patchify" in numbers.outputs(case):
        numbers.check(case, "patchify", patchify(images, 8))

    outcome = mae({"crop": images[None], "noise": noise}, START)
    numbers.check(case, "loss", outcome.loss)
    assert outcome.features.shape == (len(images), 48)
    outcome.loss.backward()
    grads = golden.from_mae({n: p.grad for n, p in mae.named_parameters() if p.requires_grad})
    outputs = numbers.outputs(case)
    assert {f"gradnorm.{n}" for n in grads} == {n for n in outputs if n.startswith("gradnorm.")}
    for name, grad in grads.items():
        numbers.check(case, f"gradnorm.{name}", grad.norm())
        if f"grad.{name}" in outputs:
            numbers.check(case, f"grad.{name}", grad)


def test_kept_patches_are_truncated_as_in_the_official_code(golden):
    numbers = golden.load("mae_model")
    hyper = numbers.hyper("len_keep")
    ours = [[kept(int(length), float(ratio)) for ratio in hyper["mask_ratio"]] for length in hyper["L"]]
    numbers.check("len_keep", "len_keep", ours)


def test_position_tables_are_fixed_and_the_official_ones(golden):
    mae = MAE(small(), encoder())
    numbers = golden.load("mae_pos_embed")
    expected = torch.from_numpy(numbers.outputs("d48_g4")["pos_embed"]).float()
    assert torch.equal(mae.student.vit.pos_embed[0], expected)
    fixed = [n for n, p in mae.named_parameters() if not p.requires_grad]
    assert fixed == ["decoder_pos_embed", "student.vit.pos_embed"]


def test_initialisation_is_the_official_one():
    torch.manual_seed(0)
    mae = MAE(small(), encoder(embed_dim=192))
    patch = mae.student.vit.patch_embed.proj.weight
    bound = (6 / (192 + 3 * 8 * 8)) ** 0.5  # xavier_uniform of the convolution seen as a linear map
    assert patch.abs().max() <= bound
    assert patch.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert not mae.student.vit.blocks[0].attn.qkv.bias.any()
    assert 0.015 < mae.mask_token.std() < 0.025
    assert 0.015 < mae.student.vit.cls_token.std() < 0.025


def test_registers_pass_through_the_decoder():
    mae = MAE(small(), encoder(reg_tokens=2))
    outcome = mae({"crop": torch.randn(1, 3, 3, 32, 32), "noise": torch.rand(3, 16)}, START)
    outcome.loss.backward()
    assert mae.student.vit.reg_token.grad.abs().sum() > 0
    assert not mae.decoder_pos_embed[:, :3].any()


def test_hidden_pixels_never_reach_the_encoder_and_visible_ones_never_the_loss():
    mae = MAE(small(norm_pix_loss=False), encoder()).eval()
    images, noise = torch.randn(1, 2, 3, 32, 32), torch.rand(2, 16)
    ids_keep, _, ids_restore = random_masking(noise, mae.len_keep)
    mask = torch.ones(2, 16, dtype=torch.bool).scatter(1, ids_keep, False)
    hidden = mask.view(1, 2, 1, 4, 4).repeat_interleave(8, 3).repeat_interleave(8, 4)
    outcome = mae({"crop": images, "noise": noise}, START)
    changed = torch.where(hidden, torch.randn_like(images), images)
    assert torch.equal(mae({"crop": changed, "noise": noise}, START).features, outcome.features)
    latent = mae.student(images[0], keep=ids_keep).sequence
    pred = mae.forward_decoder(latent, ids_restore, torch.arange(16).expand(2, -1))
    error = (pred - patchify(images[0], 8)).square().mean(dim=-1)
    torch.testing.assert_close(outcome.loss, error[mask].mean())


def test_equal_noise_is_broken_by_place():
    keep, hidden, restore = random_masking(torch.zeros(1, 8), 3)
    assert keep.tolist() == [[0, 1, 2]]
    assert hidden.tolist() == [[3, 4, 5, 6, 7]]
    assert restore.tolist() == [list(range(8))]


def test_loss_leaves_autocast():
    mae = MAE(small(), encoder())
    with torch.autocast("cpu", torch.bfloat16):
        outcome = mae({"crop": torch.randn(1, 2, 3, 32, 32), "noise": torch.rand(2, 16)}, START)
    assert outcome.loss.dtype == torch.float32
    outcome.loss.backward()


def test_views():
    views = MAE(MAEConfig(decoder_depth=1), EncoderConfig(args={"depth": 1})).views()
    (crop,), (noise,) = views.crops, views.noise
    assert (crop.count, crop.size, crop.scale, crop.flip, crop.jitter, crop.blur) == (1, 224, (0.2, 1.0), 0.5, 0.0, ())
    assert (noise.name, noise.length) == ("noise", 14 * 14)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (small(crop_size=48), "crop_size=48 and encoder.img_size=32 differ"),
        (small(crop_size=36), "not a multiple of the patch size"),
        (small(mask_ratio=1.0), "keeps 0 of 16"),
        (small(mask_ratio=0.0), "keeps 16 of 16"),
        (small(decoder_embed_dim=30, decoder_num_heads=3), "multiple of 4"),
        (small(decoder_num_heads=5), "not a multiple of objective.decoder_num_heads"),
        (small(crop_scale=[0.2]), "objective.crop_scale should be two"),
    ],
)
def test_wrong_recipes(config, sentence):
    with pytest.raises(UserError, match=sentence):
        MAE(config, encoder())
