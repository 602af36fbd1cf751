"""The one exception for mistakes a user can mend: the command line prints its sentence and exits with 2."""

from math import inf


class UserError(ValueError):
    """Something the user can put right. The message is one line: what is wrong, then what to do."""


def check_range(name: str, value: float, low: float, high: float = inf) -> None:
    """Raises UserError unless `low` ≤ `value` ≤ `high` and `value` is finite; a NaN lies in no range."""
    if not (low <= value <= high and value < inf):
        raise UserError(f"{name} is {value}: give {f'{low} to {high}' if high < inf else f'{low} or more'}")
