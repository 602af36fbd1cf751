"""What every benchmark shares: one table row, the machine it was measured on, rivals in processes of their own, output.

A rival answers "run this job once" with how many images it made, how long that took and how many CPU seconds it used,
children included. Rivals are asked in turn, so that what else the machine does meets all of them; medians are shown.
"""

import argparse
import json
import os
import platform
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from selfsight.errors import UserError
from selfsight.files import publish
from selfsight.machine import available_cores

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300.0  # seconds a rival may take for one answer


@dataclass
class Row:
    """One line of a table. `ratio` is value / that of the row named by `against`; `aim` is what the ratio should reach,
    or, where nothing stands against it, what the value should. `note` says why there is no value."""

    name: str
    value: float | None
    unit: str
    against: str | None = None
    ratio: float | None = None
    aim: float | None = None
    more: dict[str, float | None] = field(default_factory=dict)  # further columns
    note: str = ""


def compare(rows: list[Row], name: str, against: str, aim: float | None = None) -> None:
    """Sets `against`, `ratio` and `aim` of the row `name`; the ratio stays None where one of the two has no value."""
    by_name = {row.name: row for row in rows}
    row, other = by_name[name], by_name[against]
    row.against, row.aim = against, aim
    row.ratio = row.value / other.value if row.value is not None and other.value else None


@dataclass(frozen=True)
class Sample:
    """One measured piece of work."""

    images: int
    wall: float  # seconds
    cpu: float  # seconds, over all processes
    more: dict[str, float] = field(default_factory=dict)  # what else a rival says of its work

    @property
    def per_core(self) -> float:
        return self.images / self.cpu

    @property
    def rate(self) -> float:
        return self.images / self.wall


def cpu_seconds() -> float:
    """CPU seconds of this process and everything it started, living and ended. Needs Linux's /proc for the living."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(_living(os.getpid()))


def _living(root: int) -> Iterator[float]:
    """CPU seconds of each living descendant of `root`, its own ended children included."""
    parents, spent = {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):  # it has ended since
            # The command's name stands in parentheses and may hold anything; the numbers follow the last one.
            values = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)] = int(values[1])
            spent[int(entry.name)] = sum(map(int, values[11:15])) / os.sysconf("SC_CLK_TCK")
    family = {root}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    return (spent[pid] for pid in family - {root})


Work = Callable[[], int | tuple[int, dict[str, float]]]


def timed(work: Work) -> Sample:
    """`work` does something with images and returns how many, and what else it has to say."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    done = work()
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    return Sample(done, wall, cpu) if isinstance(done, int) else Sample(done[0], wall, cpu, done[1])


class Absent(Exception):
    """This rival does not run here. The message says why, in a few words."""


class Rival:
    """A process that answers jobs: `command` is a script that calls `serve`. End it with `close`.

    It and its workers stand still between their answers: some read ahead, which would neither be counted nor leave the
    others in peace.
    """

    def __init__(self, name: str, command: Sequence[str], *, threads: int = 1) -> None:
        """`threads` of numerical libraries: where a rival has workers, more would compete with them for the cores."""
        self.name = name
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, start_new_session=True)

    def run(self, job: str) -> Sample:
        """Raises Absent where it does not do that job, or died, or fell silent."""
        assert self._process.stdin
        assert self._process.stdout
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{job}\n".encode())
            self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            self.close()
            raise Absent("its process died" if ready else f"no answer for {PATIENCE:.0f} s")
        self._signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "absent" in answer:
            raise Absent(answer["absent"])
        return Sample(**answer)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)  # its own session: it and its workers


def serve(prepare: Callable[[str], Work]) -> None:
    """The other side of a `Rival`: `prepare(job)` returns the work, which is done once unmeasured and then as asked."""
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    at, work = "", None
    for line in sys.stdin:
        try:
            if line != at:
                work = None  # first, so that its workers end before others start
                at, work = line, prepare(line.strip())
                work()
            assert work
            answer = asdict(timed(work))
        except Exception as e:  # whatever a peer does, the others are measured
            answer = {"absent": str(e) if isinstance(e, Absent) else f"{type(e).__name__}: {' '.join(str(e).split())}"}
        print(json.dumps(answer), file=answers, flush=True)


