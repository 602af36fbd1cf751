"""The log of a run: metrics.jsonl, one object per line, and the same numbers for TensorBoard and whatever tracker the
recipe asks for. Only rank 0 writes.

A line is a record of one step (it has "loss"), what probes say of the encoder after it ("probe_share"), an event that
someone should look at ("event", a sentence) or a note ("note", a sentence). When a run continues from a checkpoint,
lines of later steps are cut off, so that the file reads as if it had never stopped.
"""

import json
import os
from collections.abc import Callable, Mapping
from math import isfinite, nan
from pathlib import Path
from typing import Any

from selfsight.console import say
from selfsight.files import publish
from selfsight.training.trackers import Tracker

FILE = "metrics.jsonl"


class Log:
    """Appends to the log of `run`, which is cut back to `step` first. A tracker that fails, now or later, is an event
    and gets no more numbers; training goes on."""

    def __init__(self, run: Path, step: int, trackers: Mapping[str, Callable[[], Tracker]] | None = None) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.records = cut(run / FILE, step)  # of the steps before
        self.newest: dict[str, float] = {}  # what was logged last of every name, since
        self._file = (run / FILE).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._trackers: dict[str, Tracker] = {}
        for name, begin in (trackers or {}).items():
            if (tracker := self._attempt(name, step, begin)) is not None:
                self._trackers[name] = tracker

    def record(self, step: int, values: dict[str, float]) -> None:
        """One step's numbers; "step" counts the steps done."""
        self.newest.update(values)
        self._line({"step": step, **values})
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, step, lambda tracker=tracker: tracker.record(step, values))

    def measure(self, step: int, values: dict[str, float]) -> None:
        """Numbers that are not of a step, but of the encoder after it."""
        self.record(step, values)

    def event(self, step: int, sentence: str) -> None:
        self._line({"step": step, "event": sentence})
        self._board.add_text("event", sentence, step)

    def note(self, step: int, sentence: str) -> None:
        self._line({"step": step, "note": sentence})

    def flush(self) -> None:
        """To the disk: whatever a checkpoint is followed by has been logged."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        self.flush()
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, 0, tracker.close)
        self._file.close()
        self._board.close()

    def _attempt(self, name: str, step: int, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as e:
            self._trackers.pop(name, None)
            sentence = f"step {step}: {name} gets no more numbers, metrics.jsonl has them: {' '.join(str(e).split())}"
            self.event(step, sentence)
            say(f"ALARM {sentence}")

    def _line(self, entry: dict[str, Any]) -> None:
        plain = {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in entry.items()}
        self._file.write(json.dumps(plain, ensure_ascii=False) + "\n")
        self._file.flush()


def cut(path: Path, step: int, *, by: str = "step") -> list[dict[str, Any]]:
    """Drops the lines of steps after `step`, and a last line that a kill left unfinished, in one atomic move. Returns
    the records that stay, a value that was not finite as a NaN. `by` names what a line counts."""
    if not path.exists():
        return []
    kept, records = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if entry[by] > step:
                continue
        except (ValueError, KeyError, TypeError):
            continue
        kept.append(line + "\n")
        if "loss" in entry:
            records.append({k: nan if v is None else v for k, v in entry.items()})
    with publish(path) as file:
        file.write("".join(kept).encode())
    return records
