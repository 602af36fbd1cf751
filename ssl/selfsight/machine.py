"""What this process may use of its machine."""

import os
import socket
from pathlib import Path


def core_numbers() -> list[int]:
    """Cores that this process may run on, which in a job or a container can be fewer than there are."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def available_cores() -> int:
    """How many these are."""
    return len(core_numbers())


def machine_id() -> str:
    """The same for all processes of a machine, in whatever containers, and for those of no other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
