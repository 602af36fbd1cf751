"""Block masks against the official generator's, number by number.

The official code draws from python's `random`, as many numbers as it happens to need. `Recorder` runs its algorithm on
that stream one mask at a time, notes what was drawn in the form in which `block_masks` takes it, and so both say the
same: the recorder that it is the official algorithm, `block_masks` that it does with these numbers what that does.
"""

import math
import random

import numpy as np
import pytest
import torch

from selfsight.masks import NUMBERS, TRIES, block_masks


class Recorder:
    def __init__(self, seed: int, grid: tuple[int, int], max_area: float) -> None:
        self.random = random.Random(seed)
        self.grid, self.max_area = grid, max_area
        self.asked: list[int] = []
        self.numbers: list[list[float]] = []

    def draw(self, asked: int) -> None:
        H, W = self.grid
        mask, count, noise = np.zeros((H, W), bool), 0, []
        while count < asked:
            room, added = min(asked - count, self.max_area), 0
            for _ in range(10):
                u, v = self.random.random(), self.random.random()
                area, aspect = 4 + (room - 4) * u, math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * v)
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                noise += [u, v, 0.0, 0.0]
                if w < W and h < H:
                    top, left = self.random.randint(0, H - h), self.random.randint(0, W - w)
                    noise[-2:] = [(top + 0.5) / (H - h + 1), (left + 0.5) / (W - w + 1)]
                    missing = int((~mask[top : top + h, left : left + w]).sum())
                    if 0 < missing <= room:
                        mask[top : top + h, left : left + w] = True
                        added = missing
                        break
            if not added:
                break
            count += added
        self.asked.append(asked)
        self.numbers.append(noise)

    def masks(self) -> torch.Tensor:
        """What `block_masks` makes of the numbers, all masks at once."""
        tries = max(map(len, self.numbers))
        noise = torch.tensor([each + [0.0] * (tries - len(each)) for each in self.numbers], dtype=torch.float64)
        return block_masks(noise, torch.tensor(self.asked), self.grid, min_area=4, max_area=self.max_area)


def recorder(hyper: dict) -> Recorder:
    size = hyper["input_size"]
    grid = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return Recorder(hyper["random_seed"], grid, hyper.get("max_num_patches", hyper.get("num_masking_patches")))


@pytest.mark.parametrize("case", ["train_default", "rect"])
def test_masks_are_the_official_ones(golden, case):
    numbers = golden.load("dinov2_masking")
    recorded = recorder(numbers.hyper(case))
    for asked in numbers.outputs(case)["asked"]:
        recorded.draw(int(asked))
    numbers.check(case, "masks", recorded.masks().unflatten(1, recorded.grid))


@pytest.mark.parametrize("case", ["train_default_stats", "rect_stats"])
def test_how_much_is_masked(golden, case):
    numbers = golden.load("dinov2_masking")
    recorded = recorder(numbers.hyper(case))
    patches = recorded.grid[0] * recorded.grid[1]
    for _ in range(numbers.hyper(case)["draws"]):
        recorded.draw(int(patches * (0.1 + 0.4 * recorded.random.random())))
    counts = recorded.masks().sum(dim=1).numpy()
    ratios = counts / patches
    numbers.check(case, "masked_counts", counts.astype(np.int32))
    numbers.check(case, "ratio_mean", ratios.mean())
    numbers.check(case, "ratio_std", ratios.std())
    numbers.check(case, "ratio_deciles", np.quantile(ratios, np.linspace(0, 1, 11)))


def test_how_often_a_mask_falls_short(golden):
    numbers = golden.load("dinov2_masking")
    hyper = numbers.hyper("shortfall")
    for asked in (25, 76, 128):
        recorded = recorder(hyper)
        for _ in range(hyper["draws"]):
            recorded.draw(asked)
        counts = recorded.masks().sum(dim=1).numpy()
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
