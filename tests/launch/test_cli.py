"""The command's frame: one line and exit 2 for what a user can mend."""

import argparse

import pytest

from launch import cli
from selfsight.errors import UserError


def verb_that_raises(monkeypatch, error: BaseException) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    class Verb:
        @staticmethod
        def add(subparsers) -> None:
            subparsers.add_parser("verb").set_defaults(run=run)

    monkeypatch.setattr(cli, "COMMANDS", [Verb])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("no\nsuch thing: make it"), 2, "selfsight: no such thing: make it\n"),
        (OSError(28, "No space left on device", "shard"), 2, "shard: No space left on device: free some space"),
        (
            OSError(21, "Is a directory", ".tmp", None, "out"),
            2,
            "selfsight: out: Is a directory: choose another place\n",
        ),
        (OSError(5, "Input/output error", "disk"), 2, "Input/output error"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_mistake_is_one_line_and_exit_two(monkeypatch, capsys, error, code, said):
    verb_that_raises(monkeypatch, error)
    assert cli.main(["verb"]) == code
    out, err = capsys.readouterr()
    assert said in err
    assert err.count("\n") == 1
    assert not out


def test_a_bug_keeps_its_traceback(monkeypatch):
    verb_that_raises(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["verb"])


@pytest.mark.parametrize("argv", [[], ["no-such-verb"], ["pretrain"], ["corpus", "build", "x"], ["eval", "knn"]])
def test_wrong_arguments_are_one_line_and_exit_two(capsys, argv):
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["--help"])
    assert e.value.code == 0
    shown = capsys.readouterr().out
    for verb in ("corpus", "pretrain", "export", "eval", "info", "quickstart", "report"):
        assert verb in shown
