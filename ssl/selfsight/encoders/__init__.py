"""Vision Transformers seen as tokens: images in, named tokens out, at any size and with any patches left out."""

from selfsight.encoders.build import build, model_args
from selfsight.encoders.encoder import Encoder, Tokens
from selfsight.encoders.heads import MLP, BatchNorm, DINOHead
from selfsight.encoders.statistics import feature_spread, rankme

__all__ = ["MLP", "BatchNorm", "DINOHead", "Encoder", "Tokens", "build", "feature_spread", "model_args", "rankme"]
