"""Imports run downhill only: launch → eval_probes → selfsight, and inside selfsight as the table below says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND = {"collective", "console", "errors", "files", "machine", "masks", "recipe", "viewspec"}
# room → the rooms it may import, beside itself and the ground
ROOMS = {
    "shards": set(),
    "corpus": {"shards"},
    "stream": {"shards"},
    "encoders": set(),
    "losses": set(),
    "objectives": {"encoders", "losses"},
    "weights": {"encoders"},
    "training": {"objectives", "encoders", "stream", "shards", "weights"},
}
WITHOUT_TORCH = ["ssl/selfsight/shards", "ssl/selfsight/corpus", "ssl/selfsight/stream/order.py"]


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports out in full"
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def room(name: str) -> str | None:
    """The room or ground module of a dotted name; None for other packages and for selfsight's own attributes."""
    parts = name.split(".")
    return parts[1] if parts[0] == "selfsight" and parts[-1] != "__version__" else None


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_rooms_import_downhill(name):
    allowed = ROOMS[name] | GROUND | {name}
    for path in (ROOT / "ssl/selfsight" / name).rglob("*.py"):
        for imported in imports(path):
            assert imported.split(".")[0] not in {"eval_probes", "launch"}, f"{path} imports {imported}"
            assert room(imported) in allowed | {None}, f"{path} imports {imported}"


def test_the_ground_stands_on_nothing():
    for name in GROUND:
        for imported in imports(ROOT / "ssl/selfsight" / f"{name}.py"):
            assert imported.split(".")[0] not in {"eval_probes", "launch"}
            assert room(imported) in GROUND | {None}, f"{name} imports {imported}"


def test_every_room_is_in_the_table():
    rooms = {p.name for p in (ROOT / "ssl/selfsight").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms == set(ROOMS)


def test_probes_do_not_know_the_trainer_or_the_launcher():
    for path in (ROOT / "eval_probes").rglob("*.py"):
        for imported in imports(path):
            assert imported.split(".")[0] != "launch", f"{path} imports {imported}"
            if imported != "selfsight.stream.views.Views":  # how any crop is made; the order of a run is the trainer's
                assert room(imported) not in {"objectives", "stream"}, f"{path} imports {imported}"


@pytest.mark.parametrize("place", WITHOUT_TORCH)
def test_bytes_know_no_torch(place):
    paths = [ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py")
    for path in paths:
        assert not {i for i in imports(path) if i.split(".")[0] in {"torch", "torchvision", "timm"}}, path
