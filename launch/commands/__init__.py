"""One module per verb: `add(subparsers)` describes its options, `run(args)` does the work and gives the exit code."""

import importlib
import pkgutil

# The order in which help lists them.
COMMANDS = [
    importlib.import_module(f"{__name__}.{name}") for name in sorted(m.name for m in pkgutil.iter_modules(__path__))
]
