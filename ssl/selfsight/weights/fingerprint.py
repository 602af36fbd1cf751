"""What an encoder answers to one synthetic image. The answer travels with the weights and is asked for again at load.

The image is integer arithmetic, so that every machine and every library version makes the same one; the answer is the
class token and the mean patch token after the final norm, which every parameter of the encoder takes part in.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfsight.encoders import Encoder
from selfsight.errors import UserError
from selfsight.viewspec import MEAN, STD

# float32 on another CPU differs by about 1e-5 of the largest value; a forgotten tensor by about 1.
MIN_COSINE = 0.9999
MAX_DEVIATION = 2e-3  # largest absolute difference, as a fraction of the largest magnitude


@dataclass(frozen=True)
class Fingerprint:
    """`values`: class token (if the encoder has one) and mean patch token, one after the other, float32."""

    size: int  # pixels: the synthetic image is (3, size, size)
    values: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "image": "synthetic-1",
            "size": self.size,
            "min_cosine": MIN_COSINE,
            "max_deviation": MAX_DEVIATION,
            "values": [float(f"{v:.9g}") for v in self.values],  # nine digits give every float32 back
        }

    @classmethod
    def from_json(cls, given: Any) -> "Fingerprint":
        """Raises UserError when `given` is not what `to_json` writes."""
        try:
            if given["image"] != "synthetic-1":
                raise ValueError(given["image"])
            return cls(int(given["size"]), tuple(float(v) for v in given["values"]))
        except (KeyError, TypeError, ValueError) as e:
            raise UserError("the fingerprint in selfsight.json is malformed: export the weights again") from e


def synthetic_image(size: int) -> Tensor:
    """(1, 3, size, size) float32, normalised: integer ramps folded by an exclusive or, channels differing."""
    y = torch.arange(size).view(1, size, 1)
    x = torch.arange(size).view(1, 1, size)
    c = torch.arange(3).view(3, 1, 1)
    pixels = ((7 * x + 13 * y + 31 * c) ^ (x * y // 3 + 17 * c)) & 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((pixels.float() / 255 - mean) / std).unsqueeze(0)


@torch.inference_mode()
def take(encoder: Encoder, size: int) -> Fingerprint:
    """The fingerprint of `encoder` as it stands, on its own device, in evaluation mode; its mode is put back after."""
    training = encoder.training
    device = next(encoder.parameters()).device
    encoder.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            tokens = encoder(synthetic_image(size).to(device))
    finally:
        encoder.train(training)
    parts = [tokens.avg] if tokens.cls is None else [tokens.cls, tokens.avg]
    return Fingerprint(size, tuple(torch.cat(parts, dim=1)[0].float().tolist()))


def difference(expected: Fingerprint, actual: Fingerprint, *, slack: float = 1.0) -> str | None:
    """None when the two agree within the tolerances (times `slack`), otherwise how far they are apart, in words."""
    if len(expected.values) != len(actual.values) or expected.size != actual.size:
        return f"{len(actual.values)} values instead of {len(expected.values)}"
    a = torch.tensor(expected.values, dtype=torch.float64)
    b = torch.tensor(actual.values, dtype=torch.float64)
    norms = float(a.norm() * b.norm())
    cosine = float(a @ b) / norms if norms else 1.0
    deviation = float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))
    # Written so that a NaN fails.
    if 1 - cosine <= slack * (1 - MIN_COSINE) and deviation <= slack * MAX_DEVIATION:
        return None
    return f"cosine {cosine:.6f}, largest deviation {deviation:.2g} of the largest value" + (
        " (not finite)" if not math.isfinite(cosine + deviation) else ""
    )
