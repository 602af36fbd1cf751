"""The encoder against timm itself, masks that really drop tokens, and what a wrong recipe is told."""

import copy

import pytest
import timm
import torch

from selfsight import encoders
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig

TINY = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def tiny(**args) -> EncoderConfig:
    return EncoderConfig("vit_tiny_patch16_224", img_size=32, args={**TINY, **args})


FAMILY = {
    "vit_tiny": EncoderConfig("vit_tiny_patch16_224", img_size=64, args={"depth": 3}),
    "vit_small_reg4_dinov2": EncoderConfig("vit_small_patch14_reg4_dinov2", img_size=56, args={"depth": 3}),
    "clip (pre-norm, no patch bias)": EncoderConfig("vit_base_patch16_clip_224", img_size=64, args={"depth": 2}),
    "gap (no class token)": EncoderConfig("vit_medium_patch16_gap_256", img_size=64, args={"depth": 2}),
    "siglip (map pooling)": EncoderConfig("vit_base_patch16_siglip_256", img_size=64, args={"depth": 2}),
    "deit3 (no embed class)": EncoderConfig("deit3_small_patch16_224", img_size=64, args={"depth": 2}),
    "no position table": tiny(pos_embed="none"),
    "registers with positions": tiny(reg_tokens=3),
    "qk norm": tiny(qk_norm=True),
}


def timms(encoder: encoders.Encoder, config: EncoderConfig):
    model = timm.create_model(
        config.name, num_classes=0, global_pool=encoder.vit.global_pool, **encoders.model_args(config)
    )
    model.load_state_dict(encoder.vit.state_dict(), strict=True)
    return model.eval()


@pytest.mark.parametrize("config", FAMILY.values(), ids=FAMILY.keys())
@pytest.mark.parametrize("how", ["dino", "timm"])
@torch.no_grad()
def test_equals_timm_at_its_own_size(config, how):
    encoder = encoders.build(config, pos_interpolation=how).eval()
    for p in encoder.parameters():  # tokens that start at almost zero would hide an error
        p.add_(torch.randn_like(p) * 0.05)
    model = timms(encoder, config)
    images = torch.randn(2, 3, config.img_size, config.img_size)
    tokens = encoder(images)
    features = model.forward_features(images)
    assert torch.equal(tokens.sequence, features)
    assert (tokens.cls is not None) == model.has_class_token
    assert tokens.registers.shape == (2, model.num_reg_tokens, encoder.embed_dim)
    assert tokens.patches.shape[1] == encoder.grid(config.img_size) ** 2
    assert torch.equal(tokens.avg, features[:, model.num_prefix_tokens :].mean(dim=1))


@pytest.mark.parametrize("size", [(48, 48), (32, 80), (112, 16)])
@pytest.mark.parametrize("name", ["vit_tiny", "clip (pre-norm, no patch bias)", "deit3 (no embed class)"])
@torch.no_grad()
def test_equals_timm_at_other_sizes(name, size):
    config = FAMILY[name]
    encoder = encoders.build(config).eval()
    images = torch.randn(2, 3, *size)
    tokens = encoder(images)
    assert tokens.grid == (size[0] // 16, size[1] // 16)
    torch.testing.assert_close(tokens.sequence, timms(encoder, config).forward_features(images), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_intermediate_layers_and_attention_equal_timm():
    config = tiny(reg_tokens=2, depth=4, qk_norm=True)
    encoder = encoders.build(config).eval()
    model = timms(encoder, config)
    images = torch.randn(2, 3, 32, 32)
    for norm in (True, False):
        ours = encoder.intermediate(images, n=3, norm=norm)
        theirs = model.get_intermediate_layers(images, n=3, return_prefix_tokens=True, norm=norm)
        for a, (patches, prefix) in zip(ours, theirs, strict=True):
            assert torch.equal(a.sequence, torch.cat([prefix, patches], dim=1))
    assert torch.equal(encoder.intermediate(images)[-1].sequence, encoder(images).sequence)
    for block in model.blocks:
        block.attn.fused_attn = False
    seen = []
    model.blocks[-1].attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out))
    model(images)
    attention = encoder.last_attention(images)
    torch.testing.assert_close(attention, seen[0])
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 19))


