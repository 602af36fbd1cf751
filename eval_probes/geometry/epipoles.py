"""The fundamental matrix of two views, x'ᵀ F x = 0, by the normalised eight-point algorithm (Hartley 1997), and how far
matches are from it (Hartley & Zisserman, Multiple View Geometry, chapter 11). float64 numpy, over leading dimensions.
"""

import numpy as np

EIGHT = 8


def eight_point(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """F (…, 3, 3) of rank 2 and norm 1, of eight or more matches x ↔ y (…, M, 2)."""
    x, T = _normalised(x)
    y, U = _normalised(y)
    rows = (y[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], 9)  # y'ᵀ F x, F row by row
    # The smallest eigenvector of AᵀA: after the normalisation its digits are enough, and M may be large.
    F = np.linalg.eigh(rows.swapaxes(-1, -2) @ rows)[1][..., 0].reshape(*x.shape[:-2], 3, 3)
    u, s, vt = np.linalg.svd(F)
    F = (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]  # all epipolar lines go through one point
    F = U.swapaxes(-1, -2) @ F @ T
    return F / np.linalg.norm(F, axis=(-2, -1), keepdims=True)


def _normalised(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Homogeneous points with mean 0 and mean distance √2, and the matrices that make them so."""
    centre = points.mean(axis=-2)
    distance = np.linalg.norm(points - centre[..., None, :], axis=-1).mean(axis=-1)
    scale = np.sqrt(2) / np.maximum(distance, 1e-12)
    T = np.zeros((*centre.shape[:-1], 3, 3))
    T[..., 0, 0] = T[..., 1, 1] = scale
    T[..., :2, 2] = -scale[..., None] * centre
    T[..., 2, 2] = 1
    return _homogeneous(points) @ T.swapaxes(-1, -2), T


def _homogeneous(points: np.ndarray) -> np.ndarray:
    return np.concatenate([points, np.ones_like(points[..., :1])], axis=-1)


def _lines(F: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """|x'ᵀ F x|, and the lengths of the normals of both epipolar lines; each (…, M)."""
    x, y = _homogeneous(x), _homogeneous(y)
    in_second, in_first = x @ F.swapaxes(-1, -2), y @ F
    algebraic = np.abs((y * in_second).sum(axis=-1))
    return algebraic, *(np.maximum(np.linalg.norm(line[..., :2], axis=-1), 1e-300) for line in (in_second, in_first))


def sampson(F: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x'ᵀ F x| / √(‖(Fx)₁₂‖² + ‖(Fᵀx')₁₂‖²), pixels: to first order how far the match has to move."""
    algebraic, second, first = _lines(F, x, y)
    return algebraic / np.hypot(second, first)


def symmetric_epipolar(F: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mean distance of x' from the line of x and of x from that of x', pixels."""
    algebraic, second, first = _lines(F, x, y)
    return algebraic * (1 / second + 1 / first) / 2
