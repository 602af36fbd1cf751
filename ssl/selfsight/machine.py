"""What this process may use of its machine."""

import os


def available_cores() -> int:
    """Cores that this process may run on, which in a job or a container can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
