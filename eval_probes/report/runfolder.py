"""What a run folder says about itself: the recipe with the origin of every line, the metrics, the exported encoders.

In: the folder that training wrote. Out: plain values. What is missing or torn (a last line cut off by a kill) is left
out; a folder that is no run at all is a UserError.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfsight.errors import UserError
from selfsight.weights import run as run_of
from selfsight.weights.folder import Export


@dataclass(frozen=True)
class RunFolder:
    path: Path
    recipe: dict[str, Any]
    recipe_lines: list[tuple[str, str]]  # (YAML text, where it came from)
    metrics: list[dict[str, Any]]  # one per logged step, in order of steps
    events: list[tuple[int, str]]  # (step, sentence): alarms, and whatever else training had to say
    exports: dict[int, Export]  # step → encoder, in order of steps; step 0 is the untrained one

    @property
    def last_step(self) -> int | None:
        """The step of the newest export that was trained at all."""
        return max((step for step in self.exports if step > 0), default=None)

    @property
    def trained(self) -> Export | None:
        return None if self.last_step is None else self.exports[self.last_step]

    @property
    def untrained(self) -> Export | None:
        return self.exports.get(0)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one metric, over the records that have it. A value that was not finite is a NaN."""
        rows = [(r["step"], r[key]) for r in self.metrics if key in r]
        return [float(s) for s, _ in rows], [float(v) if _is_number(v) else math.nan for _, v in rows]

    def metric_names(self) -> list[str]:
        """Every numeric key of the metrics, in order of first appearance."""
        return list(dict.fromkeys(key for row in self.metrics for key, value in row.items() if _is_number(value)))


def open_run(path: Path) -> RunFolder:
    """Reads `path`. Raises UserError if it is not a run folder or its recipe cannot be read."""
    recipe = run_of.read_recipe(path)
    lines = _with_origin((path / "recipe.yaml").read_text(encoding="utf-8"))
    records, events = _log(path / "metrics.jsonl")
    return RunFolder(path, recipe, lines, records, events, _exports(path))


def _with_origin(text: str) -> list[tuple[str, str]]:
    lines = []
    for line in text.splitlines():
        value, mark, origin = line.rpartition("  # ")
        lines.append((value.rstrip(), origin.strip()) if mark else (line.rstrip(), ""))
    return lines


def _log(path: Path) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """(records, events) of a metrics.jsonl, each in order of steps."""
    if not path.is_file():
        return [], []
    records: dict[int, dict[str, Any]] = {}
    events: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            continue
        if "event" in row:
            events.append((row["step"], str(row["event"])))
        elif "loss" in row:
            records[row["step"]] = row
    return [records[step] for step in sorted(records)], sorted(events, key=lambda e: e[0])


def _exports(run: Path) -> dict[int, Export]:
    found = {}
    for step, path in run_of.exports(run).items():
        try:
            found[step] = Export.open(path)
        except UserError:
            continue  # half copied or of another version: the report does without it
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
