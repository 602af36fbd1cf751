"""Weights → an encoder ready for use. Loading is all or nothing: every name, shape and digest, then the fingerprint.

encoder = selfsight.load_pretrained("run/exports/step_00010000")
tokens = encoder(encoder.preprocess(image).unsqueeze(0))  # .cls, .patches, .registers, .avg
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfsight import encoders
from selfsight.encoders import Encoder, Tokens
from selfsight.errors import UserError
from selfsight.files import sha256_of
from selfsight.weights import fingerprint
from selfsight.weights.folder import WEIGHTS, Export, read_tensors
from selfsight.weights.preprocess import EvalTransform
from selfsight.weights.run import is_run, newest_export


class PretrainedEncoder(nn.Module):
    """An encoder with its weights, its preprocessing and where they came from. In evaluation mode; gradients flow."""

    def __init__(self, encoder: Encoder, export: Export) -> None:
        super().__init__()
        self.encoder = encoder
        self.preprocess = EvalTransform(export.origin["preprocess"])
        self.path = export.path
        self.digest = export.digest  # sha256 of model.safetensors
        self.info: dict[str, Any] = {"config": export.config, **export.origin}
        self.embed_dim = encoder.embed_dim
        self.patch_size = encoder.patch_size
        self.img_size = export.encoder.img_size
        self.eval()

    def forward(self, images: Tensor) -> Tokens:
        """`images`: (B, 3, H, W) float32 from `preprocess`, any H and W that the patch size divides."""
        return self.encoder(images)

    def intermediate(self, images: Tensor, n: int = 1, norm: bool = True) -> list[Tokens]:
        """Tokens of the last `n` blocks, oldest first, after the final norm unless `norm` is False."""
        return self.encoder.intermediate(images, n=n, norm=norm)

    def last_attention(self, images: Tensor) -> Tensor:
        """(B, heads, T, T): the attention of the last block, over prefix tokens and patches."""
        return self.encoder.last_attention(images)


def load_pretrained(path: str | Path, *, device: str | torch.device = "cpu") -> PretrainedEncoder:
    """The encoder in `path`: an export folder, or a run, of which the newest export is taken.

    Raises UserError when the folder is no export, when a tensor is missing, left over or of another shape, when the
    file is not the one that was exported, and when the fingerprint is not reproduced.
    """
    path = Path(path)
    if is_run(path):
        path = newest_export(path)
    export = Export.open(path)
    encoder = read_encoder(export)
    if (actual := sha256_of(path / WEIGHTS)) != export.digest:
        raise UserError(
            f"{path / WEIGHTS} is not the file that was exported (sha256 {actual[:12]}…, recorded "
            f"{export.digest[:12]}…): copy it again"
        )
    expected = fingerprint.Fingerprint.from_json(export.origin["fingerprint"])
    if apart := fingerprint.difference(expected, fingerprint.take(encoder, expected.size)):
        raise UserError(
            f"the encoder built from {path} does not reproduce its fingerprint ({apart}): config.json does not "
            "describe these weights, or a library computes differently; export them again"
        )
    return PretrainedEncoder(encoder, export).to(device)


def read_encoder(export: Export) -> Encoder:
    """The encoder an export describes, on the CPU in evaluation mode, its tensors checked but not its fingerprint."""
    # Building draws initial weights; the caller's random state is none of their business.
    with torch.random.fork_rng(devices=[]):
        encoder = encoders.build(export.encoder, drop_path=False, pos_interpolation=export.origin["pos_interpolation"])
    encoder.vit.load_state_dict(read_tensors(export.path / WEIGHTS, encoder.vit.state_dict()), strict=True)
    return encoder.eval()
