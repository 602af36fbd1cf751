"""Block masks against the official generator's, number by number.

The official code draws from python's `random`, as many numbers as it happens to need; `MaskRecorder` in golden.py turns
its stream into the numbers that `block_masks` takes.
"""

import numpy as np
import pytest
import torch

from selfsight.masks import NUMBERS, TRIES, block_masks


@pytest.fixture
def recorder(golden):
    """Of a case's hyper-parameters, a recorder at the start of its stream."""

    def start(hyper: dict):
        size = hyper["input_size"]
        grid = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        max_area = hyper.get("max_num_patches", hyper.get("num_masking_patches"))
        return golden.MaskRecorder(hyper["random_seed"], grid, max_area)

    return start


def masks_of(recorded) -> torch.Tensor:
    """All at once, from the numbers that were recorded."""
    asked = torch.tensor(recorded.asked)
    return block_masks(recorded.noise(), asked, recorded.grid, min_area=4, max_area=recorded.max_area)


@pytest.mark.parametrize("case", ["train_default", "rect"])
def test_masks_are_the_official_ones(golden, recorder, case):
    numbers = golden.load("dinov2_masking")
    recorded = recorder(numbers.hyper(case))
    for asked in numbers.outputs(case)["asked"]:
        recorded.draw(int(asked))
    numbers.check(case, "masks", masks_of(recorded).unflatten(1, recorded.grid))


@pytest.mark.parametrize("case", ["train_default_stats", "rect_stats"])
def test_how_much_is_masked(golden, recorder, case):
    numbers = golden.load("dinov2_masking")
    recorded = recorder(numbers.hyper(case))
    patches = recorded.grid[0] * recorded.grid[1]
    for _ in range(numbers.hyper(case)["draws"]):
        recorded.draw(int(patches * (0.1 + 0.4 * recorded.random.random())))
    counts = masks_of(recorded).sum(dim=1).numpy()
    ratios = counts / patches
    numbers.check(case, "masked_counts", counts.astype(np.int32))
    numbers.check(case, "ratio_mean", ratios.mean())
    numbers.check(case, "ratio_std", ratios.std())
    numbers.check(case, "ratio_deciles", np.quantile(ratios, np.linspace(0, 1, 11)))


def test_how_often_a_mask_falls_short(golden, recorder):
    numbers = golden.load("dinov2_masking")
    hyper = numbers.hyper("shortfall")
    for asked in (25, 76, 128):
        recorded = recorder(hyper)
        for _ in range(hyper["draws"]):
            recorded.draw(asked)
        counts = masks_of(recorded).sum(dim=1).numpy()
        numbers.check("shortfall", f"asked{asked}_mean", counts.mean())
        numbers.check("shortfall", f"asked{asked}_min", counts.min())
        numbers.check("shortfall", f"asked{asked}_max", counts.max())
        numbers.check("shortfall", f"asked{asked}_fraction_short", (counts < asked).mean())


def test_the_numbers_of_an_image_nearly_always_suffice():
    """Cut off at TRIES, as training does, 2000 masks of each grid are as full as the official ones, to 0.1 %."""
    torch.manual_seed(0)
    for side, min_area in ((14, 4), (14, 16), (32, 4)):
        noise = torch.rand(2000, 2 * NUMBERS)
        asked = (side**2 * (0.1 + 0.4 * torch.rand(2000))).int()
        longer = block_masks(noise, asked, (side, side), min_area=min_area)
        cut = block_masks(noise[:, :NUMBERS], asked, (side, side), min_area=min_area)
        assert TRIES * 4 == NUMBERS
        assert cut.sum() >= 0.999 * longer.sum()
        assert (longer & cut == cut).all()


def test_a_mask_follows_from_its_own_numbers_alone():
    noise, asked = torch.rand(9, NUMBERS), torch.full((9,), 12.5)
    together = block_masks(noise, asked, (6, 7), min_area=2)
    assert together.shape == (9, 42)
    assert together.any()
    for i in range(9):
        assert torch.equal(block_masks(noise[i : i + 1], asked[:1], (6, 7), min_area=2)[0], together[i])
    assert together.sum(dim=1).max() <= 12
    assert not block_masks(noise, torch.zeros(9), (6, 7), min_area=2).any()
