"""The `selfsight` command. Each verb is one module of `launch.commands`; what a user can mend ends in one line, exit 2.

Verbs are imported only to build their parsers, which touches nothing heavy, so that `selfsight --help` answers at once.
"""

import argparse
import os
import sys
from typing import NoReturn

from launch.commands import COMMANDS
from selfsight import __version__
from selfsight.errors import UserError


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


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as e:
        print(f"selfsight: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("selfsight: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
