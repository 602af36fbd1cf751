"""data2vec 2.0 against the paper's description, worked by hand, and what it promises the trainer."""

import pytest
import torch

from selfsight.errors import UserError
from selfsight.objectives import Progress
from selfsight.objectives.data2vec2 import Data2Vec2, Data2Vec2Config, d2v_loss, d2v_targets, shown_patches
from selfsight.recipe import EncoderConfig

START = Progress(0, 1, 1)


def encoder(**args) -> EncoderConfig:
    tiny = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return EncoderConfig("vit_tiny_patch16_224", img_size=32, args={**tiny, **args})


def small(**keys) -> Data2Vec2Config:
    sizes = {"decoder_dim": 24, "decoder_groups": 4, "decoder_layers": 2, "average_top_k_layers": 2, "crop_size": 32}
    return Data2Vec2Config(**{**sizes, "clone_batch": 3, "mask_length": 2, **keys})


def make_batch(d2v: Data2Vec2, n: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    (noise,) = d2v.views().noise
    return {"crop": torch.randn(1, n, 3, 32, 32), "noise": torch.rand(n, noise.length)}


def test_shown_patches_by_hand():
    # 4 × 4 patches, one block of 3 × 3 around patch 5, the second of the second row: rows and columns 0 to 2.
    noise = torch.cat([torch.tensor([[5.5 / 16]]), torch.linspace(0.9, 0.1, 16).unsqueeze(0)], dim=1)
    block = {0, 1, 2, 4, 5, 6, 8, 9, 10}
    assert set(shown_patches(noise, 4, 1, 3, 9)[0].tolist()) == block
    # Too many: those of the least noise stay. Too few: those of the least noise elsewhere join.
    assert set(shown_patches(noise, 4, 1, 3, 4)[0].tolist()) == {6, 8, 9, 10}
    assert set(shown_patches(noise, 4, 1, 3, 11)[0].tolist()) == {*block, 14, 15}
    # At the image's edge a block is cut: of the one around patch 15 four patches are left.
    noise[0, 0] = 15.5 / 16
    assert set(shown_patches(noise, 4, 1, 3, 4)[0].tolist()) == {10, 11, 14, 15}


def test_counts_are_the_official_ones():
    d2v = Data2Vec2(Data2Vec2Config(decoder_layers=1), EncoderConfig("vit_base_patch16_224", args={"depth": 10}))
    assert d2v.n_blocks == 5  # int(196 · (0.2 + 0.07) / 3²)
    assert d2v.len_keep == 39  # int(196 · (1 − 0.8))


def test_targets_by_hand():
    # Two patches, two channels. Over the patches channel 0 is (1, 3) → (−1, 1), channel 1 (5, 1) → (1, −1); a second
    # layer (0, 1), (0, 3) → (−1, 1), (−1, 1). Means: patch 0 (−1, 0), patch 1 (1, 0); over channels: (−1, 1), (1, −1).
    first, second = torch.tensor([[[1.0, 5.0], [3.0, 1.0]]]), torch.tensor([[[0.0, 0.0], [1.0, 3.0]]])
    expected = torch.tensor([[[-1.0, 1.0], [1.0, -1.0]]])
    torch.testing.assert_close(d2v_targets([first, second]), expected, atol=1e-4, rtol=0)  # both norms add 1e-5


def test_loss_by_hand():
    # D = 4, errors of 2 in each channel of the one token that counts: 4 · 2² / √4 = 8.
    pred = torch.tensor([[[2.0, 2.0, 2.0, 2.0], [9.0, 9.0, 9.0, 9.0]]])
    assert d2v_loss(pred, torch.zeros_like(pred), torch.tensor([[1.0, 0.0]])).item() == pytest.approx(8.0)


def test_targets_are_the_feed_forward_outputs_of_the_teachers_last_blocks():
    d2v = Data2Vec2(small(), encoder(init_values=0.5))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features, outputs = d2v._teach(images)
        expected = []
        for block in d2v.teacher.vit.blocks[-2:]:
            block.mlp.register_forward_hook(lambda module, args, out: expected.append(out))
        torch.testing.assert_close(features, d2v.teacher(images).avg)
    assert len(outputs) == 2
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, 1:])


