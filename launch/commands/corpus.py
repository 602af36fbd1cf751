"""`selfsight corpus build | adopt | verify | stats | index`: images become a corpus, proven to be one and counted."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from selfsight.errors import UserError

if TYPE_CHECKING:
    from selfsight.corpus import BuildReport

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def add(subparsers) -> None:
    corpus = subparsers.add_parser("corpus", help="build or adopt, verify and describe a corpus of images")
    verbs = corpus.add_subparsers(metavar="VERB", required=True)

    build = verbs.add_parser("build", help="folders, archives or tables of images → verified shards")
    build.add_argument(
        "sources", nargs="+", metavar="SRC", help="folder, tar(.gz), zip, WebDataset shard, Parquet file or corpus"
    )
    build.add_argument("--out", required=True, metavar="DIR", help="the corpus to write; a finished one is left alone")
    build.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    build.add_argument(
        "--hash-range", default="0:1", metavar="A:B", help="keep images whose content hash falls in [A, B) of [0, 1)"
    )
    build.add_argument("--shard-size", default="256MiB", metavar="SIZE", help="largest shard (default 256MiB)")
    build.add_argument("--seed", type=int, default=0, help="of the shuffle (default 0)")
    build.add_argument("--json", action="store_true", help="one JSON object on stdout")
    build.set_defaults(run=run_build)

    adopt = verbs.add_parser("adopt", help="index foreign WebDataset shards where they lie, without rewriting a byte")
    adopt.add_argument(
        "urls", nargs="+", metavar="URL", help="shards: paths or fsspec URLs, with {000000..000123}, * and ?"
    )
    adopt.add_argument("--out", required=True, metavar="DIR", help="the corpus to write: index and manifest, no shards")
    adopt.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    adopt.add_argument(
        "--skip-damaged", action="store_true", help="take what is sound of damaged shards and list the rest"
    )
    adopt.add_argument("--json", action="store_true", help="one JSON object on stdout")
    adopt.set_defaults(run=run_adopt)

    index = verbs.add_parser("index", help="write the indexes that other loaders expect beside the shards")
    index.add_argument("corpus", metavar="DIR")
    index.add_argument(
        "--for", dest="reader", choices=["energon", "dali"], help="Megatron-Energon or DALI (default: both)"
    )
    index.set_defaults(run=run_index)

    verify = verbs.add_parser("verify", help="re-read every byte; exit 1 with every fault named")
    verify.add_argument("corpus", metavar="DIR")
    verify.add_argument("--json", action="store_true", help="one JSON object on stdout")
    verify.set_defaults(run=run_verify)

    stats = verbs.add_parser("stats", help="how many images, of what classes, formats and sizes")
    stats.add_argument("corpus", metavar="DIR")
    stats.add_argument("--json", action="store_true", help="one JSON object on stdout")
    stats.set_defaults(run=run_stats)


def run_build(args: argparse.Namespace) -> int:
    from selfsight.corpus import build

    report = build(
        args.sources,
        args.out,
        workers=args.workers,
        shard_bytes=parse_size(args.shard_size),
        seed=args.seed,
        hash_range=parse_range(args.hash_range),
    )
    return show(report, args.json)


def run_adopt(args: argparse.Namespace) -> int:
    from selfsight.corpus import adopt

    report = adopt(args.urls, args.out, workers=args.workers, skip_damaged=args.skip_damaged)
    return show(report, args.json)


def run_index(args: argparse.Namespace) -> int:
    from selfsight.shards.interop import write_dali, write_energon

    writers = {"dali": write_dali, "energon": write_energon}
    for name in [args.reader] if args.reader else writers:
        print(f"{name}: {writers[name](args.corpus)}")
    return 0


def show(report: "BuildReport", as_json: bool) -> int:
    """Prints what a build or an adoption has made."""
    if as_json:
        print(json.dumps(report.to_json()))
        return 0
    counts = report.counts
    labels = "unlabelled" if report.classes is None else f"{report.classes} classes"
    print(f"{report.path}: {report.n} images, {labels}, {human(report.image_bytes)} in {report.shards} shards")
    print(f"corpus id {report.id}")
    for note in report.notes:
        print(note)
    left_out = [f"{counts[k]} {text}" for k, text in LEFT_OUT.items() if counts[k]]
    if left_out:
        print("; ".join(left_out))
    for entry in report.listed:
        print(f"  {entry['kind']}: {json.dumps(entry['source'], ensure_ascii=False)[1:-1]}: {entry['reason']}")
    refused = counts["rejected"] + counts["skipped"]
    if refused > len(report.listed):
        print(f"  … and {refused - len(report.listed)} more: {report.path}/rejected.jsonl")
    if not report.was_complete:
        print(f"{report.seconds:.1f} s, {counts['seen'] / max(report.seconds, 1e-9):,.0f} files/s")
    return 0


LEFT_OUT = {
    "rejected": "rejected (not decodable)",
    "skipped": "skipped (not images)",
    "outside": "outside the hash range",
    "duplicates": "kept that are byte-for-byte duplicates of others",
}


def run_verify(args: argparse.Namespace) -> int:
    from selfsight.corpus import verify
    from selfsight.shards import Manifest
    from selfsight.shards.store import is_url

    if is_url(args.corpus):
        raise UserError(f"{args.corpus} is far away: run verify where the corpus is a folder, or on a copy of it")
    faults = verify(args.corpus)
    manifest = Manifest.load(args.corpus)
    if args.json:
        listed = [{"file": f.file, "what": f.what} for f in faults]
        print(
            json.dumps({"path": args.corpus, "id": manifest.id, "n": manifest.n, "sound": not faults, "faults": listed})
        )
        return 1 if faults else 0
    for fault in faults:
        print(" ".join(str(fault).split()))
    if faults:
        print(f"{args.corpus}: {len(faults)} faults")
        return 1
    print(f"{args.corpus}: sound; {manifest.n} images in {len(manifest.shards)} shards, corpus id {manifest.id}")
    return 0


def run_stats(args: argparse.Namespace) -> int:
    from selfsight.corpus import stats

    found = stats(args.corpus)
    if args.json:
        print(json.dumps(found))
        return 0
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # A file or a pipe wants whole lines; only a terminal has a width.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 300)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    spread = found["quantiles"]
    classes = found["classes"]

    def size(quantile: str) -> str:
        return f"{spread['width'][quantile]} × {spread['height'][quantile]}"

    rows = {
        "corpus": found["path"],
        "id": found["id"],
        "images": f"{found['n']:,}",
        "bytes": f"{human(found['image_bytes'])} of images in {found['shards']} shards, {found['chunks']} chunks",
        "classes": "unlabelled" if classes is None else f"{len(classes)}",
        "formats": ", ".join(f"{k} {v:,}" for k, v in found["formats"].items()),
        "modes": ", ".join(f"{k} {v:,}" for k, v in found["modes"].items()),
        "width × height": f"median {size('p50')}, from {size('p0')} to {size('p100')}",
        "file size": f"median {human(spread['size']['p50'])}, largest {human(spread['size']['p100'])}",
        "of which": f"{found['duplicates']} duplicates, {found['rotated']} EXIF-rotated, {found['animated']} animated",
        "left out": ", ".join(f"{found[key]} {key}" for key in ("rejected", "skipped", "outside")),
        "labels": "; ".join(found["notes"]),
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table)
    if classes:
        counts = Table(box=None, padding=(0, 2, 0, 0))
        counts.add_column("class")
        counts.add_column("images", justify="right")
        for name, count in list(classes.items())[:SHOWN_CLASSES]:
            counts.add_row(escape(name), f"{count:,}")
        console.print(counts)
        if len(classes) > SHOWN_CLASSES:
            console.print(f"… and {len(classes) - SHOWN_CLASSES} more classes (--json lists all)")
    return 0


SHOWN_CLASSES = 20


def parse_size(text: str) -> int:
    """`256MiB`, `1G`, `4096` in bytes."""
    number = text.strip().lower().removesuffix("ib").removesuffix("b")
    unit = number[-1:] if number[-1:] in UNITS else ""
    try:
        size = int(float(number.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise UserError(f"{text!r} is no size: write it like 256MiB")
    return size


def parse_range(text: str) -> tuple[float, float]:
    """`0:0.9` as two numbers."""
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise UserError(f"{text!r} is no range: write it like 0:0.9") from None
    return low, high


def human(size: float) -> str:
    """A number of bytes as people write it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