@torch.no_grad()
def test_keep_drops_patches_before_the_blocks():
    encoder = encoders.build(tiny(reg_tokens=2)).eval()
    images = torch.randn(2, 3, 32, 32)
    keep = torch.stack([torch.randperm(16)[:5] for _ in range(2)])
    lengths = []
    encoder.vit.blocks[0].register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    tokens = encoder(images, keep=keep)
    assert lengths == [3 + 5]
    assert tokens.grid is None
    assert tokens.patches.shape == (2, 5, 48)
    # What was dropped cannot matter: other pixels there, the same answer.
    other = torch.randn_like(images)
    kept = torch.zeros(2, 16, dtype=torch.bool).scatter(1, keep, True)
    pixels = kept.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(encoder(torch.where(pixels, images, other), keep=keep).sequence, tokens.sequence)
    # And keeping everything in order is no mask at all.
    everything = torch.arange(16).expand(2, -1)
    assert torch.equal(encoder(images, keep=everything).sequence, encoder(images).sequence)


def test_table_of_another_size_learns():
    encoder = encoders.build(tiny(), pos_interpolation="dino")
    with torch.inference_mode():
        encoder(torch.randn(1, 3, 16, 16))  # the matrix made here is used in training below
    encoder(torch.randn(1, 3, 16, 16)).avg.square().mean().backward()
    assert encoder.vit.pos_embed.grad.abs().sum() > 0
    copied = copy.deepcopy(encoder)
    assert list(copied.state_dict()) == list(encoder.state_dict())


def test_autocast_keeps_positions_in_full_precision():
    encoder = encoders.build(tiny())
    with torch.autocast("cpu", torch.bfloat16):
        table = encoder.position_table((3, 5))
    assert table.dtype == torch.float32
    assert torch.equal(table, encoder.position_table((3, 5)))


def test_drop_path_is_the_students_alone():
    config = EncoderConfig("vit_tiny_patch16_224", img_size=32, drop_path_rate=0.5, args=TINY)
    student, teacher = encoders.build(config), encoders.build(config, drop_path=False)
    teacher.load_state_dict(student.state_dict())
    images = torch.randn(16, 3, 32, 32)
    assert torch.equal(teacher(images).cls, teacher(images).cls)  # in training mode, too
    assert not torch.equal(student(images).cls, student(images).cls)


def test_state_dict_is_timms_under_vit():
    encoder = encoders.build(tiny(reg_tokens=1))
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, reg_tokens=1, **TINY)
    assert [k.removeprefix("vit.") for k in encoder.state_dict()] == list(model.state_dict())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (EncoderConfig("vit_smal_patch16_224"), "did you mean vit_small_patch16_224?"),
        (EncoderConfig("resnet50"), "not a plain Vision Transformer"),
        (EncoderConfig("local-dir:/nowhere"), "timm has no model called"),
        (EncoderConfig("deit_tiny_distilled_patch16_224"), "cannot build deit_tiny_distilled_patch16_224"),
        (tiny(num_head=4), "did you mean encoder.args.num_heads?"),
        (tiny(num_classes=10), "an encoder has no classifier"),
        (tiny(img_size=64), "use encoder.img_size"),
        (tiny(num_heads=5), "cannot build"),
        (tiny(depth="two"), "cannot build"),
        (EncoderConfig("vit_tiny_patch16_224", img_size=100), "use 96"),
    ],
)
def test_what_a_wrong_recipe_is_told(config, sentence):
    with pytest.raises(UserError) as caught:
        encoders.build(config)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_that_patches_do_not_fill():
    encoder = encoders.build(tiny())
    with pytest.raises(UserError, match="36×32 pixels cannot be cut into patches of 8"):
        encoder(torch.randn(1, 3, 36, 32))
    with pytest.raises(UserError, match="not a multiple of the patch size 8: use 32"):
        encoder.grid(36)
    with pytest.raises(UserError, match="2 blocks"):
        encoder.intermediate(torch.randn(1, 3, 32, 32), n=3)
