"""`pretrain`: a recipe in, a run folder out. Opening it, settling what is to be settled, checkpoints, exports.

The same call on one process or many, started the first time or again: it continues from the newest complete checkpoint,
and what it writes is what it would have written had it never stopped.
"""

import copy
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from selfsight import objectives
from selfsight.console import say
from selfsight.errors import UserError
from selfsight.files import publish
from selfsight.objectives import Objective
from selfsight.recipe import Recipe
from selfsight.stream.loader import StepLoader
from selfsight.stream.views import Views
from selfsight.training import checkpoint, cluster, resolve, trackers
from selfsight.training.account import Account
from selfsight.training.cluster import Cluster
from selfsight.training.engine import Engine
from selfsight.training.feed import names_images, open_feed
from selfsight.training.inherit import inherit, read_source
from selfsight.training.interrupts import Interrupts
from selfsight.training.log import Log
from selfsight.training.loop import Loop, Trouble
from selfsight.training.probing import Probe, Probing
from selfsight.training.refused import Refused
from selfsight.training.saver import Saver
from selfsight.weights.checkpoint import export_run
from selfsight.weights.run import exports, read_state


class Diverged(RuntimeError):
    """Training came to nothing, from the same checkpoint several times. The message is one sentence."""


def pretrain(recipe: Recipe, *, probes: Callable[[Recipe], Probe | None] = lambda _: None) -> Path:
    """Trains, or continues, or finds finished, the run that `recipe` describes. Returns the run's folder.

    `probes` makes what measures the encoder while it trains, of the recipe's section `probe`:
    `eval_probes.online.open_probes`.

    Raises UserError for what the user can mend, Stopped after a signal and its checkpoint, Diverged when it has to end.
    """
    recipe = copy.deepcopy(recipe)
    resolve.check(recipe)
    if not names_images(recipe) or not recipe.output:
        raise UserError("training needs a corpus and an output: add corpus=DIR output=RUN")
    joined = cluster.join()
    memory = joined.memory()
    # Together: nobody looks into the run folder any more when rank 0 begins to write there.
    return joined.together(lambda: _Run(recipe, joined, probes(recipe), memory)).go()


