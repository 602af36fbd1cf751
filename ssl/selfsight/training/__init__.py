"""Recipe in, checkpoints and exports out: the DeepSpeed engine, the loop, schedules, teacher, monitors and stopping.

This package owns every side effect of a run. `pretrain` is the one call; everything else is its parts.
"""

from selfsight.training.cluster import AgreedError
from selfsight.training.loop import Stopped
from selfsight.training.run import Diverged, pretrain

__all__ = ["AgreedError", "Diverged", "Stopped", "pretrain"]
