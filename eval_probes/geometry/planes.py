"""Homographies, 3×3 float64 with H p for (x, y, 1) up to scale: drawn at random, applied to points and to pictures."""

import numpy as np
from PIL import Image
from torch import Tensor

from selfsight.errors import UserError

LARGEST_PERTURBATION = 0.25  # of the side: up to it the corners keep a convex outline wherever they move


def draw(
    generator: np.random.Generator, side: int, perturbation: float, degrees: float, scale: float
) -> tuple[np.ndarray, float, float]:
    """H of a square picture, `side` pixels wide, with the angle (degrees) and the factor of scale that are in it.

    Each corner moves by up to `perturbation` of the side along x and y (DeTone et al. 2016, arXiv:1606.03798); then the
    picture turns by up to ±`degrees` and grows by 1/`scale` to `scale` about its centre, uniform in angle and log.
    """
    corners = side * np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])
    moved = corners + side * generator.uniform(-perturbation, perturbation, (4, 2))
    angle = generator.uniform(-degrees, degrees)
    factor = float(np.exp(generator.uniform(-1, 1) * np.log(scale)))
    c, s = factor * np.cos(np.deg2rad(angle)), factor * np.sin(np.deg2rad(angle))
    turned = (moved - side / 2) @ np.array([[c, s], [-s, c]]) + side / 2  # rows are points: p Rᵀ
    return through(corners, turned), float(angle), factor


def through(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The homography that takes four points (…, 4, 2) to four others, with H₃₃ = 1."""
    x, y, u, v = source[..., 0], source[..., 1], target[..., 0], target[..., 1]
    one, zero = np.ones_like(x), np.zeros_like(x)
    # u = (h₁x + h₂y + h₃)/(h₇x + h₈y + 1), and v alike: linear in h
    A = np.concatenate(
        [
            np.stack([x, y, one, zero, zero, zero, -u * x, -u * y], axis=-1),
            np.stack([zero, zero, zero, x, y, one, -v * x, -v * y], axis=-1),
        ],
        axis=-2,
    )
    h = np.linalg.solve(A, np.concatenate([u, v], axis=-1)[..., None])[..., 0]
    return np.concatenate([h, np.ones_like(h[..., :1])], axis=-1).reshape(*h.shape[:-1], 3, 3)


def apply(H: Tensor, points: Tensor) -> Tensor:
    """H (…, 3, 3) to points (…, M, 2)."""
    moved = points @ H[..., :2].transpose(-1, -2) + H[..., 2][..., None, :]
    return moved[..., :2] / moved[..., 2:]


def warp(image: Image.Image, H: np.ndarray) -> Image.Image:
    """The picture as H shows it, of the same size, black where it ends."""
    # Pillow asks where a pixel of the result comes from, and has pixel centres at a half, as we do.
    back = np.linalg.inv(H)
    data = (back / back[2, 2]).flatten()[:8].tolist()
    return image.transform(image.size, Image.Transform.PERSPECTIVE, data, Image.Resampling.BICUBIC)


def from_pixel_centres(H: np.ndarray) -> np.ndarray:
    """H of OpenCV's and most data sets' points, whose (0, 0) is the centre of the first pixel, for ours."""
    to_ours = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    return to_ours @ H @ np.linalg.inv(to_ours)


def check_perturbation(perturbation: float) -> None:
    if not 0 <= perturbation < LARGEST_PERTURBATION:
        raise UserError(f"corners can move by 0 up to {LARGEST_PERTURBATION} of the side, not by {perturbation}")
