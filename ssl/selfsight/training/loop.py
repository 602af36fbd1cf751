"""The one loop: batch, step, log, alarms, and a checkpoint where one is due.

In: an engine that stands at a step, and the loader that goes on from there. Out: the log's lines; `save` is called for
every checkpoint. All ranks go through the same steps and do the same at each. The stream may be ahead of the steps, by
the batches that were passed over when training returned to a checkpoint.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import numpy as np
import torch

from selfsight.console import progress as progress_bar
from selfsight.console import say
from selfsight.encoders import feature_spread, rankme
from selfsight.objectives import Progress
from selfsight.stream.foreign import ForeignLoader
from selfsight.stream.loader import StepLoader, to_device
from selfsight.training.account import Account
from selfsight.training.engine import Engine, Step
from selfsight.training.interrupts import Interrupts
from selfsight.training.log import Log
from selfsight.training.monitor import PATIENCE, Monitor
from selfsight.training.noise import NoiseScale
from selfsight.training.probing import Probing
from selfsight.training.refused import FILE as LIST
from selfsight.training.refused import Refused
from selfsight.training.usage import PrototypeWatch


class Trouble(Exception):
    """Training should not go on from here, but from the last good checkpoint and past the batches since. The message
    is a clause that says why."""

    def __init__(self, step: int, why: str) -> None:
        super().__init__(why)
        self.step = step


class Stopped(KeyboardInterrupt):
    """A signal asked for an end; a checkpoint was written. The message is one sentence."""


class Loop:
    """The steps `start` … `total_steps` − 1 of a run. `log` is None on every rank but the first."""

    def __init__(
        self,
        engine: Engine,
        loader: StepLoader | ForeignLoader,
        *,
        account: Account | None,
        log: Log | None,
        refused: Refused,
        probing: Probing | None,
        start: int,
        total_steps: int,
        steps_per_epoch: int,
        save: Callable[[int], None],
    ) -> None:
        self.engine, self.loader, self.account, self.log, self.save = engine, loader, account, log, save
        self.recipe, self.cluster, self.refused, self.probing = engine.recipe, engine.cluster, refused, probing
        self.start, self.total_steps, self.steps_per_epoch = start, total_steps, steps_per_epoch
        self.ahead = loader.start_step - start  # batches of the stream that no step was made of
        self.monitor = Monitor(
            engine.objective.collapse_values(),
            warmup_steps=int(self.recipe.optimizer.warmup_epochs * steps_per_epoch),
        )
        self.noise_scale = NoiseScale()
        for record in log.records if log else ():
            self.monitor.look(record)  # what it would have seen, had the run never stopped
            self.noise_scale.look(record)
        self.meter = Meter()
        self.prototypes = PrototypeWatch(engine.objective, engine.cluster, self.recipe.training.log_every)

    def run(self, interrupts: Interrupts) -> None:
        """Raises Stopped once `interrupts` asked any rank to stop, and Trouble."""
        training, refused, spiking, due = self.recipe.training, 0, 0, False
        first = self.cluster.rank == 0
        bar = progress_bar("pretrain", self.total_steps, self.start) if first else nullcontext()
        with bar as shown:
            for step, batches in enumerate(self.meter.waiting(iter(self.loader)), self.start):
                done = step + 1
                logged = done % training.log_every == 0 or done in (1, self.total_steps)
                torch.manual_seed(step_seed(self.recipe.seed, step + self.ahead, self.cluster.rank))
                result = self.engine.step(
                    [to_device(batch, self.cluster.device, self.loader.views.spec) for batch in batches],
                    Progress(step, self.steps_per_epoch, self.total_steps),
                    asked_to_stop=interrupts.asked_to_stop,
                    measure=logged,
                )
                self.meter.images += self.recipe.batch_size
                self.prototypes.steps += 1
                refused = 0 if result.taken else refused + 1
                if refused:
                    self.tell(done, f"{not_finite(result, done, self.engine)}; {LIST} names its images")
                    self.refused.add(done, done + self.ahead, batches, result.losses)
                if logged:
                    self._record(result, done)
                    self._count(done)
                    if training.return_on_spike:
                        spiking = self.cluster.on_first(lambda: self.monitor.spiking)
                if self.probing and (measured := self.probing.look(done)) and self.log:
                    self.log.measure(done, measured)
                if refused == training.patience:
                    raise Trouble(done, f"{refused} steps in a row were not finite")
                if spiking == PATIENCE:
                    raise Trouble(done, "the loss stays far above what it was")
                # None while steps are refused: the weights that make a loss of NaN are not those to return to.
                due |= done % training.checkpoint_every == 0 or result.stop
                if (due and not refused and not spiking) or done == self.total_steps:
                    self._count(done)  # who goes on from here will not ask again what is over
                    self.save(done)
                    due = False
                if shown:
                    rate, memory = f"{self.meter.rate:,.0f}", f"{self.meter.memory:.1f} GiB"
                    shown.advance(loss=f"{result.loss:.4f}", **{"images/s": rate}, memory=memory)
                if result.stop and done < self.total_steps:
                    kept = "its loss is out of bounds, so no" if refused or spiking else "a"
                    raise Stopped(
                        f"stopped at step {done} of {self.total_steps} on {interrupts.received or 'another rank'}; "
                        f"{kept} checkpoint is written: give the same command again to continue"
                    )

    def _record(self, result: Step, done: int) -> None:
        """Logs the numbers of a step, and what they alarm to. All ranks call it."""
        values = self._values(result, done) | self.prototypes.look(done)
        if self.log:
            values["noise_scale"] = self.noise_scale.look(values)
            self.log.record(done, values)
            for sentence in self.monitor.look({"step": done, **values}):
                self.tell(done, sentence)

    def _values(self, result: Step, done: int) -> dict[str, float]:
        """The numbers of a logged step. All ranks call it."""
        metrics: dict[str, float] = {}
        if result.metrics:
            mean = self.cluster.sum(torch.stack(list(result.metrics.values()))) / self.cluster.world_size
            metrics = dict(zip(result.metrics, mean.tolist(), strict=True))
        features = self.cluster.gather_rows(result.features.float())
        finite = bool(features.isfinite().all())
        rate, waited = self.meter.read(self.cluster.device)
        return {
            "epoch": done / self.steps_per_epoch,
            "loss": result.loss,
            "lr": result.lr,
            "weight_decay": result.weight_decay,
            "momentum": result.momentum,
            "grad_norm": result.grad_norm,
            "grad_signal": result.grad_signal,
            "grad_noise": result.grad_noise,
            "images_per_second": rate,
            "data_wait": waited,
            "peak_memory": self.meter.memory,
            "feature_spread": feature_spread(features).item() if finite else float("nan"),
            "rankme": rankme(features).item() if finite else float("nan"),
            **metrics,
        }

    def _count(self, done: int) -> None:
        """Says of every epoch that ended whether all of it was delivered, and of images that had to be replaced. All
        ranks call it."""
        for alarming, sentence in self.account.look(done + self.ahead) if self.account else ():
            if alarming:
                self.tell(done, sentence)
            elif self.log:
                self.log.note(done, sentence)

    def tell(self, step: int, sentence: str) -> None:
        """An event that someone should look at."""
        if self.log:
            self.log.event(step, sentence)
            say(f"ALARM {sentence}")


class Meter:
    """Images per second, and the share of the time that training waited for them, since the last reading; and memory,
    which is too dear to be asked for at every step."""

    def __init__(self) -> None:
        self.images, self._waited, self._since = 0, 0.0, time.monotonic()
        self.rate, self.memory = 0.0, 0.0  # images per second and GiB at the last reading

    def waiting(self, batches: Iterator) -> Iterator:
        while True:
            began = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.monotonic() - began
            yield batch

    def read(self, device: torch.device) -> tuple[float, float]:
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-9)
        self.rate, waited = self.images / elapsed, self._waited / elapsed
        self.images, self._waited, self._since = 0, 0.0, now
        self.memory = peak_memory(device)
        return self.rate, waited


def peak_memory(device: torch.device) -> float:
    """GiB that this process has taken at most: of its GPU, as torch counts it, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of torch's generators for one step on one rank: no generator's state need be kept."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)


def not_finite(result: Step, step: int, engine: Engine) -> str:
    """What was not finite at a refused step, in words."""
    if not np.isfinite(result.loss):
        return f"step {step}: the loss is {result.loss}; the step was not taken"
    group = next(i for i, n in enumerate(result.grad_norms) if not np.isfinite(n))
    name = engine.optimizer.param_groups[group]["names"][0]
    return f"step {step}: a gradient is not finite ({name} or its group); the step was not taken"
