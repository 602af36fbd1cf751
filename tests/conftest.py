"""Fixtures for all tests."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def golden() -> ModuleType:
    """The module tests/golden/golden.py: `golden.load("dino_loss").check(case, name, mine)`, `golden.to_dino(w)`, …"""
    spec = importlib.util.spec_from_file_location("golden_numbers", Path(__file__).parent / "golden" / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
