"""`selfsight export RUN --out DIR`: the encoder of a checkpoint as a folder that selfsight and timm load."""

import argparse
import json
from pathlib import Path


def add(subparsers) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write the encoder of a run as a folder that others load",
        description="Writes the encoder of a checkpoint in timm's layout, with a fingerprint and a model card. Nothing "
        "is published before it was read back and gave the same features.",
    )
    parser.add_argument("weights_run", metavar="RUN", help="output folder of `selfsight pretrain`")
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--which", choices=["teacher", "student"], help="default: the teacher if there is one")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to take (default: the newest)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from selfsight.weights import export_run
    from selfsight.weights.folder import Export

    export = Export.open(export_run(Path(args.weights_run), Path(args.out), which=args.which, step=args.step))
    meta = export.origin["meta"]
    if args.json:
        print(json.dumps({"path": str(export.path), "digest": export.digest, **meta}))
        return 0
    print(f"{export.path}: the {meta['which']} of step {meta['step']}, sha256 {export.digest[:12]}…")
    print("Load it with")
    print(f'  selfsight.load_pretrained("{export.path}")')
    print(f'  timm.create_model("local-dir:{export.path}", pretrained=True)')
    return 0
