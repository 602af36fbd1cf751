"""`selfsight report`: a run as one HTML file."""

import argparse
from pathlib import Path


def add(subparsers) -> None:
    parser = subparsers.add_parser("report", help="writes a run's report: curves, scores, pictures, in one HTML file")
    parser.add_argument("path", metavar="RUN", type=Path, help="folder that `selfsight pretrain` wrote")
    parser.add_argument("--train", metavar="DIR", help="searched for neighbours (default: the recipe's corpus)")
    parser.add_argument("--test", metavar="DIR", help="held-out corpus whose images are shown")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: RUN/report.html")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from eval_probes.report import build_report

    print(build_report(args.path, train=args.train, test=args.test, out=args.out))
    return 0
