"""F of matches is OpenCV's; matches that obey the views' geometry are found consistent, others as chance has it."""

import numpy as np
import pytest
from PIL import Image

from eval_probes.features import Collapsed
from eval_probes.geometry import epipoles
from eval_probes.geometry.epipolar import Epipolar
from eval_probes.geometry.robust import ransac
from eval_probes.geometry.scenes import Scene, fitted
from launch.cli import main
from selfsight.errors import UserError


@pytest.fixture(scope="module")
def views() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """300 points of a scene in two views, without noise, and their fundamental matrix by the cameras."""
    generator = np.random.default_rng(0)
    points = generator.uniform([-3, -2, 5], [3, 2, 12], (300, 3))
    K = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
    a = 0.2
    R = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    t = np.array([-1.5, 0.2, 0.3])
    cross = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]])
    F = np.linalg.inv(K).T @ cross @ R @ np.linalg.inv(K)
    x, y = points @ K.T, (points @ R.T + t) @ K.T
    return x[:, :2] / x[:, 2:], y[:, :2] / y[:, 2:], F / np.linalg.norm(F)


def apart(F: np.ndarray, G: np.ndarray) -> float:
    """Of matrices of norm 1, up to sign."""
    return min(np.abs(F - G).max(), np.abs(F + G).max())


def test_eight_points_are_enough(views):
    x, y, F = views
    assert apart(epipoles.eight_point(x[:8], y[:8]), F) < 1e-6
    found = epipoles.eight_point(x, y)
    assert apart(found, F) < 1e-8
    assert abs(np.linalg.det(found)) < 1e-15
    batch = epipoles.eight_point(np.stack([x[:20], x[20:40]]), np.stack([y[:20], y[20:40]]))
    np.testing.assert_allclose(batch[1], epipoles.eight_point(x[20:40], y[20:40]))
    assert epipoles.sampson(F, x, y).max() < 1e-8


def test_distances_are_those_of_opencv_and_of_the_lines(views):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is in the dev extra")
    x, y, F = views
    y = y + np.random.default_rng(1).normal(0, 3, y.shape)
    ones = np.ones((len(x), 1))
    theirs = [cv2.sampsonDistance(np.r_[p, 1.0], np.r_[q, 1.0], F) for p, q in zip(x[:20], y[:20], strict=True)]
    np.testing.assert_allclose(epipoles.sampson(F, x, y)[:20] ** 2, theirs, rtol=1e-6)
    lines = [cv2.computeCorrespondEpilines(p[:, None], i, F)[:, 0] for p, i in ((x, 1), (y, 2))]
    point = [np.hstack([p, ones]) for p in (y, x)]
    to_line = [np.abs((p * line).sum(axis=1)) for p, line in zip(point, lines, strict=True)]
    np.testing.assert_allclose(epipoles.symmetric_epipolar(F, x, y), sum(to_line) / 2, rtol=1e-6)


def test_wrong_matches_are_left_out_as_opencv_does(views):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is in the dev extra")
    x, y, _ = views
    generator = np.random.default_rng(2)
    x, y = x + generator.normal(0, 0.3, x.shape), y + generator.normal(0, 0.3, y.shape)
    y[:120] = generator.uniform(0, [640, 480], (120, 2))
    found = ransac(epipoles.eight_point, epipoles.sampson, x, y, minimum=8, threshold=1.5, rounds=2000)
    assert found is not None
    F, inliers = found
    assert inliers[120:].mean() > 0.98
    assert inliers[:120].mean() < 0.1
    theirs, _ = cv2.findFundamentalMat(x, y, cv2.FM_RANSAC, 1.5, 0.999, 2000)
    clean_x, clean_y, _ = views
    ours_error, their_error = (np.median(epipoles.sampson(G, clean_x, clean_y)) for G in (F, theirs))
    assert ours_error < max(their_error, 0.3)
    again = ransac(epipoles.eight_point, epipoles.sampson, x, y, minimum=8, threshold=1.5, rounds=2000)
    assert again is not None
    assert np.array_equal(F, again[0]), "the seed decides"
    assert ransac(epipoles.eight_point, epipoles.sampson, x[:5], y[:5], minimum=8, threshold=1, rounds=9) is None


def test_matches_of_one_geometry_are_consistent_and_others_are_chance(views):
    x, y, F = views
    right = Epipolar().judge(x, y, 16, None)
    assert right.row["consistent"] == 1
    assert right.row["chance"] < 0.3
    generator = np.random.default_rng(3)
    wrong = Epipolar().judge(
        generator.uniform(0, [640, 480], (300, 2)), generator.uniform(0, [640, 480], (300, 2)), 16, None
    )
    # F is fitted to the other half of the matches, so that fitting alone shows nothing.
    assert wrong.row["consistent"] == pytest.approx(wrong.row["chance"], abs=0.06)
    assert Epipolar().judge(x, y, 16, F).row["sampson"] < 1e-8
    assert Epipolar().judge(x[:15], y[:15], 16, None) is None


@pytest.fixture
def shifted(tmp_path, codes):
    """Two views of a picture of positions, the second 32 pixels further right: rows are epipolar lines."""
    whole = codes.picture(96, 192)
    Image.fromarray(whole[:, :160]).save(tmp_path / "a.png")
    Image.fromarray(whole[:, 32:]).save(tmp_path / "b.png")
    np.savetxt(tmp_path / "F_a_b.txt", [[0, 0, 0], [0, 0, -1], [0, 1, 0]])
    return tmp_path


def test_a_scene_of_known_geometry(shifted, bench_of, codes):
    protocol = Epipolar(size=192, apart=1)
    found = {s.metric: s for s in protocol.run(bench_of(codes.position, scene=Scene.open(shifted)))}
    assert found["consistent@0.5P"].value == 1
    assert found["sampson"].value == pytest.approx(0, abs=1e-4), "twice the size, and no half pixel lost"
    lost = protocol.run(bench_of(codes.random, scene=Scene.open(shifted)))[0]
    assert lost.value == pytest.approx(lost.details["chance"], abs=0.08)
    with pytest.raises(Collapsed):
        protocol.run(bench_of(codes.constant, scene=Scene.open(shifted)))


def test_pictures_are_fitted_whole():
    picture, scale = fitted(Image.new("RGB", (2832, 2128)), 448, 16)
    assert picture.size == (592, 448)
    np.testing.assert_allclose(scale, (592 / 2832, 448 / 2128))


def test_mistakes_are_one_sentence(tmp_path, shifted, bench_of, codes, capsys):
    with pytest.raises(UserError, match="no folder"):
        Scene.open(tmp_path / "none")
    (shifted / "F_a_b.txt").write_text("1 2 3")
    with pytest.raises(UserError, match="nine numbers"):
        Scene.open(shifted).matrix("a", "b")
    (shifted / "b.png").unlink()
    with pytest.raises(UserError, match="has 1 images"):
        Scene.open(shifted)
    with pytest.raises(UserError, match="--scene"):
        Epipolar().run(bench_of(codes.random))
    assert main(["eval", "epipolar", "pixels", "--scene", str(shifted)]) == 2
    assert "two views" in capsys.readouterr().err
