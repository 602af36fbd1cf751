"""Fixtures for all tests."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--objective", action="append", help="what tests/objectives/test_conformance.py is to test")


@pytest.fixture(scope="session")
def golden() -> ModuleType:
    """The module tests/golden/golden.py: `golden.load("dino_loss").check(case, name, mine)`, `golden.to_dino(w)`, …"""
    spec = importlib.util.spec_from_file_location("golden_numbers", Path(__file__).parent / "golden" / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_two(tmp_path):
    """Runs a file as a program in two processes: FILE RANK RENDEZVOUS ARGUMENTS…"""

    def run(file: str, *arguments: str) -> None:
        command = [sys.executable, file]
        rest = [str(tmp_path / "rendezvous"), *arguments]
        ranks = [subprocess.Popen([*command, str(r), *rest], stderr=subprocess.PIPE, text=True) for r in range(2)]
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)

    return run