class _Run:
    """One call of `pretrain`: what it holds between its steps."""

    def __init__(self, recipe: Recipe, cluster: Cluster, probe: Probe | None, memory: int | None) -> None:
        self.recipe, self.cluster, self.probe = recipe, cluster, probe
        if recipe.probe.corpus and not probe:
            raise UserError("probe.corpus wants probes: give pretrain probes=eval_probes.online.open_probes")
        self.feed = open_feed(recipe)
        self.path = Path(str(recipe.output))
        self._settle(memory)
        torch.manual_seed(recipe.seed)
        self.objective = self._build()
        self.steps_per_epoch = self.feed.n // recipe.batch_size
        self.total_steps = max(1, round(recipe.epochs * self.steps_per_epoch))
        self.returns: Counter[int] = Counter()  # to the checkpoint of a step
        self.views = Views(self.objective.views(), seed=recipe.seed)
        newest = checkpoint.newest(self.path)
        self._take_up(newest)
        # A checkpoint has inherited already.
        self.inherited = None if newest else self._inherit()

    def _take_up(self, path: Path | None, position: int | None = None) -> None:
        """Goes on from the checkpoint at `path`, or from the beginning; the stream from where it was then, or from
        `position`: what is passed over is read by nobody again."""
        state: dict[str, Any] = {"step": 0}
        if path:
            state = read_state(path)
            checkpoint.check(path, state, self._state(0))
        self.checkpoint, self.start, self.metrics = path, state["step"], state.get("metrics", {})
        before = self.start + state.get("skipped", 0)
        go_on = before if position is None else position
        self.skipped = go_on - self.start
        self.loader = self.feed.loader(
            self.views,
            run=self.path,
            cluster=self.cluster,
            start_step=go_on,
            total_steps=self.total_steps + self.skipped,
        )
        # Of shards without an index there is nothing that an account could be held against.
        self.account = None
        if isinstance(self.loader, StepLoader):
            self.account = Account(self.loader, self.cluster, before, state)

    def _settle(self, memory: int | None) -> None:
        """Settles what says "auto" and holds the recipe against the one that the run folder was begun with."""
        begun = self.path / "recipe.yaml"
        if begun.is_file():
            resolve.adopt(self.recipe, begun)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path} exists and is no run: give another output, or an empty folder")
        resolve.settle(
            self.recipe,
            chunks=self.feed.chunks,
            images=self.feed.n,
            sharing=self.cluster.sharing,
            ranks=self.cluster.world_size,
            memory=memory,
        )
        if begun.is_file():
            resolve.compare(self.recipe, begun)

    def _build(self) -> Objective:
        kind = objectives.find(self.recipe.objective_name)
        config = kind.Config(**{k: v for k, v in self.recipe.objective.items() if k != "name"})
        return kind(config, self.recipe.encoder, self.cluster.collective())

    def _inherit(self) -> str | None:
        """Starts from the weights that the recipe names, if it names any, and notes their digest."""
        if self.recipe.weights is None:
            if self.recipe.weights_sha256:
                raise UserError("weights_sha256 says what this run starts from, and not where it is: add weights=DIR")
            return None
        source = read_source(self.recipe.weights)
        if self.recipe.weights_sha256 is None:
            self.recipe.set("weights_sha256", source.digest, f"sha256 of {source.path}")
        elif self.recipe.weights_sha256 != source.digest:
            raise UserError(
                f"{source.path} has other weights (sha256 {source.digest[:12]}…) than weights_sha256 says "
                f"({self.recipe.weights_sha256[:12]}…): give another folder, or another output"
            )
        return inherit(self.objective, source)

    def _state(self, step: int) -> dict[str, Any]:
        """state.json of a checkpoint at `step`."""
        recipe = self.recipe
        interpolation = self.objective.get_submodule("student").pos_interpolation
        encoder = {key: value for key, value in asdict(recipe.encoder).items() if key != "compile"}  # how, not what
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
            "encoder": {**encoder, "pos_interpolation": interpolation},
        }

    def go(self) -> Path:
        self.cluster.on_first(self._open)
        if self.start >= self.total_steps:
            self.cluster.on_first(lambda: self._export(self.start))  # the run may have been killed just before it
            if self.cluster.rank == 0:
                say(f"{self.path} is finished: {self.total_steps} steps are done, its weights are in exports/")
            return self.path
        engine = Engine(self.objective, self.recipe, self.cluster)
        if self.cluster.rank == 0:
            self._announce()
        with (
            Interrupts() as interrupts,
            Saver(self.path, engine, failed=interrupts.ask, published=self._export_anew) as saver,
        ):
            trouble = self._train(engine, interrupts, saver)
            while trouble:
                trouble = self._train(engine, interrupts, saver, self._return(trouble))
        return self.path

    def _train(self, engine: Engine, interrupts: Interrupts, saver: Saver, news: str = "") -> Trouble | None:
        """From the checkpoint taken up to the end, or to where training has to return to one."""
        if self.checkpoint:
            checkpoint.load(self.checkpoint, engine)
        log = None
        if self.cluster.rank == 0:
            wanted = trackers.wanted(self.recipe.log, self.path, self.recipe.to_dict())
            log = Log(self.path, self.start, wanted)
        loop = Loop(
            engine,
            self.loader,
            account=self.account,
            log=log,
            refused=Refused(self.path, self.loader, self.cluster),
            probing=self._probing(),
            start=self.start,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            save=lambda step: self._save(saver, step, log),
        )
        try:
            if news:
                loop.tell(self.start + 1, news)  # of the step that comes next: a resumed run finds it out by itself
            if self.checkpoint:
                self.cluster.on_first(lambda: self._export(self.start))
            else:
                self._save(saver, 0, log)  # to return to
                saver.wait()  # a disk that is full is found before the first step
            loop.run(interrupts)
        except Trouble as trouble:
            saver.wait()
            return trouble.with_traceback(None)  # whose frames would keep the loader and its batches
        finally:
            if log:
                log.close()
        return None

    def _probing(self) -> Probing | None:
        if self.probe is None:
            return None
        which = "teacher" if self.objective.teacher_pairs() else "student"  # as exports are made
        encoder: Any = self.objective.get_submodule(which)
        return Probing(
            self.probe,
            encoder,
            self.cluster,
            every=self.recipe.probe.every,
            bf16=self.recipe.training.precision == "bf16",
            start=self.start,
            total_steps=self.total_steps,
        )

    def _return(self, trouble: Trouble) -> str:
        """Takes up the last good checkpoint, and the stream after the batches that were seen since. Says so. Raises
        Diverged when that did not help before."""
        good = self.cluster.on_first(lambda: checkpoint.newest(self.path))
        assert good is not None  # there is one of step 0
        limit, position = self.recipe.training.returns, trouble.step + self.skipped
        self._take_up(good, position)
        self.returns[self.start] += 1
        if self.returns[self.start] > limit:
            tried = f", after {limit} returns to step {self.start}" if limit else ""
            raise Diverged(
                f"training ended at step {trouble.step}: {trouble}{tried}; try a smaller optimizer.base_lr, a longer "
                "warm-up, optimizer.clip or training.precision=fp32"
            )
        first = position - (trouble.step - self.start) + 1
        return (
            f"step {trouble.step}: {trouble}; training returns to step {self.start} and goes on past the batches "
            f"{first} to {position} of the stream"
        )

    def _open(self) -> None:
        """Makes the run folder and writes down the resolved recipe."""
        self.path.mkdir(parents=True, exist_ok=True)
        checkpoint.sweep(self.path)
        with publish(self.path / "recipe.yaml") as file:
            file.write(self.recipe.to_yaml().encode())

    def _announce(self) -> None:
        recipe, ranks = self.recipe, self.cluster.world_size
        one, several = ("GPU", "GPUs") if self.cluster.device.type == "cuda" else ("CPU process", "CPU processes")
        begin = f"continues from step {self.start}" if self.start else "starts"
        if self.inherited:
            begin += f" with {self.inherited}"
        say(
            f"{self.path} {begin}: {recipe.objective_name} with {recipe.encoder.name} on {self.feed.n} images, "
            f"{self.total_steps} steps of {recipe.batch_size}, {ranks} {several if ranks > 1 else one}, "
            f"ZeRO-{recipe.training.zero}, {recipe.training.precision}"
        )
        if not self.start:
            for key, value, why in recipe.chosen():
                say(f"  {key}={value}: {why}")

    def _save(self, saver: Saver, step: int, log: Log | None) -> None:
        if log:
            log.flush()
        metrics = {**self.metrics, **log.newest} if log else {}  # what was logged last under every name
        state = {**self._state(step), "skipped": self.skipped, "metrics": metrics}
        if self.account:
            state |= self.account.open(step + self.skipped)
        saver.save(state)

    def _export(self, step: int) -> None:
        """exports/step_…, from that step's checkpoint: the teacher if there is one, else the student."""
        if step not in exports(self.path):
            export_run(self.path, self._export_path(step), step=step)

    def _export_anew(self, step: int) -> None:
        """Of a checkpoint that is new. One that a user removed may have been exported, and had other weights."""
        shutil.rmtree(self._export_path(step), ignore_errors=True)
        self._export(step)

    def _export_path(self, step: int) -> Path:
        return self.path / "exports" / f"step_{step:08d}"
