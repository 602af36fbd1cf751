"""`pretrain`: a recipe in, a run folder out. The one loop: batch, step, log, checkpoint, and stopping in good order.

The same call on one process or many, started the first time or again: it continues from the newest complete checkpoint,
and what it writes is what it would have written had it never stopped.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfsight import objectives
from selfsight.console import progress as progress_bar
from selfsight.console import say
from selfsight.encoders import feature_spread, rankme
from selfsight.errors import UserError
from selfsight.files import publish
from selfsight.objectives import Objective, Progress
from selfsight.recipe import Recipe
from selfsight.stream.loader import StepLoader, to_device
from selfsight.stream.views import Views
from selfsight.training import checkpoint, cluster, resolve
from selfsight.training.account import Account
from selfsight.training.cluster import Cluster
from selfsight.training.engine import Engine, Step
from selfsight.training.feed import names_images, open_feed
from selfsight.training.interrupts import Interrupts
from selfsight.training.log import Log
from selfsight.training.monitor import Monitor
from selfsight.weights.checkpoint import export_run
from selfsight.weights.export import export_encoder
from selfsight.weights.run import exports, read_state, recipe_digest

NOT_FINITE_LIMIT = 10  # steps refused in a row before the run ends


class Diverged(RuntimeError):
    """The loss has not been finite for `NOT_FINITE_LIMIT` steps in a row. The message is one sentence."""


class Stopped(KeyboardInterrupt):
    """A signal asked for an end; a checkpoint was written. The message is one sentence."""


def pretrain(recipe: Recipe) -> Path:
    """Trains, or continues, or finds finished, the run that `recipe` describes. Returns the run's folder.

    Raises UserError for what the user can mend, Stopped after a signal and its checkpoint, Diverged when it has to end.
    """
    recipe = copy.deepcopy(recipe)
    resolve.check(recipe)
    if not names_images(recipe) or not recipe.output:
        raise UserError("training needs a corpus and an output: add corpus=DIR output=RUN")
    joined = cluster.join()
    # Together: nobody looks into the run folder any more when rank 0 begins to write there.
    return joined.together(lambda: _Run(recipe, joined)).go()


class _Run:
    """One call of `pretrain`: what it holds between its steps."""

    def __init__(self, recipe: Recipe, cluster: Cluster) -> None:
        self.recipe, self.cluster = recipe, cluster
        self.feed = open_feed(recipe)
        self.path = Path(str(recipe.output))
        self._settle(self.feed.chunks)
        torch.manual_seed(recipe.seed)
        self.objective = self._build()
        self.steps_per_epoch = self.feed.n // recipe.batch_size
        self.total_steps = max(1, round(recipe.epochs * self.steps_per_epoch))
        self.checkpoint = checkpoint.newest(self.path)
        self.start, delivered = 0, []
        if self.checkpoint:
            state = read_state(self.checkpoint)
            checkpoint.check(self.checkpoint, state, self._state(0))
            self.start, delivered = state["step"], state["delivered"]
        views = Views(self.objective.views(), seed=recipe.seed)
        self.loader = self.feed.loader(
            views, run=self.path, cluster=cluster, start_step=self.start, total_steps=self.total_steps
        )
        # Of shards without an index there is nothing that an account could be held against.
        self.account = None
        if isinstance(self.loader, StepLoader):
            self.account = Account(self.loader, cluster, self.start, delivered)

    def _settle(self, chunks: int | None) -> None:
        """Gives null keys their values and holds the recipe against the one that the run folder was begun with."""
        begun = self.path / "recipe.yaml"
        if begun.is_file():
            resolve.adopt(self.recipe, begun)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path} exists and is no run: give another output, or an empty folder")
        resolve.settle(self.recipe, chunks=chunks, sharing=self.cluster.sharing)
        if begun.is_file():
            resolve.compare(self.recipe, begun)

    def _build(self) -> Objective:
        kind = objectives.find(self.recipe.objective_name)
        config = kind.Config(**{k: v for k, v in self.recipe.objective.items() if k != "name"})
        return kind(config, self.recipe.encoder, self.cluster.collective())

    def _state(self, step: int) -> dict[str, Any]:
        """state.json of a checkpoint at `step`."""
        recipe = self.recipe
        interpolation = self.objective.get_submodule("student").pos_interpolation
        return {
            "step": step,
            "total_steps": self.total_steps,
            "seed": recipe.seed,
            "corpus_id": self.feed.id,
            "batch_size": recipe.batch_size,
            "lanes": recipe.stream.lanes,
            "window": recipe.stream.window,
            "world_size": self.cluster.world_size,
            "zero": recipe.training.zero,
            "objective": recipe.objective_name,
            "encoder": {**asdict(recipe.encoder), "pos_interpolation": interpolation},
        }

    def go(self) -> Path:
        self.cluster.on_first(self._open)
        if self.start >= self.total_steps:
            self.cluster.on_first(self._finish)
            if self.cluster.rank == 0:
                say(f"{self.path} is finished: {self.total_steps} steps are done, its weights are in exports/")
            return self.path
        engine = Engine(self.objective, self.recipe, self.cluster)
        if self.checkpoint:
            checkpoint.load(self.checkpoint, engine)
        self.cluster.on_first(lambda: self._export(self.start))
        if self.cluster.rank == 0:
            self._announce()
        log = Log(self.path, self.start) if self.cluster.rank == 0 else None
        try:
            with Interrupts() as interrupts:
                self._loop(engine, interrupts, log)
        finally:
            if log:
                log.close()
        return self.path

    def _open(self) -> None:
        """Makes the run folder and writes down the resolved recipe."""
        self.path.mkdir(parents=True, exist_ok=True)
        checkpoint.sweep(self.path)
        with publish(self.path / "recipe.yaml") as file:
            file.write(self.recipe.to_yaml().encode())

    def _finish(self) -> None:
        """Makes the last export, should the run have been killed between its last checkpoint and that."""
        if self.start not in exports(self.path):
            export_run(self.path, self._export_path(self.start), step=self.start)

    def _announce(self) -> None:
        recipe, ranks = self.recipe, self.cluster.world_size
        one, several = ("GPU", "GPUs") if self.cluster.device.type == "cuda" else ("CPU process", "CPU processes")
        begin = f"continues from step {self.start}" if self.start else "starts"
        say(
            f"{self.path} {begin}: {recipe.objective_name} with {recipe.encoder.name} on {self.feed.n} images, "
            f"{self.total_steps} steps of {recipe.batch_size}, {ranks} {several if ranks > 1 else one}, "
            f"ZeRO-{recipe.training.zero}, {recipe.training.precision}"
        )

    def _loop(self, engine: Engine, interrupts: Interrupts, log: Log | None) -> None:
        recipe, training = self.recipe, self.recipe.training
        monitor = Monitor(
            self.objective.collapse_loss(),
            warmup_steps=int(recipe.optimizer.warmup_epochs * self.steps_per_epoch),
            teacher=bool(self.objective.teacher_pairs()),
        )
        for record in log.records if log else ():
            monitor.look(record)  # what it would have seen, had the run never stopped
        refused = 0
        meter = _Meter()
        first = self.cluster.rank == 0
        bar = progress_bar("pretrain", self.total_steps, self.start) if first else nullcontext()
        with bar as shown:
            for step, batches in enumerate(meter.waiting(iter(self.loader)), self.start):
                done = step + 1
                torch.manual_seed(step_seed(recipe.seed, step, self.cluster.rank))
                result = engine.step(
                    [to_device(batch, self.cluster.device, self.loader.views.spec) for batch in batches],
                    Progress(step, self.steps_per_epoch, self.total_steps),
                    asked_to_stop=interrupts.asked_to_stop,
                )
                meter.images += recipe.batch_size
                refused = 0 if result.taken else refused + 1
                if refused:
                    self._tell(log, done, not_finite(result, done, engine))
                if done % training.log_every == 0 or done in (1, self.total_steps):
                    values = self._values(result, done, meter)
                    if log:
                        log.record(done, values)
                        for sentence in monitor.look({"step": done, **values}):
                            self._tell(log, done, sentence)
                    self._count(log, done)
                if refused == NOT_FINITE_LIMIT:
                    raise Diverged(
                        f"training ended at step {done}: {refused} steps in a row were not finite; try a smaller "
                        "optimizer.base_lr, a longer warm-up, optimizer.clip or training.precision=fp32"
                    )
                if done % training.checkpoint_every == 0 or done == self.total_steps or result.stop:
                    self._count(log, done)  # who goes on from here will not ask again what is over
                    self._save(engine, done, log)
                if shown:
                    shown.advance(loss=f"{result.loss:.4f}", lr=f"{result.lr:.2e}")
                if result.stop and done < self.total_steps:
                    raise Stopped(
                        f"stopped at step {done} of {self.total_steps} on {interrupts.received or 'another rank'}; "
                        "a checkpoint is written: give the same command again to continue"
                    )

    def _values(self, result: Step, done: int, meter: "_Meter") -> dict[str, float]:
        """The numbers of a logged step. All ranks call it."""
        metrics: dict[str, float] = {}
        if result.metrics:
            mean = self.cluster.sum(torch.stack(list(result.metrics.values()))) / self.cluster.world_size
            metrics = dict(zip(result.metrics, mean.tolist(), strict=True))
        features = self.cluster.gather_rows(result.features.float())
        finite = bool(features.isfinite().all())
        rate, waited = meter.read()
        return {
            "epoch": done / self.steps_per_epoch,
            "loss": result.loss,
            "lr": result.lr,
            "weight_decay": result.weight_decay,
            "momentum": result.momentum,
            "grad_norm": result.grad_norm,
            "images_per_second": rate,
            "data_wait": waited,
            "feature_spread": feature_spread(features).item() if finite else float("nan"),
            "rankme": rankme(features).item() if finite else float("nan"),
            **metrics,
        }

    def _count(self, log: Log | None, done: int) -> None:
        """Says of every epoch that ended whether all of it was delivered, and of images that had to be replaced. All
        ranks call it."""
        for alarming, sentence in self.account.look(done) if self.account else ():
            if alarming:
                self._tell(log, done, sentence)
            elif log:
                log.note(done, sentence)

    def _tell(self, log: Log | None, step: int, sentence: str) -> None:
        if log:
            log.event(step, sentence)
            say(f"ALARM {sentence}")

    def _save(self, engine: Engine, step: int, log: Log | None) -> None:
        if log:
            log.flush()
        state = {**self._state(step), "delivered": self.account.open(step) if self.account else []}
        checkpoint.save(self.path, engine, state, keep=self.recipe.training.keep)
        self.cluster.on_first(lambda: self._export(step))

    def _export(self, step: int) -> None:
        """exports/step_…: the teacher if there is one, else the student."""
        if step in exports(self.path):
            return
        which = "teacher" if self.objective.teacher_pairs() else "student"
        meta = {
            "which": which,
            "objective": self.recipe.objective_name,
            "step": step,
            "corpus_id": self.feed.id,
            "recipe_digest": recipe_digest(self.recipe.to_dict()),
        }
        encoder: Any = self.objective.get_submodule(which)
        with torch.random.fork_rng(devices=[]):
            export_encoder(encoder, self.recipe.encoder, self._export_path(step), meta=meta)

    def _export_path(self, step: int) -> Path:
        return self.path / "exports" / f"step_{step:08d}"


class _Meter:
    """Images per second, and the share of the time that training waited for them, since the last reading."""

    def __init__(self) -> None:
        self.images, self._waited, self._since = 0, 0.0, time.monotonic()

    def waiting(self, batches: Iterator) -> Iterator:
        while True:
            began = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.monotonic() - began
            yield batch

    def read(self) -> tuple[float, float]:
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-9)
        values = self.images / elapsed, self._waited / elapsed
        self.images, self._waited, self._since = 0, 0.0, now
        return values


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
