"""Evaluates the checkpoints of a run as they complete, in a process of its own; any number of them share the work.

An export appears by one rename, so it is complete once it is seen. Each (checkpoint, protocol) is claimed by a lock
that dies with its process and is measured once: what the run's results hold is not measured again. Nothing here can
harm the training, and a watcher that is killed is simply started again.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from eval_probes.bench import Bench
from eval_probes.extraction import How
from eval_probes.protocol import Protocol
from eval_probes.results import ResultsStore
from eval_probes.subject import Subject
from eval_probes.suite import Outcome
from eval_probes.suite import run as run_suite
from selfsight.errors import UserError
from selfsight.shards.corpus import Corpus
from selfsight.weights.run import checkpoints, exports, read_recipe, read_state

CLAIMS = "evaluations"  # folder of locks in the run
POLICIES = ("every", "newest")


@dataclass
class Watcher:
    """`policy` every: all checkpoints, oldest first; newest: those that are the newest when their turn comes. `budget`
    is the share of the time that may go into measuring: after a checkpoint that took t seconds, the next one waits
    until t / budget have passed since it began."""

    run: Path
    protocols: Sequence[Protocol]
    train: Corpus | None
    test: Corpus | None
    how: How
    policy: str = "every"
    budget: float = 1.0

    def __post_init__(self) -> None:
        read_recipe(self.run)  # that it is a run at all
        if self.policy not in POLICIES:
            raise UserError(f"there is no policy {self.policy!r}: choose {' or '.join(POLICIES)}")
        if not 0 < self.budget <= 1:
            raise UserError(f"a budget of {self.budget:g} is no share of the time: give a number above 0, at most 1")
        self.store = ResultsStore(self.run / "results.sqlite")
        (self.run / CLAIMS).mkdir(exist_ok=True)
        self._failed: set[tuple[int, str]] = set()
        self._subjects: dict[int, Subject] = {}  # exports never change, and digests take time

    def watch(self, *, poll: float = 10.0, follow: bool = True) -> Iterator[tuple[int, Outcome]]:
        """(step, outcome) as they come, until the run is finished and everything asked for is measured; with `follow`
        False, until everything that is there now is."""
        while True:
            finished = self._finished()  # looked at first: what comes later is seen below
            began, worked = time.monotonic(), False
            for step in self._due():
                for outcome in self._measure(step):
                    worked = True
                    yield step, outcome
                if self.policy == "newest" or self.budget < 1:
                    break  # look again what is newest now, and rest
            if worked:
                time.sleep((time.monotonic() - began) * (1 / self.budget - 1))
            elif finished or not follow:
                return
            else:
                time.sleep(poll)

    def _due(self) -> list[int]:
        """Steps that are not fully measured, in the order of their turn."""
        for step, export in exports(self.run).items():
            if step not in self._subjects:
                self._subjects[step] = Subject.open(export)
        steps = sorted(self._subjects) if self.policy == "every" else sorted(self._subjects)[-1:]
        return [step for step in steps if self._missing(step)]

    def _missing(self, step: int) -> list[Protocol]:
        ids = [None if c is None else c.id for c in (self.train, self.test)]
        known = [(p, self.store.find(p, self._subjects[step], *ids)) for p in self.protocols]
        return [p for p, found in known if not found and (step, p.digest) not in self._failed]

    def _measure(self, step: int) -> Iterator[Outcome]:
        bench = Bench(self._subjects[step], self.train, self.test, self.how)
        for protocol in self._missing(step):
            with self._claim(step, protocol) as mine:
                if not mine:
                    continue  # another watcher has it in hand
                for outcome in run_suite(bench, [protocol], self.store):
                    if outcome.fault:
                        self._failed.add((step, protocol.digest))  # told once, tried again by the next watcher
                    if not outcome.known:
                        yield outcome

    @contextmanager
    def _claim(self, step: int, protocol: Protocol) -> Iterator[bool]:
        lock = os.open(self.run / CLAIMS / f"{step:08d}-{protocol.digest[:16]}", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True
        except BlockingIOError:
            yield False
        finally:
            os.close(lock)

    def _finished(self) -> bool:
        found = checkpoints(self.run)
        if not found:
            return False
        try:
            state = read_state(found[max(found)])
        except UserError:
            if not found[max(found)].exists():
                return False  # removed meanwhile
            raise  # else it would be waited for without end
        return state["step"] >= state["total_steps"] and state["step"] in exports(self.run)
