"""Dead prototypes: the share that no image of a window of steps was put on.

A window is as many steps as make `ROWS` times as many choices as there are prototypes, counted from step 0 and rounded
up to steps that are logged; an even use leaves e^−4 = 2 % of them out by chance. The first window of a run that goes on
in the middle of one is not told.
"""

import math

from selfsight.objectives import Objective
from selfsight.training.cluster import Cluster

ROWS = 4


class PrototypeWatch:
    def __init__(self, objective: Objective, cluster: Cluster, log_every: int) -> None:
        self.counts, self.cluster, self.log_every = objective.prototype_counts(), cluster, log_every
        self.steps, self.window = 0, 0
        if self.counts is not None:
            self.counts.zero_()

    def look(self, done: int) -> dict[str, float]:
        """ "dead_prototypes", from 0 to 1, if a window ends with step `done`. All ranks call it at logged steps, after
        they have counted `steps`."""
        if self.counts is None:
            return {}
        if not self.window:
            choices = self.cluster.sum(self.counts.sum()).item() / self.steps
            if not choices:  # an objective that does without its prototypes this time
                return {}
            self.window = math.ceil(ROWS * len(self.counts) / choices / self.log_every) * self.log_every
        if done % self.window:
            return {}
        whole, self.steps = self.steps == self.window, 0
        dead = (self.cluster.sum(self.counts.clone()) == 0).float().mean().item()
        self.counts.zero_()
        return {"dead_prototypes": dead} if whole else {}
