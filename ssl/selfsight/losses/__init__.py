"""What several objectives share: losses and targets, as functions of tensors and of the other ranks (a Collective)."""

from selfsight.losses.center import Center
from selfsight.losses.features import spatial_loss, summary_loss
from selfsight.losses.gram import gram_loss
from selfsight.losses.ibot import ibot_loss
from selfsight.losses.koleo import koleo
from selfsight.losses.sinkhorn import sinkhorn_knopp
from selfsight.losses.usage import PrototypeUse

__all__ = [
    "Center",
    "PrototypeUse",
    "gram_loss",
    "ibot_loss",
    "koleo",
    "sinkhorn_knopp",
    "spatial_loss",
    "summary_loss",
]
