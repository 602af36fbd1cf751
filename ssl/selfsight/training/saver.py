"""Saving without stopping: a snapshot at the step's end, then a thread that writes it while training goes on.

One checkpoint is on its way at a time. The ranks agree over a process group of their own that all files are on the
disk, and rank 0 publishes and tidies up. What goes wrong is raised on all ranks when the next checkpoint is due or the
run ends, and `failed` is called at once, for the loop to end it. `published`, too, is called then, by the main thread:
what is made of a checkpoint draws random numbers, which must not come between those of a step.
"""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from threading import Thread
from typing import Any

from selfsight.recipe import TrainingConfig
from selfsight.training import checkpoint
from selfsight.training.engine import Engine
from selfsight.training.snapshot import Snapshot
from selfsight.weights.run import checkpoints, read_state


class Saver:
    """Writes checkpoints of `engine` into `run`. All ranks do the same with it."""

    def __init__(
        self, run: Path, engine: Engine, *, failed: Callable[[str], None], published: Callable[[int], None]
    ) -> None:
        self.run, self.engine, self.failed, self.published = run, engine, failed, published
        self.training = engine.recipe.training
        self.snapshot = Snapshot()
        self.aside = engine.cluster.aside()
        self._thread: Thread | None = None
        self._step = 0
        self._error: Exception | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):  # an end that all ranks have come to
            self.wait()
        elif self._thread:
            self._thread.join()

    def save(self, state: dict[str, Any]) -> None:
        """Begins the checkpoint of `state["step"]`. Raises what went wrong with the one before."""
        self.wait()
        self.snapshot.take(self.engine)
        self._step = state["step"]
        self._thread = Thread(target=self._write, args=(state,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until what was begun is on the disk; then `published` is called on rank 0. Raises UserError when it could not
        be written."""
        if not self._thread:
            return
        self._thread.join()
        self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error
        self.engine.cluster.on_first(lambda: self.published(self._step))

    def _write(self, state: dict[str, Any]) -> None:
        try:
            self.snapshot.wait()
            checkpoint.write(self.run, self.aside, self.snapshot, state)
            self.aside.on_first(self._tidy)
        except Exception as e:
            self._error = e
            self.failed("a checkpoint that could not be written")

    def _tidy(self) -> None:
        found = checkpoints(self.run)
        for step in found.keys() - kept(found, self.training):
            checkpoint.remove(found[step])


def kept(found: dict[int, Path], training: TrainingConfig) -> set[int]:
    """The steps of the complete checkpoints that the recipe keeps: the newest, the multiples and the best."""
    steps = sorted(found)
    chosen = set(steps[-training.keep :])
    if training.keep_every:
        chosen |= {step for step in steps if step and step % training.keep_every == 0}
    if training.keep_best:
        order, metric = training.keep_best.split()
        scores = {step: read_state(found[step]).get("metrics", {}).get(metric) for step in steps}
        finite = {step: score for step, score in scores.items() if score is not None and isfinite(score)}
        if finite:
            chosen.add((max if order == "max" else min)(finite, key=lambda step: finite[step]))
    return chosen
