"""Crops of several sizes in one pass, of whose patches only those that are compared leave the last block: the loss and
the gradients of one full forward for each size."""

import pytest
import torch

from selfsight.encoders import Encoder

MULTI_CROP = ["dino", "dinov2", "dinov3", "distillation", "ibot", "lejepa", "mae", "msn", "simclr", "swav"]


@pytest.fixture
def separately(monkeypatch):
    """Makes every encoder run batch after batch, and all of each."""
    packed = Encoder.forward_list

    def one_by_one(self, images, *, keeps=None, masks=None, mask_token=None, prefix_norms=None, prefix_only=None):
        none = [None] * len(images)
        given = zip(images, keeps or none, masks or none, prefix_norms or none, strict=True)
        return [
            packed(self, [x], keeps=[keep], masks=[mask], mask_token=mask_token, prefix_norms=[norm])[0]
            for x, keep, mask, norm in given
        ]

    return lambda: monkeypatch.setattr(Encoder, "forward_list", one_by_one)


@pytest.mark.parametrize("name", MULTI_CROP)
def test_one_pass_is_several(harness, name, separately):
    objective = harness.small(name)
    batch = harness.make_exact(objective, 4)
    together = objective(batch, harness.START)
    together.loss.backward()
    gradients = harness.gradients(objective)
    objective.zero_grad()
    objective.discard_step()
    separately()
    apart = objective(batch, harness.START)
    apart.loss.backward()
    torch.testing.assert_close(together.loss, apart.loss, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(together.features, apart.features, atol=1e-12, rtol=1e-12)
    expected = harness.gradients(objective)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-11, rtol=1e-9)
