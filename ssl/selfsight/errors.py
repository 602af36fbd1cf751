"""The one exception for mistakes a user can mend: the command line prints its sentence and exits with 2."""


class UserError(ValueError):
    """Something the user can put right. The message is one line: what is wrong, then what to do."""
