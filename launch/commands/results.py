"""`selfsight results PATH…`: what runs and results stores hold, as tables, as a plot over checkpoints, or compared."""

import argparse
import json
import sys
from pathlib import Path

MOST = 4  # metrics of one protocol that are all shown, where none is asked for by name


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "results",
        help="show scores: tables, a plot over checkpoints, a comparison of runs",
        description="Shows the scores of runs and results stores; of the same measurement made twice, the newest.",
    )
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path, help="a run, or a results.sqlite")
    parser.add_argument("--protocol", metavar="NAME", help="this one only, with all its metrics")
    parser.add_argument("--compare", action="store_true", help="the runs against the first of them, with paired tests")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write a page of plots over checkpoints (.html)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from eval_probes.comparison import compare
    from eval_probes.readings import read
    from selfsight.console import say
    from selfsight.errors import UserError

    groups = read(args.paths)
    if args.protocol:
        measured = list(dict.fromkeys(g.protocol for g in groups))
        groups = [g for g in groups if g.protocol == args.protocol]
        if not groups:
            raise UserError(f"there are no scores of {args.protocol!r}, only of {', '.join(measured)}")
    compared = compare(groups, every_metric=bool(args.protocol)) if args.compare else []
    if args.plot:
        from eval_probes.report.plots import write_plots

        write_plots(groups, args.plot)
        say(f"written to {args.plot}")
    if args.json:
        said = [
            {"run": r.run, "step": r.step, **r.score.to_dict()} for g in groups for rs in g.metrics.values() for r in rs
        ]
        print(json.dumps({"scores": said, "comparisons": [c.to_dict() for c in compared]}))
    elif args.compare:
        show_comparisons(compared)
    else:
        show(groups, everything=bool(args.protocol))
    return 0


def console():
    from rich.console import Console

    # No markup and no emoji: folders may be called `photos [old]` or `:star:`.
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 100)


def show(groups, *, everything: bool) -> None:
    """A table for each group."""
    from eval_probes.readings import short_names
    from eval_probes.subject import PIXELS

    names = short_names(list(dict.fromkeys(run for group in groups for run in group.runs)))
    out = console()
    for group in groups:
        shown = list(group.metrics) if everything or len(group.metrics) <= MOST else [group.headline]
        table = _table("metric", "weights", "step>", "value>", "95 % interval>", "n>")
        for metric in shown:
            for i, reading in enumerate(group.metrics[metric]):
                score = reading.score
                weights = "raw pixels" if reading.run == PIXELS else names[reading.run]
                step = "" if reading.step is None else str(reading.step)
                value = f"{score.number(score.value)} {score.unit}".rstrip()
                table.add_row("" if i else metric, weights, step, value, interval(score), str(score.n))
            if metric != shown[-1]:
                table.add_section()
        if len(shown) < len(group.metrics):
            table.caption = f"{len(group.metrics) - len(shown)} more metrics: --protocol {group.protocol}"
        out.print(heading(group), table, sep="\n")


def show_comparisons(compared) -> None:
    """One table of all differences."""
    from eval_probes.comparison import ALPHA
    from eval_probes.readings import short_names

    base = compared[0].base
    names = short_names(list(dict.fromkeys([base.run, *(c.other.run for c in compared)])))
    tests = sum(c.p is not None for c in compared)
    table = _table("", "weights", "step>", "value>", "against>", "difference>", "p>", "")
    for c in compared:
        a, b = c.base.score, c.other.score
        apart = f"{'+' if c.difference > 0 else ''}{a.number(c.difference)}"
        table.add_row(
            f"{c.protocol} {c.metric}",
            names[c.other.run],
            _step(c.other) if c.other.step == c.base.step else f"{_step(c.other)}, {_step(c.base)}",
            b.number(b.value),
            a.number(a.value),
            f"{apart} {'points' if a.unit == '%' else a.unit}".rstrip(),
            "" if c.adjusted is None else f"{c.adjusted:.2g}",
            c.verdict,
        )
    table.caption = (
        f"Newest checkpoints on the same images. p: two-sided paired test over the test images, adjusted for the "
        f"{tests} test{'s' if tests != 1 else ''} made here (Holm); below {ALPHA} one side is called better. "
        "It does not know what another training seed would change."
    )
    console().print(f"against {names[base.run]}", table, sep="\n")


def heading(group) -> str:
    """knn 1f0c2a9b · trained on 7b9f77045836 · tested on 3c1e…: digests of the protocol and of the corpora."""
    learnt = [f"trained on {group.train[:12]}"] if group.train else []
    tested = [f"tested on {group.test[:12]}"] if group.test else []
    return " · ".join([f"{group.protocol} {group.digest[:8]}", *learnt, *tested])


def interval(score) -> str:
    return "" if score.low is None else f"{score.number(score.low)}–{score.number(score.high)}"


def _step(reading) -> str:
    return "?" if reading.step is None else str(reading.step)


def _table(*columns: str):
    """Columns by name; one that ends in > stands at the right."""
    from rich import box
    from rich.table import Table

    table = Table(caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
    return table
