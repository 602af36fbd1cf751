"""Scores of several runs over their checkpoints as one HTML page that stands by itself: a panel for each metric of each
protocol, a line for each run. In: groups of readings. Out: the file, written whole or not at all."""

from collections.abc import Sequence
from pathlib import Path

from eval_probes.readings import Group, short_names
from eval_probes.report.build import render, write
from eval_probes.report.charts import Curve
from eval_probes.report.trajectory import trajectory
from selfsight import __version__
from selfsight.errors import UserError

COLOURS = 8  # of the style sheet, run0 …
SHOWN = 4  # metrics of one protocol before they are folded to the one that stands for it


def write_plots(groups: Sequence[Group], target: Path) -> None:
    """Raises UserError when no score belongs to a checkpoint, or there are more runs than colours."""
    if target.suffix != ".html":
        raise UserError(f"{target}: the plots are a page, give a name that ends in .html")
    stepped = {r.run for g in groups for rs in g.metrics.values() for r in rs if r.step is not None}
    runs = [run for run in dict.fromkeys(run for group in groups for run in group.runs) if run in stepped]
    if not runs:
        raise UserError("no score belongs to a checkpoint of a run: there is nothing to plot over")
    if len(runs) > COLOURS:
        raise UserError(f"{len(runs)} runs are more than a plot can tell apart: give {COLOURS} at most")
    colours = {run: f"run{i}" for i, run in enumerate(runs)}
    shown: list[tuple[str, Curve]] = []  # with the protocol's digest and the test corpus
    folded: dict[str, list[tuple[str, Curve]]] = {}
    for group in groups:
        panels = _panels(group, colours)
        first = len(panels) if len(panels) <= SHOWN else 1
        shown += panels[:first]
        if panels[first:]:
            folded[f"{group.protocol} {group.digest[:8]}"] = panels[first:]
    legend = [(colours[run], name) for run, name in short_names(runs).items()]
    context = {"version": __version__, "legend": legend, "shown": shown, "folded": folded}
    write(target, render("plots.html", context))


def _panels(group: Group, colours: dict[str, str]) -> list[tuple[str, Curve]]:
    drawn = [trajectory(f"{group.protocol} {metric}", readings, colours) for metric, readings in group.metrics.items()]
    note = f"{group.digest[:8]} {(group.test or '')[:8]}"
    return [(note, curve) for curve in drawn if curve is not None]
