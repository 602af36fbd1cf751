"""The `selfsight` command. Each verb is one module of `launch.commands`; what a user can mend ends in one line, exit 2.

Verbs are imported only to build their parsers, which touches nothing heavy, so that `selfsight --help` answers at once.
"""

import argparse
import sys

from selfsight.errors import UserError

from launch.commands import COMMANDS


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="selfsight",
        description="Self-supervised representation learning for large unlabelled image corpora.",
    )
    verbs = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(verbs)
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except (UserError, OSError) as e:
        print(f"selfsight: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("selfsight: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
