"""Self-supervised objectives: `selfsight/objectives/NAME.py` holds the one class that `objective.name=NAME` means."""

import importlib
import pkgutil

from selfsight.errors import UserError
from selfsight.objectives.base import Objective, Outcome, ParameterRule, Progress

__all__ = ["Objective", "Outcome", "ParameterRule", "Progress", "available", "find"]


def available() -> list[str]:
    """Names of the objectives in this package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name != "base")


def find(name: str) -> type[Objective]:
    """The objective class called `name`: a module of this package or a dotted path to a module of one's own.

    Raises UserError when there is no such module or it does not define exactly one Objective.
    """
    path = name if "." in name else f"{__name__}.{name}"
    if "." not in name and name not in available():
        raise UserError(f"no objective is called {name!r}: there are {', '.join(available())}")
    try:
        module = importlib.import_module(path)
    except (ModuleNotFoundError, TypeError) as e:  # TypeError: a name that begins with a dot
        raise UserError(f"objective {name!r} cannot be imported: {e}") from e
    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Objective) and c.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UserError(f"{path} must define one Objective, it defines {len(found)}")
    return found[0]
