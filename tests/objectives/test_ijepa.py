"""I-JEPA against the paper's description, worked by hand, and what it promises the trainer."""

import pytest
import torch
import torch.nn.functional as F

from selfsight.errors import UserError
from selfsight.objectives import Progress
from selfsight.objectives.ijepa import IJEPA, IJEPAConfig, blocks, ijepa_loss
from selfsight.recipe import EncoderConfig

START = Progress(0, 1, 1)


def encoder(**args) -> EncoderConfig:
    tiny = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "class_token": False}
    return EncoderConfig("vit_tiny_patch16_224", img_size=64, args={**tiny, **args})


def small(**keys) -> IJEPAConfig:
    return IJEPAConfig(**{"pred_emb_dim": 16, "pred_depth": 2, "pred_num_heads": 2, "crop_size": 64, **keys})


def make_batch(n: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"crop": torch.randn(1, n, 3, 64, 64), "noise": torch.rand(n, 22)}


def test_blocks_by_hand():
    # A quarter of 4 × 4 patches, square: 2 × 2, at the first, the middle and the last of its three places along a side.
    u = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.99, 0.0]]])
    found = blocks(u, 4, [0.25, 0.25], [1.0, 1.0]).view(3, 4, 4).int()
    assert found[0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert found[1].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert found[2].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    # Half of them at height / width 2 would be 4 × 2; a block ends one short of the image's side.
    tall = blocks(torch.tensor([[[0.0, 1.0, 0.0, 0.0]]]), 4, [0.5, 0.5], [0.5, 2.0]).view(4, 4).int()
    assert tall.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]


def test_blocks_have_the_published_sizes():
    # 14 × 14 patches: areas int(0.15·196) = 29 to 39 at height / width 0.75 to 1.5, each side rounded:
    # heights √(29·0.75) = 4.7 → 5 to √(39·1.5) = 7.6 → 8, widths √(29/1.5) = 4.4 → 4 to √(39/0.75) = 7.2 → 7.
    torch.manual_seed(0)
    found = blocks(torch.rand(5000, 1, 4), 14, [0.15, 0.2], [0.75, 1.5]).view(5000, 14, 14)
    heights, widths = found.any(dim=2).sum(dim=1), found.any(dim=1).sum(dim=1)
    assert torch.equal(heights * widths, found.sum(dim=(1, 2)))  # rectangles
    assert (heights.min(), heights.max(), widths.min(), widths.max()) == (5, 8, 4, 7)
    assert found.any(dim=0).all()  # every patch can be in one, at the edges too


def test_masks_are_those_of_the_blocks():
    torch.manual_seed(0)
    jepa = IJEPA(IJEPAConfig(pred_depth=1), EncoderConfig(args={"depth": 1}))
    noise = torch.rand(500, 22)
    context, target, predicted = jepa.masks(noise)
    assert context.shape == (500, 49)  # a quarter of 196 patches
    u = noise[:, :16].view(500, 4, 4)
    targets = blocks(u, 14, [0.15, 0.2], [0.75, 1.5])
    shown = F.one_hot(context, 196).sum(dim=1)
    assert shown.max() == 1
    found = (F.one_hot(target, 196) * predicted.unsqueeze(-1)).sum(dim=2)  # (B, M, N)
    assert torch.equal(found, (targets & (shown == 0).unsqueeze(1)).long())
    assert not (found.any(dim=1) & (shown == 1)).any()
    # Targets that cover nearly everything are rare: elsewhere no target gives a patch to the context.
    assert (found.sum(dim=(1, 2)) == targets.sum(dim=(1, 2))).float().mean() > 0.99
    block = blocks(noise[:, 16:20].view(500, 1, 4), 14, [0.85, 1.0], [1.0, 1.0]).squeeze(1)
    assert ((shown == 1) <= block).all(dim=1).float().mean() > 0.95


def test_masks_are_functions_of_the_image_alone():
    jepa, noise = IJEPA(small(), encoder()), torch.rand(6, 22)
    together = jepa.masks(noise)
    alone = jepa.masks(noise[2:3])
    assert all(torch.equal(a[2:3], b) for a, b in zip(together, alone, strict=True))


