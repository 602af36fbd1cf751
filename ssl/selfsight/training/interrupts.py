"""Being asked to stop: SIGINT, SIGTERM and SIGUSR1 set a flag that the loop reads after each step.

So the step in hand is finished and a checkpoint written. A second signal of the kind meets the handler that was there
before, so Ctrl-C twice ends at once.
"""

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupts:
    """Listens for the time of a `with` block. Outside the main thread signals cannot be had, and it listens to none."""

    def __init__(self) -> None:
        self.received: str | None = None  # the signal's name, or who asked
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._before[signal.Signals(number)])  # type: ignore[arg-type]

    def ask(self, who: str) -> None:
        """Asks as a signal does. Any thread may call it."""
        self.received = self.received or who

    def asked_to_stop(self) -> bool:
        return self.received is not None
