"""`selfsight quickstart`: from images to measured weights in ten minutes, with nothing to set."""

import argparse
import json
import sys
from pathlib import Path


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="the whole way in ten minutes: images → shards → pretraining → probes → report",
        description="Builds a corpus, pretrains a small encoder, measures it on held-out images and writes a report. "
        "Without --images it draws its own labelled corpus. The same command again continues, or shows the result.",
    )
    parser.add_argument(
        "--images", type=Path, metavar="PATH", help="folder or archive; sub-folders named by class are the labels"
    )
    parser.add_argument("--objective", choices=["dino", "mae"], default="dino")
    parser.add_argument("--out", type=Path, default=Path("quickstart"), metavar="DIR", help="default: quickstart")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from launch.quickstart import Settings, quickstart
    from selfsight.training import Diverged, Stopped

    try:
        outcome = quickstart(Settings(args.images, args.objective, args.out, args.seed))
    except Stopped as e:
        print(f"selfsight: {e}", file=sys.stderr)
        return 85
    except Diverged as e:
        print(f"selfsight: {e}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(to_json(outcome), ensure_ascii=False))
    else:
        show(outcome)
    return 0


def to_json(outcome) -> dict:
    rows = [
        {"name": r.name, **{k: s.to_dict() for k, s in r.scores.items()}, **r.figures}
        | ({"fault": r.fault} if r.fault else {})
        for r in outcome.rows
    ]
    return {"rows": rows, "weights": str(outcome.weights), "report": str(outcome.report), "run": str(outcome.run)}


def show(outcome) -> None:
    """The table, where the report is, and how the weights are loaded."""
    from rich.console import Console
    from rich.table import Table

    # No markup and no emoji: folders may be called `photos [old]` or `:star:`.
    width = None if sys.stdout.isatty() else 120
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=width)
    labelled = bool(outcome.rows[0].scores)  # pixels cannot collapse
    table = Table(caption=f"Features of both encoders: {outcome.pooling}. In brackets: 95 % intervals.")
    table.add_column("")
    if labelled:
        n = outcome.rows[0].scores["knn"].n
        table.title = f"Accuracy on {n:,} held-out images, %"
        for name in ("kNN", "linear"):
            table.add_column(name, justify="right")
        table.add_column("n", justify="right")
    else:
        table.title = "Without labels: what the features of held-out images look like"
        table.caption = f"Features: {outcome.pooling}. RankMe: effective rank. Spread: 0 collapsed, 1 everywhere."
        for name in ("RankMe", "spread"):
            table.add_column(name, justify="right")
    for row in outcome.rows:
        style = "bold" if row is outcome.rows[-1] else ""
        if row.fault:
            cells = [row.fault, row.fault]
        elif labelled:
            cells = [cell(row.scores[metric]) for metric in ("knn", "linear")] + [f"{row.scores['knn'].n:,}"]
        else:
            cells = [f"{row.figures['rankme']:.1f}", f"{row.figures['feature_spread']:.3f}"]
        table.add_row(row.name, *cells, style=style)
    console.print(table)
    console.print(f"\nReport: {outcome.report}\n")
    console.print("The weights, in Python:\n")
    for line in (
        "import selfsight",
        f'encoder = selfsight.load_pretrained("{outcome.weights}")',
        "tokens = encoder(encoder.preprocess(image).unsqueeze(0))  # image: PIL; tokens.cls, tokens.patches",
    ):
        console.print(f"    {line}")


def cell(score) -> str:
    return f"{100 * score.value:.1f} [{100 * score.low:.1f}–{100 * score.high:.1f}]"