def test_a_context_that_targets_leave_no_room_for_takes_their_patches():
    # 4 × 4 patches, four blocks of 4 in the corners: nothing is left, so the context takes four of their patches.
    jepa = IJEPA(
        small(target_scale=[0.25, 0.25], target_aspect=[1.0, 1.0], crop_size=32),
        EncoderConfig("vit_tiny_patch16_224", img_size=32, args=encoder().args),
    )
    corners = [[0.5, 0.5, y, x] for y in (0.0, 0.99) for x in (0.0, 0.99)]
    noise = torch.tensor([[v for block in corners for v in block] + [0.5] * 6])
    context, target, predicted = jepa.masks(noise)
    assert sorted(context[0].tolist()) == [5, 6, 9, 10]  # those nearest to the middle
    assert predicted.sum() == 12
    assert not set(target[predicted].tolist()) & set(context[0].tolist())


def test_predictions_depend_neither_on_padding_nor_on_other_blocks():
    torch.manual_seed(0)
    jepa, batch = IJEPA(small(), encoder()).double(), make_batch(3)
    context, target, predicted = jepa.masks(batch["noise"])
    assert not predicted.all()
    s_x = torch.randn(3, jepa.n_context, 24, dtype=torch.float64)
    pred = jepa.predict(s_x, context, target, predicted)
    other = torch.where(predicted, target, torch.randint_like(target, 64))
    torch.testing.assert_close(jepa.predict(s_x, context, other, predicted)[predicted], pred[predicted])
    one = jepa.predict(s_x, context, target[:, 1:2], predicted[:, 1:2])
    torch.testing.assert_close(one, pred[:, 1:2])


def test_loss_by_hand():
    # Smooth ℓ1: d²/2 below 1, |d| − 1/2 above. First block: one patch, d = 2 → 3/2. Second: d = 1/2 and 0 → 1/16.
    pred = torch.tensor([[[[2.0], [7.0]], [[0.5], [0.0]]]])
    predicted = torch.tensor([[[True, False], [True, True]]])
    assert ijepa_loss(pred, torch.zeros_like(pred), predicted).item() == pytest.approx((3 / 2 + 1 / 16) / 2)


def test_targets_are_the_teachers_normalised_tokens_of_the_whole_image():
    jepa, batch = IJEPA(small(), encoder()), make_batch(2)
    with torch.no_grad():
        for p in jepa.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
        loss = jepa(batch, START).loss
        images, (context, target, predicted) = batch["crop"][0], jepa.masks(batch["noise"])
        tokens = jepa.teacher(images).patches
        s_y = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        pred = jepa.predict(jepa.student(images, keep=context).patches, context, target, predicted)
        wanted = torch.stack([s_y[b][target[b]] for b in range(2)])
        torch.testing.assert_close(loss, ijepa_loss(pred, wanted, predicted))


def test_position_tables_are_fixed():
    jepa = IJEPA(small(), encoder(class_token=True))
    fixed = [n for n, p in jepa.named_parameters() if not p.requires_grad and not n.startswith("teacher")]
    assert fixed == ["student.vit.pos_embed"]
    assert not jepa.student.vit.pos_embed[:, 0].any()
    assert torch.equal(jepa.student.vit.pos_embed, jepa.teacher.vit.pos_embed)


def test_momentum_rises_in_a_line():
    jepa = IJEPA(small(), encoder())
    assert [jepa.teacher_momentum(Progress(i, 1, 4)) for i in range(4)] == pytest.approx([0.996, 0.997, 0.998, 0.999])


def test_loss_leaves_autocast():
    jepa = IJEPA(small(), encoder(class_token=True))
    with torch.autocast("cpu", torch.bfloat16):
        outcome = jepa(make_batch(2), START)
    assert outcome.loss.dtype == torch.float32
    outcome.loss.backward()


def test_views_are_the_published_ones():
    views = IJEPA(IJEPAConfig(pred_depth=1), EncoderConfig(args={"depth": 1})).views()
    (crop,), (noise,) = views.crops, views.noise
    assert (crop.count, crop.size, crop.scale, crop.flip, crop.jitter) == (1, 224, (0.3, 1.0), 0.0, 0.0)
    assert noise.length == 22


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"context_keep": 1.0}, "shows all or nothing"),
        ({"target_scale": [0.2, 0.1]}, "objective.target_scale should be two numbers"),
        ({"context_scale": [0.5, 1.5]}, "objective.context_scale is 1.5"),
        ({"crop_size": 32}, "crop_size=32 and encoder.img_size=64 differ"),
        ({"pred_num_heads": 3}, "of objective.pred_num_heads=3"),
        ({"num_targets": 0}, "objective.num_targets is 0"),
    ],
)
def test_wrong_recipes(keys, sentence):
    with pytest.raises(UserError, match=sentence):
        IJEPA(small(**keys), encoder())
