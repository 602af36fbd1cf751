"""Each family of timm's architectures: ours load in timm, timm's load in ours, and both say the same."""

from itertools import chain

import pytest
import timm
import torch

from selfsight import encoders
from selfsight.encoders.initialise import initialise
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig

SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 4}
FAMILIES = {
    "plain": EncoderConfig("vit_small_patch16_224", 64, args=SMALL),
    "registers": EncoderConfig("vit_small_patch14_reg4_dinov2", 56, args=SMALL),
    "LayerScale": EncoderConfig("vit_small_patch16_224", 64, args={**SMALL, "init_values": 0.1}),
    "SwiGLU": EncoderConfig("vit_giant_patch14_reg4_dinov2", 56, args={**SMALL, "mlp_ratio": 3}),
    "DINOv3": EncoderConfig("vit_small_patch16_dinov3", 64, args=SMALL),
    "DINOv3 with biases": EncoderConfig("vit_small_patch16_dinov3_qkvb", 64, args=SMALL),
    "DINOv3 with SwiGLU": EncoderConfig("vit_small_plus_patch16_dinov3", 64, args=SMALL),
    "EVA-02": EncoderConfig("eva02_small_patch14_224", 56, args=SMALL),
    "EVA": EncoderConfig("eva_large_patch14_196", 56, args=SMALL),
    "RoPE of 2024": EncoderConfig("vit_small_patch16_rope_224", 64, args=SMALL),
}
PARTS = {"DINOv3 with SwiGLU": "mlp.fc1_g", "LayerScale": "ls1.gamma", "registers": "reg_token", "DINOv3": "gamma_1"}


def of_timm(config: EncoderConfig):
    return timm.create_model(config.name, **{"global_pool": "token", **encoders.model_args(config)}, num_classes=0)


def shaken(module):
    """Values that hide nothing: tokens and LayerScale start at almost zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return module.eval()


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
@torch.no_grad()
def test_weights_go_both_ways(config):
    ours, theirs = shaken(encoders.build(config)), of_timm(config).eval()
    theirs.load_state_dict(ours.vit.state_dict(), strict=True)
    for size in (config.img_size, config.img_size * 2):
        images = torch.randn(2, 3, size, config.img_size)
        expected = theirs.forward_features(images)
        torch.testing.assert_close(ours(images).sequence, expected, atol=2e-5, rtol=1e-5)
    shaken(theirs)
    ours.vit.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(images).sequence, theirs.forward_features(images), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours(images).cls, theirs(images), atol=2e-5, rtol=1e-5)
    assert list(ours.state_dict()) == [f"vit.{name}" for name in theirs.state_dict()]


@pytest.mark.parametrize(("family", "part"), PARTS.items())
def test_the_families_are_what_they_are_called(family, part):
    assert any(part in name for name in encoders.build(FAMILIES[family], device="meta").state_dict())


@pytest.mark.parametrize("family", ["DINOv3", "EVA-02"])
@torch.no_grad()
def test_masked_patches_keep_their_angles(family):
    encoder = shaken(encoders.build(FAMILIES[family]))
    images = torch.randn(2, 3, 56 if family == "EVA-02" else 64, 112 if family == "EVA-02" else 128)
    whole = encoder(images)
    everything = torch.stack([torch.randperm(whole.patches.shape[1]) for _ in range(2)])
    shuffled = encoder(images, keep=everything)  # attention is blind to order; only angles and tables tell places
    index = everything.unsqueeze(-1).expand(-1, -1, encoder.embed_dim)
    torch.testing.assert_close(shuffled.patches, whole.patches.gather(1, index), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_attention_maps_are_rotated():
    encoder = shaken(encoders.build(FAMILIES["DINOv3"]))
    images, last = torch.randn(2, 3, 64, 64), encoder.vit.blocks[-1]
    last.attn.fused_attn = False
    seen = []
    last.attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out))
    encoder.vit.forward_features(images)
    torch.testing.assert_close(encoder.last_attention(images), seen[0], atol=1e-6, rtol=1e-5)


def test_rope_is_augmented_for_the_student_alone_and_for_each_block_anew():
    args = {**SMALL, "init_values": 0.5, "rope_jitter_coords": 1.5, "rope_rescale_coords": 2.0}
    config = EncoderConfig("vit_small_patch16_dinov3", 64, args=args)
    student, teacher = encoders.build(config), encoders.build(config, drop_path=False)
    teacher.load_state_dict(student.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(teacher(images).cls, teacher(images).cls)  # in training mode, too
    assert not torch.equal(student(images).cls, student(images).cls)
    assert torch.equal(student.eval()(images).cls, teacher(images).cls)
    tables = []
    student.train()
    student._steps[False] = lambda block, x, layout, drops, asked: tables.append(layout.groups[0].rope) or x
    student(images)
    assert len(tables) == 3
    assert not torch.equal(tables[0], tables[1])


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
def test_meta_construction_leaves_nothing_undone(config):
    encoder = encoders.build(config, device="meta")
    assert all(t.is_meta for t in chain(encoder.parameters(), encoder.vit.buffers()))
    initialise(encoder.vit, "cpu")
    theirs = dict(chain(of_timm(config).named_parameters(), of_timm(config).named_buffers()))
    for name, tensor in chain(encoder.vit.named_parameters(), encoder.vit.named_buffers()):
        assert tensor.isfinite().all(), name
        if tensor.numel() > 1000:  # drawn: the same distribution
            assert tensor.std().item() == pytest.approx(theirs[name].std().item(), rel=0.15, abs=1e-8), name
        elif not theirs[name].std() > 0:  # a constant: the same one
            assert torch.equal(tensor, theirs[name]), name
    assert encoder(torch.randn(1, 3, config.img_size, config.img_size)).sequence.isfinite().all()


def test_a_forgotten_initialiser_is_loud(monkeypatch):
    encoder = encoders.build(FAMILIES["LayerScale"], device="meta")
    monkeypatch.setattr(type(encoder.vit.blocks[0].ls1), "reset_parameters", lambda self: None)
    with pytest.raises(RuntimeError, match=r"everything but blocks\.0\.ls1\.gamma"):
        initialise(encoder.vit, "cpu")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (EncoderConfig("vit_small_patch16_rope_mixed_224", 64), "rotary positions of its own kind"),
        (
            EncoderConfig("vit_small_patch16_dinov3", 64, args={"reg_tokens": 2}),
            "did you mean encoder.args.num_reg_tokens",
        ),
        (EncoderConfig("vit_small_patch16_dinov3", 64, args={"use_fc_norm": True}), "applied to every token"),
        (EncoderConfig("vit_small_patch16_dinov3", 64, args={"rope_jitter_coords": 0.5}), "cannot build"),
        (EncoderConfig("vit_small_patch16_dinov", 64), "did you mean vit_small_patch16_dinov3?"),
    ],
)
def test_what_a_wrong_recipe_is_told(config, sentence):
    with pytest.raises(UserError) as caught:
        encoders.build(config)
    assert sentence in str(caught.value)
