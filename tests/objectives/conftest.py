"""The conformance harness, which is a program for other processes as well as a module for the tests here."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from selfsight.objectives import available


@pytest.fixture(scope="session")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("objective_harness", Path(__file__).parent / "harness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def objectives(config: pytest.Config) -> list[str]:
    """Those of --objective, or all."""
    return config.getoption("objective") or available()


@pytest.fixture
def names(request) -> list[str]:
    return objectives(request.config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test of the conformance for each objective."""
    if metafunc.module.__name__.endswith("test_conformance") and "name" in metafunc.fixturenames:
        metafunc.parametrize("name", objectives(metafunc.config))
