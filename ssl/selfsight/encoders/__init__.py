"""Vision Transformers seen as tokens: images in, named tokens out, at any size and with any patches left out."""

from selfsight.encoders.build import build, model_args
from selfsight.encoders.encoder import Encoder, Tokens
from selfsight.encoders.frozen import Frozen, read_checkpoint_encoder, read_frozen
from selfsight.encoders.heads import MLP, BatchNorm, DINOHead
from selfsight.encoders.positions import resize_patches
from selfsight.encoders.statistics import feature_spread, rankme

__all__ = [
    "MLP",
    "BatchNorm",
    "DINOHead",
    "Encoder",
    "Frozen",
    "Tokens",
    "build",
    "feature_spread",
    "model_args",
    "rankme",
    "read_checkpoint_encoder",
    "read_frozen",
    "resize_patches",
]
