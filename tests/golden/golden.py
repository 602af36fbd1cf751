"""Reads the golden numbers beside this file: what the official implementations computed on fixed inputs.

A key is `<case>/<kind>/<name>`; kinds: `in` inputs, `hp` hyper-parameters, `w` weights, `out` the official result in
float32, `out64` in float64, `tol` the tolerance of the output of that name. Also translates the official weight names
into those of our objectives and back.
"""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent
FLOAT64_TOLERANCE = 1e-9  # of the largest magnitude in the array


class Golden:
    """One file. `dtype` is that of the tensors it hands out, and decides which result `check` compares with."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            self.arrays: dict[str, np.ndarray] = {key: file[key] for key in file.files}
        self.dtype = dtype
        self.worst = 0.0  # largest error so far, as a fraction of its tolerance

    def cases(self) -> list[str]:
        return list(dict.fromkeys(key.split("/")[0] for key in self.arrays))

    def kind(self, case: str, kind: str) -> dict[str, np.ndarray]:
        start = f"{case}/{kind}/"
        return {key.removeprefix(start): array for key, array in self.arrays.items() if key.startswith(start)}

    def hyper(self, case: str) -> dict[str, Any]:
        return {k: v.item() if v.ndim == 0 else v for k, v in self.kind(case, "hp").items()}

    def inputs(self, case: str) -> dict[str, Tensor]:
        return {k: self.tensor(v) for k, v in self.kind(case, "in").items()}

    def weights(self, case: str) -> dict[str, Tensor]:
        return {k: self.tensor(v) for k, v in self.kind(case, "w").items()}

    def outputs(self, case: str) -> dict[str, np.ndarray]:
        return self.kind(case, "out")

    def tensor(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array.copy())
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def check(self, case: str, name: str, actual: Any) -> None:
        """Asserts that `actual` is the official output `name`: strings and integers equal, floats within tolerance."""
        label = f"{case}/{name}"
        actual = actual.detach().cpu().numpy() if isinstance(actual, Tensor) else np.asarray(actual)
        expected = self.arrays[f"{case}/out/{name}"]
        assert actual.shape == expected.shape, f"{label}: shape {actual.shape}, expected {expected.shape}"
        if expected.dtype.kind != "f":
            assert (actual == expected).all(), f"{label} differs"
            return
        tolerance = float(self.arrays[f"{case}/tol/{name}"])
        if actual.dtype == np.float64 and (exact := self.arrays.get(f"{case}/out64/{name}")) is not None:
            # Gradients that are zero but for rounding have no magnitude of their own: the file's tolerance bounds them.
            expected, tolerance = exact, max(FLOAT64_TOLERANCE * float(np.abs(exact).max()), tolerance * 1e-5)
        error = float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max())
        assert error <= tolerance, f"{label}: error {error:.2e}, tolerance {tolerance:.2e}"
        self.worst = max(self.worst, error / tolerance if tolerance else 0.0)


def load(name: str, dtype: torch.dtype = torch.float32) -> Golden:
    return Golden(name, dtype)


def to_dino(official: dict[str, Tensor], part: str = "student") -> dict[str, Tensor]:
    """Official `backbone.*` and `head.*` under the names they have in our DINO; `part` is "student" or "teacher"."""
    ours = {"backbone": f"{part}.vit", "head": f"{part}_head"}
    return {f"{ours[name.split('.')[0]]}.{name.split('.', 1)[1]}": w for name, w in official.items()}


def from_dino(ours: dict[str, Tensor], part: str = "student") -> dict[str, Tensor]:
    """The inverse of `to_dino` on the names of `part`; other names are left out."""
    prefixes = {f"{part}.vit.": "backbone.", f"{part}_head.": "head."}
    return {
        official + name.removeprefix(prefix): w
        for name, w in ours.items()
        for prefix, official in prefixes.items()
        if name.startswith(prefix)
    }


def to_mae(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of MaskedAutoencoderViT as they are in our MAE: the encoder's under `student.vit.`."""
    return {n if _of_decoder(n) else f"student.vit.{n}": w for n, w in official.items()}


def from_mae(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_mae`."""
    return {name.removeprefix("student.vit."): w for name, w in ours.items()}


def _of_decoder(name: str) -> bool:
    return name.startswith(("decoder_", "mask_token"))


def to_dinov2(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of SSLMetaArch and its two losses as they are in our DINOv2. The teacher's mask token has no use."""
    whole = {
        "dino_loss.center": "center",
        "ibot_patch_loss.center": "patch_center.value",
        "student.backbone.mask_token": "mask_token",
    }
    parts = {"backbone": ".vit", "dino_head": "_head", "ibot_head": "_patch_head"}
    renamed = {}
    for name, w in official.items():
        if name in whole:
            renamed[whole[name]] = w.flatten() if "center" in name else w
        elif name != "teacher.backbone.mask_token":
            who, part, rest = name.split(".", 2)
            renamed[f"{who}{parts[part]}.{rest}"] = w
    return renamed


class MaskRecorder:
    """Runs the official algorithm on python's stream, one mask at a time, and notes what it drew in the form in which
    `selfsight.masks.block_masks` takes it: four numbers for each try.
    """

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

    def noise(self) -> Tensor:
        """What was drawn, (masks, 4·tries) float64, zeros after a mask's last try."""
        length = max(map(len, self.numbers))
        return torch.tensor([each + [0.0] * (length - len(each)) for each in self.numbers], dtype=torch.float64)
