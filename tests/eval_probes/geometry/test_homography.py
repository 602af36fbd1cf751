"""An encoder that knows where everything is scores as the oracle does, one that knows nothing as chance does."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from eval_probes.features import Collapsed
from eval_probes.geometry import planes
from eval_probes.geometry.homography import Homography
from eval_probes.geometry.matching import bounds, cell_centres
from eval_probes.protocol import find
from eval_probes.results import paired_p
from selfsight.errors import UserError
from selfsight.shards.corpus import Corpus


def scores(protocol, bench) -> dict:
    return {score.metric: score for score in protocol.run(bench)}


def test_who_knows_the_place_is_the_oracle(ramps, bench_of, codes):
    # With rotations alone, the nearest in the code is the nearest in the target; all but where black corners cut cells,
    # whose code is that of the part which is left.
    turned = Homography(perturbation=0, scale=1, jitter=0, degrees=60)
    found = scores(turned, bench_of(codes.position, test=Corpus.open(ramps)))
    for metric in ("pck@1P", "pck@0.5P", "pck@2P"):
        assert found[metric].value == pytest.approx(found[metric].details["oracle"], abs=0.02)
    assert found["error"].value == pytest.approx(found["error"].details["oracle"], rel=0.03)
    assert found["pck@1P"].value > 0.99
    # No cell is turned into another exactly: the error is that of a uniform place in a cell, .3826 of its side.
    assert found["error"].value == pytest.approx(0.3826 * codes.patch, rel=0.05)
    assert found["pck@0.5P"].details["oracle"] == pytest.approx(math.pi / 4, abs=0.03)
    assert found["mutual-precision@1P"].value > 0.99
    assert found["mutual-coverage"].value > 0.6
    assert found["pck@1P"].items.shape == (24,)
    assert set(found["pck@1P"].details["by"]) == {"degrees"}


def test_what_does_not_move_is_found_exactly(ramps, bench_of, codes):
    still = Homography(perturbation=0, scale=1, jitter=0, degrees=0, images=4)
    found = scores(still, bench_of(codes.position, test=Corpus.open(ramps)))
    assert found["error"].value == 0 == found["error"].details["oracle"]
    assert found["mutual-coverage"].value == 1


def test_strong_views_are_near_the_oracle_still(ramps, bench_of, codes):
    found = scores(Homography(jitter=0), bench_of(codes.position, test=Corpus.open(ramps)))
    # Under perspective the nearest in the source need not be the nearest in the target.
    assert found["pck@1P"].value > found["pck@1P"].details["oracle"] - 0.03
    assert set(found["pck@1P"].details["by"]) == {"degrees", "log scale"}


def test_who_knows_nothing_scores_as_chance(ramps, bench_of, codes):
    found = scores(find("homography"), bench_of(codes.random, test=Corpus.open(ramps)))
    for metric in ("pck@1P", "pck@2P", "error"):
        low, high, chance = found[metric].low, found[metric].high, found[metric].details["chance"]
        wide = high - low
        assert low - wide / 2 <= chance <= high + wide / 2, metric
    assert "chance" in found["pck@1P"].said()
    other = scores(find("homography"), bench_of(codes.position, test=Corpus.open(ramps)))
    assert paired_p(found["pck@1P"], other["pck@1P"]) < 0.01, "the pairs are the same ones"


def test_a_constant_encoder_is_no_score(ramps, bench_of, codes):
    with pytest.raises(Collapsed, match="every patch the same"):
        find("homography").run(bench_of(codes.constant, test=Corpus.open(ramps)))


def test_chance_is_counted():
    centres = cell_centres(4, 6, 2)
    assert centres.tolist() == [[1, 1], [3, 1], [5, 1], [1, 3], [3, 3], [5, 3]]
    truth, asked = torch.tensor([[[1.0, 1], [9, 9]]]), torch.tensor([[True, False]])
    chance, oracle = bounds(truth, asked, centres, (2.0, 0.5))
    assert chance.within[2.0].item() == pytest.approx(3 / 6)  # itself, its right and its lower neighbour
    assert chance.within[0.5].item() == pytest.approx(1 / 6)
    assert chance.error.item() == pytest.approx((0 + 2 + 4 + 2 + math.sqrt(8) + math.sqrt(20)) / 6)
    assert (oracle.within[2.0].item(), oracle.error.item()) == (1, 0)


def test_warps_are_those_of_opencv():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is in the dev extra")
    generator = np.random.default_rng(0)
    smooth = Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((64, 64), 3)
    H, degrees, scale = planes.draw(generator, 64, 0.15, 60, 1.5)
    assert abs(degrees) <= 60
    assert 1 / 1.5 <= scale <= 1.5
    half = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    as_opencv = half @ H @ np.linalg.inv(half)
    np.testing.assert_allclose(planes.from_pixel_centres(as_opencv), H, atol=1e-9)
    expected = cv2.warpPerspective(np.asarray(smooth), as_opencv, (64, 64), flags=cv2.INTER_CUBIC)
    inner = np.zeros((64, 64), np.uint8)
    inner[3:-3, 3:-3] = 1  # the border is blended with black by one and not by the other
    inside = cv2.warpPerspective(inner, as_opencv, (64, 64), flags=cv2.INTER_NEAREST) == 1
    difference = np.abs(np.asarray(planes.warp(smooth, H)).astype(int) - expected)[inside]
    assert difference.max() <= 3  # the cubics differ in a parameter; half a pixel off is up to 18
    corners = np.array([[0.0, 0], [64, 0], [64, 64], [0, 64]])
    moved = planes.apply(torch.from_numpy(H), torch.from_numpy(corners)).numpy()
    reference = cv2.getPerspectiveTransform(corners.astype(np.float32), moved.astype(np.float32))
    np.testing.assert_allclose(planes.through(corners, moved), reference, atol=1e-4)


@pytest.mark.parametrize("override", ["perturbation=0.3", "scale=0.5", "radii=[]", "jitter=1.0", "images=0"])
def test_numbers_that_mean_nothing_are_refused(override):
    with pytest.raises(UserError):
        find("homography").override([override])


def test_pictures_are_saved_when_asked_for(ramps, bench_of, codes, tmp_path):
    bench = bench_of(codes.position, test=Corpus.open(ramps), pictures=tmp_path)
    Homography(images=2).run(bench)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["homography-0.png", "homography-1.png"]
