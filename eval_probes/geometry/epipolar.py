"""Epipolar consistency: whether mutual matches of patch tokens between views of a scene obey the views' geometry.

In: a folder of views. Where the fundamental matrix of two views is not known it is estimated from the encoder's own
matches, and never judged by the matches that it was estimated from: half of them give F and the other half are judged,
and the other way round.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval_probes.bench import Bench
from eval_probes.geometry.epipoles import EIGHT, eight_point, sampson, symmetric_epipolar
from eval_probes.geometry.matching import cell_centres, check_tokens, match
from eval_probes.geometry.pictures import matches_picture
from eval_probes.geometry.robust import ransac
from eval_probes.geometry.scenes import fitted
from eval_probes.protocol import Protocol
from eval_probes.results import Score, figure, score_of
from selfsight.errors import UserError

FEWEST = 2 * EIGHT  # matches: eight for either half
CHANCE = 512  # matches whose partners are exchanged to know chance: all pairs of them


@dataclass(frozen=True)
class Epipolar(Protocol):
    """`band` is in patches: a match is consistent if its Sampson distance is at most that. A patch's centre is up to
    half a patch from the truth along x and y, so that no encoder is held to less."""

    kind = "epipolar"
    needs = ("scene",)
    size: int = 448  # about, of the shorter side, pixels
    apart: int = 2  # views are paired with those that follow, up to so many
    band: float = 0.5
    rounds: int = 4096  # of RANSAC
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.size, self.apart, self.rounds) < 1 or not self.band > 0:
            raise UserError("epipolar wants size, apart and rounds of at least 1, and a band above 0")

    def run(self, bench: Bench) -> list[Score]:
        scene, encoder = bench.need_scene(), bench.encoder
        P = encoder.patch_size
        views, tokens, scales = {}, {}, {}
        for name in scene.views:
            views[name], scales[name] = fitted(scene.image(name), self.size, P)
            tokens[name] = _tokens(bench, views[name])
            check_tokens(tokens[name], bench.subject.name)
        rows: dict[str, dict[str, float]] = {}
        for first, second in scene.pairs(self.apart):
            known = scene.matrix(first, second)
            if known is not None:  # F for points of the pictures as they were: x = x_fitted / scale
                shrink = [np.diag([*(1 / scales[name]), 1]) for name in (first, second)]
                known = shrink[1] @ known @ shrink[0]
            a, b = (cell_centres(v.height, v.width, P, bench.device) for v in (views[first], views[second]))
            found = match(tokens[first], tokens[second], torch.ones(1, len(a), dtype=torch.bool, device=a.device))
            x, y = (t.double().cpu().numpy() for t in (a, b[found.index[0]]))
            mutual = found.mutual[0].cpu().numpy()
            judged = self.judge(x[mutual], y[mutual], P, known)
            if judged is None:
                continue
            rows[f"{first}–{second}"] = judged.row | {"coverage": float(mutual.mean())}
            if bench.pictures is not None:
                right = np.zeros(len(x), dtype=bool)
                right[mutual] = judged.consistent
                source, target = (np.asarray(views[v]).transpose(2, 0, 1) for v in (first, second))
                ends = torch.from_numpy(x), torch.from_numpy(y)
                marks = torch.from_numpy(right), torch.from_numpy(mutual)
                picture = matches_picture(source, target, *ends, marks[0], shown=marks[1])
                picture.save(bench.pictures / f"{self.name}-{first}-{second}.png")
        if not rows:
            raise UserError(f"no two views of {scene.path} have {FEWEST} mutual matches: give a larger size")
        return self._scores(bench, rows)

    def judge(self, x: np.ndarray, y: np.ndarray, patch: int, known: np.ndarray | None) -> "Judged | None":
        """Mutual matches x ↔ y (M, 2), by F as it is known or by the one estimated from the other half of them; None
        for fewer than `FEWEST`, and where no eight of a half agree."""
        if len(x) < FEWEST:
            return None
        generator = np.random.default_rng([self.seed, len(x)])
        half = generator.permutation(len(x)) % 2 == 0
        consistent, distance, lines = np.zeros(len(x), dtype=bool), np.zeros(len(x)), np.zeros(len(x))
        chance = []
        for judged in (half, ~half):
            F = known if known is not None else self._estimate(x[~judged], y[~judged], patch)
            if F is None:
                return None
            distance[judged] = sampson(F, x[judged], y[judged])
            lines[judged] = symmetric_epipolar(F, x[judged], y[judged])
            consistent[judged] = distance[judged] <= self.band * patch
            some = generator.permutation(np.flatnonzero(judged))[:CHANCE]
            exchanged = np.stack([sampson(F, x[some], np.roll(y[some], k, axis=0)) for k in range(1, len(some))])
            chance.append(float((exchanged <= self.band * patch).mean()))
        row = {
            "consistent": float(consistent.mean()),
            "chance": float(np.mean(chance)),
            "sampson": float(np.median(distance)),
            "symmetric": float(np.median(lines)),
            "matches": len(x),
        }
        return Judged(row, consistent)

    def _estimate(self, x: np.ndarray, y: np.ndarray, patch: int) -> np.ndarray | None:
        found = ransac(
            eight_point,
            sampson,
            x,
            y,
            minimum=EIGHT,
            threshold=self.band * patch,
            rounds=self.rounds,
            seed=self.seed,
        )
        return None if found is None else found[0]

    def _scores(self, bench: Bench, rows: dict[str, dict[str, float]]) -> list[Score]:
        columns = {key: np.array([row[key] for row in rows.values()]) for key in next(iter(rows.values()))}
        scene = bench.need_scene().id
        said = {"pairs": rows, "patch": bench.encoder.patch_size}

        def score(metric: str, column: str, unit: str, better: str, **more) -> Score:
            given = {"train": None, "test": scene, "unit": unit, "better": better, "details": {**said, **more}}
            if len(rows) == 1:  # of one pair nobody knows how sure it is
                return figure(metric, float(columns[column][0]), 1, self, bench.subject, **given)
            return score_of(metric, columns[column], self, bench.subject, **given)

        return [
            score(f"consistent@{self.band:g}P", "consistent", "%", "higher", chance=float(columns["chance"].mean())),
            score("sampson", "sampson", "px", "lower"),
            score("symmetric-epipolar", "symmetric", "px", "lower"),
            score("mutual-coverage", "coverage", "%", "none"),
        ]


@dataclass(frozen=True)
class Judged:
    """What the mutual matches of one pair are worth."""

    row: dict[str, float]  # shares, and medians in pixels
    consistent: np.ndarray  # bool (M,)


@torch.inference_mode()
def _tokens(bench: Bench, view: Image.Image) -> Tensor:
    """(1, N, D) float32."""
    pixels = torch.from_numpy(np.asarray(view).transpose(2, 0, 1).copy()).to(bench.device)[None]
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.how.precision == "bf16"):
        return bench.encoder(bench.encoder.preprocess.normalise(pixels)).patches.float()


PRESETS = {"epipolar": Epipolar()}
