"""What features tell without any label: how many dimensions they use, how they spread, how alike two encoders are.

Pure functions of float tensors, none of which grows with N². RankMe and the feature spread are
`selfsight.encoders.statistics`'s. The protocol `label-free` reports them on one corpus.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eval_probes.bench import Bench
from eval_probes.protocol import FeatureProtocol
from eval_probes.results import Score, figure
from selfsight.encoders.statistics import feature_spread, rankme

ROWS = 2048  # of a block of pairs
LIDAR_DELTA = 1e-4  # added to the within-class scatter
LIDAR_EPS = 1e-7
SPECTRUM = (3, 100)  # eigenvalues that the power law is fitted to, counted from 0, as α-ReQ's authors do


def alpha_req(features: Tensor) -> float:
    """α of the power law λ_j ∝ j^−α that the covariance eigenvalues of features (N, D) follow.

    Least squares of log λ_j on log j over `SPECTRUM`, weighted by 1/j (Agrawal et al. 2022, arXiv:2202.05808, with
    Stringer et al. 2019). NaN for fewer than three eigenvalues in that range.
    """
    X = features.double()
    eigenvalues = torch.linalg.svdvals(X - X.mean(dim=0)).square()
    first, last = SPECTRUM[0], min(SPECTRUM[1], int((eigenvalues > 1e-12 * eigenvalues[0]).sum()))
    if last - first < 3:
        return math.nan
    j = torch.arange(first + 1, last + 1, dtype=torch.float64, device=X.device)
    x, y, w = j.log(), eigenvalues[first:last].log(), 1 / j
    x, y = x - (w * x).sum() / w.sum(), y - (w * y).sum() / w.sum()
    return float(-(w * x * y).sum() / (w * x * x).sum())


def lidar(views: Tensor, delta: float = LIDAR_DELTA, eps: float = LIDAR_EPS) -> float:
    """LiDAR of features `views` (N, Q, D) of Q augmented views of each of N images: between 1 and min(N − 1, D).

    The effective rank of Σ_w^(−1/2) Σ_b Σ_w^(−1/2), of the scatter between and within images, with δ on the diagonal of
    Σ_w (Thilak et al. 2023, arXiv:2312.04000, section 4).
    """
    X = views.double()
    mean_ND = X.mean(dim=1)
    between = (mean_ND - mean_ND.mean(dim=0)).T @ (mean_ND - mean_ND.mean(dim=0)) / (len(X) - 1)
    inside = (X - mean_ND[:, None]).flatten(0, 1)
    within = inside.T @ inside / (len(X) * (X.shape[1] - 1)) + delta * torch.eye(X.shape[2]).to(X)
    # The generalised problem has the same eigenvalues as the whitened matrix: whiten by a Cholesky factor.
    L = torch.linalg.cholesky(within)
    half = torch.linalg.solve_triangular(L, between, upper=False)
    eigenvalues = torch.linalg.eigvalsh(torch.linalg.solve_triangular(L, half.T, upper=False)).clamp_min(0)
    p = eigenvalues / eigenvalues.sum() + eps
    return float(torch.exp(-(p * p.log()).sum()))


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """log E exp(−t ‖x − y‖²) over pairs of different L2-normalised features (N, D): 0 when all are one direction, lower
    the more evenly they fill the sphere (Wang & Isola 2020, arXiv:2005.10242)."""
    X = F.normalize(features.float(), dim=1)
    total = 0.0
    for block in X.split(ROWS):
        total += float(torch.exp(2 * t * (block @ X.T - 1)).double().sum())
    n = len(X)
    return math.log((total - n) / (n * (n - 1)))


def alignment(first: Tensor, second: Tensor, power: float = 2.0) -> float:
    """E ‖x − x⁺‖^α of L2-normalised features (N, D) of two views of each image: 0 when they agree (Wang & Isola)."""
    apart = F.normalize(first.float(), dim=1) - F.normalize(second.float(), dim=1)
    return float(apart.norm(dim=1).pow(power).mean())


def linear_cka(X: Tensor, Y: Tensor) -> float:
    """How alike two encoders' features (N, D) and (N, D') of the same images are, from 0 to 1, whatever their rotation
    and scale: linear centred kernel alignment (Kornblith et al. 2019, arXiv:1905.00414, equation 3)."""
    X, Y = (Z.double() - Z.double().mean(dim=0) for Z in (X, Y))
    cross, own_x, own_y = ((a.T @ b).square().sum() for a, b in ((Y, X), (X, X), (Y, Y)))
    return float(cross / (own_x * own_y).sqrt())


def neighbour_overlap(X: Tensor, Y: Tensor, k: int = 10) -> float:
    """The share of an image's k nearest others by cosine under features X (N, D) that are so under Y (N, D') as well: 1
    means that an index built on one answers as the other would."""
    from eval_probes.knn import neighbours

    near = []
    for Z in (X, Y):
        unit = F.normalize(Z.float(), dim=1)
        found = neighbours(unit, unit, k + 1)[1]
        own = torch.arange(len(unit), device=unit.device)[:, None]
        # An image is its own nearest, unless copies of it come before: then the last place goes.
        order = (found == own).int().argsort(dim=1, stable=True)
        near.append(found.gather(1, order)[:, :k])
    return float((near[0][:, :, None] == near[1][:, None, :]).any(dim=2).float().mean())


@dataclass(frozen=True)
class LabelFree(FeatureProtocol):
    """RankMe, α-ReQ, uniformity and spread on the test corpus."""

    kind = "label-free"
    needs = ("test",)
    images: int = 10_000  # looked at, evenly spread over the corpus

    def run(self, bench: Bench) -> list[Score]:
        corpus = bench.need("test")
        features = bench.features(corpus, self.pooling, resize=self.resize)
        rows = torch.arange(0, features.n, max(1, -(-features.n // self.images))).numpy()
        X = features.tensor(bench.device, rows)
        values = {
            "rankme": float(rankme(X)),
            "alpha-req": alpha_req(X),
            "uniformity": uniformity(X),
            "spread": float(feature_spread(X)),
        }
        details = {"features": features.describe()}
        return [
            figure(name, value, len(X), self, bench.subject, train=None, test=corpus.id, details=details)
            for name, value in values.items()
            if math.isfinite(value)
        ]


PRESETS = {"label-free": LabelFree()}