def interleave(contestants: dict[str, Callable[[], Sample]], repeats: int) -> dict[str, list[Sample] | Absent]:
    """Asks each in turn, `repeats` times over, each round beginning with another one."""
    found: dict[str, Any] = {name: [] for name in contestants}
    names = list(contestants)
    for r in range(repeats if names else 0):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            if isinstance(found[name], Absent):
                continue
            try:
                found[name].append(contestants[name]())
            except Absent as e:
                found[name] = e
    return found


def middle(samples: Sequence[Sample], what: str) -> float:
    """The median over samples of "per_core", "rate", "wall" or "cpu"."""
    return median(getattr(sample, what) for sample in samples)


def machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """What a number depends on. `packages` are named with their versions where they are installed."""
    import torch

    cpus = Path("/proc/cpuinfo")
    models = [s for s in cpus.read_text().splitlines() if s.startswith("model name")] if cpus.exists() else []
    versions = {}
    for package in ("torch", *packages):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine(),
        "cores": available_cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": versions,
        "load": round(os.getloadavg()[0], 1),  # of the minute before: what else was running
    }


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--quick", action="store_true", help="a rough answer within a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a table")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this page as well")


def report(name: str, here: dict[str, Any], rows: list[Row], args: argparse.Namespace, place: str = "") -> None:
    """Prints what was measured, and writes it into a page where `args.write` says so, to its `place` (or `name`)."""
    if args.json:
        print(json.dumps(to_json(name, here, rows)))
    else:
        print(f"{describe(here)}\n\n{table(rows)}")
    if args.write:
        write(args.write, place or name, f"python {' '.join(_told(sys.argv))}", here, rows)


def to_json(name: str, here: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """{"benchmark", "machine", "rows"}; a row: name, value, unit, against, ratio, aim, then further columns."""
    plain = []
    for row in rows:
        kept = {k: v for k, v in asdict(row).items() if k not in ("more", "note")}
        plain.append({**kept, **row.more, **({"note": row.note} if row.note else {})})
    return {"benchmark": name, "machine": here, "rows": plain}


def describe(here: dict[str, Any]) -> str:
    """The machine in one line."""
    packages = ", ".join(f"{k} {v}" for k, v in here["packages"].items())
    parts = [here["cpu"], f"{here['cores']} cores", f"{here['memory_gib']} GiB", here["gpu"] or "no GPU"]
    parts += [here["system"], f"Python {here['python']}", packages]
    named = ("cpu", "cores", "memory_gib", "gpu", "system", "python", "packages")
    return ", ".join([*parts, *(f"{key} {value}" for key, value in here.items() if key not in named)])


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, which reads well as plain text too."""
    more = list(dict.fromkeys(key for row in rows for key in row.more))
    head = ["", "value", "unit", *more, "ratio", "aim", "against"]
    lines = [head]
    for row in rows:
        further = [number(row.more.get(key)) for key in more]
        ends = [number(row.ratio), number(row.aim), row.note or row.against or ""]
        lines.append([row.name, number(row.value), row.unit, *further, *ends])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    right = {i for i, title in enumerate(head) if title not in ("", "unit", "against")}

    def text(line: list[str]) -> str:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        return f"| {' | '.join(cells)} |"

    rule = "|".join("-" * (w + 1) + (":" if i in right else "-") for i, w in enumerate(widths))
    return "\n".join([text(head), f"|{rule}|", *map(text, lines[1:])])


def number(value: float | None) -> str:
    """Three digits that matter, no exponent; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def write(page: Path, name: str, command: str, here: dict[str, Any], rows: Sequence[Row]) -> None:
    """Replaces what stands in `page` between the marks of this benchmark. Raises UserError where they are missing."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{page} has no place for this table: add the lines {begin.strip()} and {end.strip()} to it")
    body = f"`{command}`, {time.strftime('%Y-%m-%d')}, on {describe(here)}:\n\n{table(rows)}\n"
    with publish(page) as file:
        file.write(f"{before}{begin}{body}{end}{after}".encode())


def _told(argv: Sequence[str]) -> Iterator[str]:
    """The command as others would type it: relative to the checkout, folders of this machine by their last name."""
    for word in argv:
        path = Path(word)
        if path.is_absolute():
            yield str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        else:
            yield word


def run(main: Callable[[], None]) -> None:
    """Runs a benchmark's `main`; a user's mistake ends in its sentence and exit code 2."""
    try:
        main()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
