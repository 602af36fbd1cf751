"""The `selfsight` command. Each verb is one module of `launch.commands`; what a user can mend ends in one line, exit 2.

Verbs are imported only to build their parsers, which touches nothing heavy, so that `selfsight --help` answers at once.
"""

import argparse
import errno
import io
import os
import sys
from typing import NoReturn

from launch.commands import COMMANDS
from selfsight import __version__
from selfsight.errors import UserError

FULL = "free some space, then give the same command again"
FORBIDDEN = "mend its permissions, or choose another place"
MISPLACED = "choose another place"
# What the user can do about what the operating system refused.
REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EACCES: FORBIDDEN,
    errno.EPERM: FORBIDDEN,
    errno.EROFS: MISPLACED,
    errno.ENOTDIR: MISPLACED,
    errno.EISDIR: MISPLACED,
    errno.EEXIST: MISPLACED,
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, as all others here are."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="selfsight",
        description="Self-supervised representation learning for large unlabelled image corpora.",
    )
    top.add_argument("--version", action="version", version=f"selfsight {__version__}")
    verbs = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(verbs)
    return top


def parse(argv: list[str] | None) -> argparse.Namespace:
    top = parser()
    args, rest = top.parse_known_args(argv)
    # argparse does not look for `key=value` again once an option came between: `pretrain CONFIG --print seed=1`.
    if rest and hasattr(args, "overrides") and all("=" in r and not r.startswith("-") for r in rest):
        args.overrides += rest
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names are bytes, not all of them are text
    args = parse(argv)
    try:
        return args.run(args)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as e:
        print(f"selfsight: {' '.join(_sentence(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("selfsight: interrupted; the same command again goes on", file=sys.stderr)
        return 130


def _sentence(e: UserError | OSError) -> str:
    if not isinstance(e, OSError) or e.errno not in REMEDIES:
        return str(e)
    where = e.filename2 or e.filename  # of a rename, where it should have led
    return f"{f'{where}: ' if where else ''}{e.strerror}: {REMEDIES[e.errno]}"


if __name__ == "__main__":
    sys.exit(main())