def test_versions_are_encoded_as_if_each_had_its_own_image():
    torch.manual_seed(0)
    d2v = Data2Vec2(small(), encoder())
    images = torch.randn(2, 3, 32, 32)
    keep = torch.rand(6, 16).argsort(dim=1)[:, :5]
    one_by_one = d2v.student(images.repeat_interleave(3, dim=0), keep=keep).sequence
    torch.testing.assert_close(d2v._encode(images, keep), one_by_one)


def test_hidden_pixels_never_reach_the_predictions():
    torch.manual_seed(0)
    d2v = Data2Vec2(small(clone_batch=1), encoder())
    images, keep = torch.randn(1, 3, 32, 32), torch.tensor([[0, 5, 10]])
    changed = torch.randn(1, 3, 32, 32)
    for patch in keep[0].tolist():
        y, x = 8 * (patch // 4), 8 * (patch % 4)
        changed[..., y : y + 8, x : x + 8] = images[..., y : y + 8, x : x + 8]
    assert torch.equal(*(d2v._decode(d2v._encode(pixels, keep)[:, 1:], keep) for pixels in (images, changed)))


def test_decoder_sees_tokens_at_their_places():
    # With one 1 × 1 layer that keeps the width, a hidden place holds what zeros give, and a shown one does not.
    torch.manual_seed(0)
    d2v = Data2Vec2(small(decoder_layers=1, decoder_kernel=1), encoder())
    out = d2v._decode(torch.randn(1, 2, 24), torch.tensor([[3, 8]]))[0]
    differs = (out - out[0]).abs().amax(dim=-1) > 1e-6
    assert differs.nonzero().flatten().tolist() == [3, 8]


def test_only_hidden_patches_count_and_each_version_meets_its_own_image():
    d2v = Data2Vec2(small(cls_weight=0.0), encoder())
    batch = make_batch(d2v, 2)
    with torch.no_grad():
        y = d2v_targets(d2v._teach(batch["crop"][0])[1])
        losses = []
        for b in range(2):
            for m in range(3):
                noise = batch["noise"][b].view(3, -1)[m : m + 1]
                keep = shown_patches(noise, 4, d2v.n_blocks, 2, d2v.len_keep)
                latent = d2v.student(batch["crop"][0][b : b + 1], keep=keep).patches
                hidden = torch.ones(16, dtype=torch.bool)
                hidden[keep[0]] = False
                error = (d2v._decode(latent, keep)[0] - y[b])[hidden]
                losses.append(error.square().sum(dim=-1).mean() / 24**0.5)
        torch.testing.assert_close(d2v(batch, START).loss, torch.stack(losses).mean())


def test_momentum_rises_in_a_line_to_its_end():
    d2v = Data2Vec2(small(ema_decay=0.9, ema_end_decay=1.0, ema_anneal_end_step=10), encoder())
    found = [d2v.teacher_momentum(Progress(step, 1, 1000)) for step in (0, 5, 10, 500)]
    assert found == pytest.approx([0.9, 0.95, 1.0, 1.0])


def test_loss_leaves_autocast_and_no_class_token_is_needed():
    for class_token in (True, False):
        d2v = Data2Vec2(small(), encoder(class_token=class_token))
        with torch.autocast("cpu", torch.bfloat16):
            outcome = d2v(make_batch(d2v, 2), START)
        assert outcome.loss.dtype == torch.float32
        assert ("cls" in outcome.metrics) is class_token
        outcome.loss.backward()


def test_views():
    views = Data2Vec2(
        Data2Vec2Config(decoder_layers=1), EncoderConfig("vit_base_patch16_224", args={"depth": 10})
    ).views()
    (crop,), (noise,) = views.crops, views.noise
    assert (crop.count, crop.size, crop.flip, crop.jitter) == (1, 224, 0.5, 0.0)
    assert noise.length == 16 * (5 + 196)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"average_top_k_layers": 4}, "objective.average_top_k_layers is 4: give 1 to 3"),
        ({"mask_prob": 1.0}, "hides all or nothing"),
        ({"decoder_groups": 5}, "decoder_groups=5 does not divide 24"),
        ({"decoder_kernel": 2}, "give an odd number"),
        ({"crop_size": 64}, "crop_size=64 and encoder.img_size=32 differ"),
    ],
)
def test_wrong_recipes(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        Data2Vec2(small(**keys), encoder())


def test_other_blocks_are_refused():
    with pytest.raises(UserError, match="plain blocks and vit_tiny_patch16_dinov3_qkvb has others"):
        Data2Vec2(small(), EncoderConfig("vit_tiny_patch16_dinov3_qkvb", img_size=32, args=encoder().args))
