"""What is measured: weights by their path, known by digest before anything is loaded, and how pictures reach them.

The literal weights "pixels" are the baseline that every encoder has to beat: the picture itself, 32×32, its channels
standardised by the corpus's own statistics.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selfsight.errors import UserError
from selfsight.files import sha256_of
from selfsight.weights import PretrainedEncoder, load_pretrained, newest_export
from selfsight.weights.folder import WEIGHTS, Export
from selfsight.weights.preprocess import EvalTransform, settings
from selfsight.weights.run import is_run

PIXELS = "pixels"
PIXELS_SIZE = 32
PIXELS_DIGEST = hashlib.sha256(
    b"pixels 32x32, standardised by the channel statistics of the corpus, version 1"
).hexdigest()


@dataclass(frozen=True)
class Subject:
    """Weights before they are loaded: enough to know what their features would be called."""

    name: str  # path of the export, or "pixels"
    digest: str  # sha256 of the weights' bytes as they are now
    description: dict[str, Any]  # what beside the weights decides a feature
    meta: dict[str, Any]  # which, objective, step, …
    embed_dim: int

    @classmethod
    def open(cls, weights: str | Path) -> "Subject":
        """An export folder, a run (its newest export), or "pixels". Raises UserError for anything else."""
        if str(weights) == PIXELS:
            return cls(PIXELS, PIXELS_DIGEST, {"preprocess": settings(PIXELS_SIZE)}, {}, 3 * PIXELS_SIZE**2)
        path = Path(weights)
        export = Export.open(newest_export(path) if is_run(path) else path)
        # The tensors alone do not decide a feature: how many heads share them, say, stands in the config.
        description = {
            "architecture": export.config["architecture"],
            "model_args": export.config["model_args"],
            "pos_interpolation": export.origin["pos_interpolation"],
            "preprocess": export.origin["preprocess"],
        }
        # Of the bytes that are there now, not the digest somebody recorded.
        digest = sha256_of(export.path / WEIGHTS)
        return cls(str(export.path), digest, description, export.origin["meta"], int(export.config["num_features"]))

    @property
    def is_pixels(self) -> bool:
        return self.name == PIXELS

    def transform(self, resize: int | None = None) -> EvalTransform:
        """The weights' own preprocessing; `resize` is another length of the shorter side before the crop, in pixels."""
        return EvalTransform(self.preprocess(resize))

    def preprocess(self, resize: int | None = None) -> dict[str, Any]:
        given = self.description["preprocess"]
        if resize is None:
            return given
        side = given["input_size"][1]
        if resize < side:
            raise UserError(f"a resize to {resize} pixels is smaller than the crop of {side}: give {side} or more")
        return {**given, "crop_pct": side / resize}

    def load(self, device: torch.device) -> PretrainedEncoder:
        """The encoder. Raises UserError as `load_pretrained` does, and for pixels."""
        if self.is_pixels:
            raise UserError("raw pixels have no encoder: this probe needs weights")
        return load_pretrained(self.name, device=device)


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device called `name`; None is a GPU if there is one. Raises UserError when it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:  # AssertionError: torch without CUDA
        raise UserError(f"there is no device {name} here ({str(e).splitlines()[0]}): use cpu or leave it out") from e
    return device
