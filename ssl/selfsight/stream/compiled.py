"""How the loops of the stream are compiled: outside the GIL, once for this machine, fused multiply-adds allowed.

Sums keep the order in which they are written, so that a result does not depend on the width of a vector unit.
"""

from collections.abc import Callable

from numba import njit


def compiled(function: Callable) -> Callable:
    """`numba.njit`, its machine code kept beside the source or, where that is read-only, in the user's cache folder."""
    options = {"nogil": True, "fastmath": {"contract", "nsz"}, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither folder can be written: every process compiles for itself
        return njit(**options)(function)
