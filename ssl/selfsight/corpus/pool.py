"""Tasks over worker processes, a bounded number in flight, so that a billion of them need no more memory than ten."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def each(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """`function` of every task, as they get done. One worker is this process itself.

    Raises ChildProcessError when a worker is killed, as a kernel short of memory does.
    """
    if workers <= 1:
        yield from map(function, tasks)
        return
    # Spawned, not forked: the caller may hold the threads and locks of torch.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        tasks = iter(tasks)
        running, wanted = set(), 3 * workers
        while True:
            for task in itertools.islice(tasks, wanted):
                with _interrupt_held():
                    running.add(pool.submit(function, task))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            wanted = len(done)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process was killed, perhaps for memory: run again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Processes started inside never hear Ctrl-C, not even while they import: the parent does, and stops them.

    They inherit the mask. In the parent it is not enough: the kernel then gives the signal to any other thread, such as
    OpenBLAS's, and Python raises in the main one. So the handler, too, waits until the processes have started.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


def _start_worker() -> None:
    # A worker whose parent was killed would wait for tasks for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait_for([parent.sentinel]), os._exit(1)), daemon=True).start()
