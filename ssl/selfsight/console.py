"""What long work shows: a bar on a terminal, plain lines in a log. Everything goes to stderr; stdout is for results."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

LOG_EVERY = 10.0  # seconds between plain lines


def say(text: str) -> None:
    """One plain line."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """How far one piece of work has come. `advance` takes the units done and what else is worth showing."""

    def __init__(self, label: str, total: int, done: int, bar) -> None:
        self.label, self.total, self.done = label, total, done
        self._bar = bar
        self._task = bar.add_task(label, total=total, completed=done, note="") if bar else None
        self._began, self._first = time.monotonic(), done
        self._next = self._began + LOG_EVERY

    def advance(self, n: int = 1, /, **shown: object) -> None:
        self.done += n
        note = "  ".join(f"{k} {v}" for k, v in shown.items())
        if self._bar:
            self._bar.update(self._task, advance=n, **({"note": note} if note else {}))
        elif self.done >= self.total or time.monotonic() >= self._next:
            self._next = time.monotonic() + LOG_EVERY
            say(f"{self.label}: {self.done}/{self.total}{'  ' + note if note else ''}{self._left()}")

    def _left(self) -> str:
        """How long the rest will take, at the pace since the beginning."""
        if self.done >= self.total:
            return ""
        pace = (time.monotonic() - self._began) / max(self.done - self._first, 1)
        return f"  {timedelta(seconds=round((self.total - self.done) * pace))} left"


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Progress]:
    """A `Progress` over `total` units of which `done` are behind us already."""
    if not sys.stderr.isatty():
        yield Progress(label, total, done, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bar(*columns, console=Console(stderr=True), refresh_per_second=1) as bar:
        yield Progress(label, total, done, bar)
