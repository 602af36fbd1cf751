"""When an encoder is measured while it trains: every so many steps, or as often as 2 % of the time allow.

In: a probe, a function of an encoder that gives numbers. Training goes on as if it had not been called: the encoder's
mode is restored, no generator has moved, and nothing is kept that autograd could meet.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from selfsight.encoders import Encoder
from selfsight.training.cluster import Cluster

# Called by all ranks together, gives the same numbers to each of them, by their names in the log.
Probe = Callable[[Encoder, Cluster], dict[str, float]]
SHARE = 0.02  # of the time, where the recipe names no interval
FIRST = 20  # steps before the first probe then: by then it is known how long a step takes


class Probing:
    """Probes `encoder` after every `every` steps, or as `SHARE` allows, and after the last one."""

    def __init__(
        self,
        probe: Probe,
        encoder: Encoder,
        cluster: Cluster,
        *,
        every: int | None,
        bf16: bool,
        start: int,
        total_steps: int,
    ) -> None:
        self.probe, self.encoder, self.cluster, self.bf16 = probe, encoder, cluster, bf16
        self.every, self.start, self.total_steps = every, start, total_steps
        self._next = start + FIRST if every is None else (start // every + 1) * every
        self._began, self._spent = time.monotonic(), 0.0

    def look(self, done: int) -> dict[str, float]:
        """The probe's numbers, its seconds and its share of the time so far; nothing where it is not its turn. All
        ranks call it after each step."""
        if done < self._next and done != self.total_steps:
            return {}
        self._synchronise()  # what training has under way is not the probe's
        began = time.monotonic()
        autocast = torch.autocast(self.cluster.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        with torch.random.fork_rng(), evaluated(self.encoder), torch.no_grad(), autocast:
            values = self.probe(self.encoder, self.cluster)
        self._synchronise()
        cost, elapsed = time.monotonic() - began, time.monotonic() - self._began
        self._spent += cost
        self._next = self.cluster.on_first(lambda: self._after(done, cost, elapsed))
        return {**values, "probe_seconds": cost, "probe_share": self._spent / elapsed}

    def _after(self, done: int, cost: float, elapsed: float) -> int:
        """The step of the next probe, so that the share of all of them is no more than `SHARE` when it ends."""
        if self.every is not None:
            return (done // self.every + 1) * self.every
        step = (elapsed - self._spent) / (done - self.start)
        wait = (self._spent + cost) / SHARE - elapsed - cost
        return done + max(1, math.ceil(wait / max(step, 1e-9)))

    def _synchronise(self) -> None:
        if self.cluster.device.type == "cuda":
            torch.cuda.synchronize(self.cluster.device)


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode, and each part of it afterwards as it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
