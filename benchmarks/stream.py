"""Images per second and core: our stream beside the loaders that people use, on the same images and the same cores.

    python benchmarks/stream.py [--quick] [--json] [--images TAR_OR_FOLDER] [--only NAME …]

CPU seconds are those of all processes and threads of a loader, whose workers run already; the images lie in the page
cache. What is as fast as bare JPEG decoding cannot be faster on a CPU that has to decode them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median

from benchmarks import harness
from benchmarks.harness import Absent, Rival, Row, Sample
from benchmarks.jobs import JOBS
from benchmarks.peers import PACKAGES, PEERS
from benchmarks.photographs import prepare
from selfsight.console import say
from selfsight.errors import UserError
from selfsight.machine import available_cores

UNIT = "images/s/core"
REFERENCE = "webdataset + torchvision"
CPU_PATH, GPU_FED, READING = "ours, CPU path", "ours, GPU-fed path", "ours"
BARE = ("simplejpeg", "Pillow")
AIMS = {("dino", CPU_PATH): 4.0, ("dino", GPU_FED): 8.0}
READING_AIM = 0.9
QUICK = (CPU_PATH, GPU_FED, READING, *BARE, REFERENCE, "ImageFolder + torchvision")
PHOTOGRAPHS = harness.ROOT.parent / "shared/corpora/imagenet-sample-320.tar"
EPOCHS = 800  # the longest of the published recipes that we have: a resume at its end
RESUME_AIM = 3.0  # seconds
ROUNDS = {"read": 5}  # epochs in one measurement: reading is quick, and its aim is a close one


def main() -> None:
    args = parser().parse_args()
    if args.rival:
        return rival(args)
    if args.first_batch:
        return first_batch(args)
    if not Path("/proc/self/stat").exists():
        raise UserError("CPU seconds of worker processes are read from /proc: run this benchmark on Linux")
    n = (args.count or (32 if args.quick else 320)) * args.cores
    n = -(-n // args.batch) * args.batch
    args.repeats = args.repeats or (2 if args.quick else 5)
    source = args.images or (PHOTOGRAPHS if PHOTOGRAPHS.is_file() else None)
    here = harness.machine(PACKAGES)
    with tempfile.TemporaryDirectory(prefix="selfsight-stream-") as folder, ExitStack() as stack:
        args.work = Path(folder)
        say(f"{n} photographs {'from ' + source.name if source else 'are drawn'}, {args.cores} cores")
        prepare(source, args.work, n, shards=4 * args.cores)
        rows = measure(args, n, stack)
        rows += resume(args)
    here |= {"cores used": args.cores, "images": n, "source": source.name if source else "drawn"}
    harness.report("stream", here, rows, args)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    harness.arguments(parser)
    parser.add_argument("--images", type=Path, help="tar or folder of JPEG photographs (default: some are drawn)")
    parser.add_argument("--cores", type=int, default=available_cores(), help="workers of each loader")
    parser.add_argument("--batch", type=int, default=32, help="images per batch")
    parser.add_argument("--count", type=int, help="images per core in one measurement")
    parser.add_argument("--repeats", type=int, help="measurements of each (default 5, quick 2)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rivals whose names begin so")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="of " + ", ".join(JOBS))
    # How this script starts itself: as one rival, and as a run that resumes.
    parser.add_argument("--rival", help=argparse.SUPPRESS)
    parser.add_argument("--first-batch", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return parser


def again(args: argparse.Namespace, *more: str) -> list[str]:
    """The command that starts this script for a part of the work."""
    given = {"--work": args.work, "--cores": args.cores, "--batch": args.batch}
    return [sys.executable, __file__, *more, *(str(x) for pair in given.items() for x in pair)]


def wanted(args: argparse.Namespace, name: str) -> bool:
    if args.only:
        return name in BARE or any(name.lower().startswith(prefix.lower()) for prefix in args.only)
    return not args.quick or name in QUICK


def measure(args: argparse.Namespace, n: int, stack: ExitStack) -> list[Row]:
    rivals: dict[str, Rival] = {}
    for name in (READING, *BARE, CPU_PATH, GPU_FED, *PEERS):
        if wanted(args, name):
            rivals[name] = Rival(name, again(args, "--rival", name))
            stack.callback(rivals[name].close)

    def ask(name: str, job: str) -> Sample:
        sample = rivals[name].run(job)
        if sample.images != (due := n * ROUNDS.get(job, 1)):
            raise Absent(f"delivered {sample.images} of {due} images")
        return sample

    def asked(job: str, names: tuple[str, ...]) -> dict[str, list[Sample] | Absent]:
        say(f"measuring: {JOBS.get(job, 'plain reading')}")
        return harness.interleave({name: partial(ask, name, job) for name in names if name in rivals}, args.repeats)

    reading = asked("read", (READING, *BARE))
    limit = max(
        (harness.middle(s, "per_core") for n, s in reading.items() if n in BARE and isinstance(s, list)), default=None
    )
    rows = [row(f"reading: {n if n == READING else 'bare decode, ' + n}", s, limit) for n, s in reading.items()]
    bare = [r for r in rows if "bare" in r.name and r.value]
    if bare and READING in reading:
        harness.compare(rows, f"reading: {READING}", max(bare, key=lambda r: r.value or 0).name, READING_AIM)
    for job in args.jobs:
        found = asked(job, (CPU_PATH, GPU_FED, *PEERS))
        of_job = [row(f"{job}: {name}", samples, limit) for name, samples in found.items()]
        if REFERENCE in found:
            for name in found:
                if name != REFERENCE:
                    harness.compare(of_job, f"{job}: {name}", f"{job}: {REFERENCE}", AIMS.get((job, name)))
        rows += of_job
    return rows


def row(name: str, samples: list[Sample] | Absent, limit: float | None) -> Row:
    if isinstance(samples, Absent):
        return Row(name, None, UNIT, note=str(samples))
    value = harness.middle(samples, "per_core")
    return Row(
        name,
        value,
        UNIT,
        more={"images/s": harness.middle(samples, "rate"), "of bare decode": value / limit if limit else None},
    )


def rival(args: argparse.Namespace) -> None:
    """This process is the rival `args.rival`."""

    from benchmarks import ours

    corpus, name = args.work / "corpus", args.rival

    def epoch(job: str) -> ours.Work:
        if name in BARE:
            return ours.bare_decode(name, corpus, args.cores)
        if name == READING:
            return ours.ours_read(corpus, args.batch, args.cores)
        if name in PEERS:
            return PEERS[name](job, args.work / "images", corpus, args.work, args.batch, args.cores)
        return ours.loaded(job, corpus, args.batch, args.cores, staged=name == GPU_FED)

    def prepared(job: str) -> ours.Work:
        work = epoch(job)
        return lambda: sum(work() for _ in range(ROUNDS.get(job, 1)))

    harness.serve(prepared)


def first_batch(args: argparse.Namespace) -> None:
    """This process is a run that resumes: prints the seconds of its imports and those until its first batch."""
    began = time.perf_counter()
    ours = import_module("benchmarks.ours")
    import_module("selfsight.stream.loader")  # torch and all
    imports = time.perf_counter() - began
    print(json.dumps([imports, ours.first_batch(args.work / "corpus", "dino", args.batch, EPOCHS, args.cores)]))


def resume(args: argparse.Namespace) -> list[Row]:
    """The first batch of a run that goes on at the end of a long recipe, in a fresh process each time."""
    if args.only and not wanted(args, CPU_PATH):
        return []
    say("measuring: first batch after a resume")
    command = again(args, "--first-batch")
    taken = [json.loads(subprocess.check_output(command, text=True).splitlines()[-1]) for _ in range(args.repeats)]
    imports, batch = (median(x) for x in zip(*taken, strict=True))
    name = f"first DINO batch of {args.batch} after a resume at epoch {EPOCHS}"
    return [Row(name, batch, "s", aim=RESUME_AIM), Row("imports before it", imports, "s")]


if __name__ == "__main__":
    harness.run(main)
