"""Checkpoints: a folder that appears whole or not at all, holds all that training needs, and says what it belongs to.

    checkpoints/step_00000100/  deepspeed/ (optimiser)  objective.safetensors (all weights, fp32)  state.json  COMPLETE

Written under a hidden name, flushed to the disk, marked COMPLETE, renamed. No generator's state is in it: the order of
samples, the crops and torch's own numbers follow from (seed, step). DeepSpeed keeps its part as pickles, so a run is
continued by those who trust whoever wrote it; exports, and loading them, read safetensors and JSON alone.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from selfsight.errors import UserError
from selfsight.files import sync, sync_files
from selfsight.training import sharding
from selfsight.training.cluster import Cluster
from selfsight.training.engine import STATE, Engine
from selfsight.weights.checkpoint import OBJECTIVE
from selfsight.weights.folder import read_tensors, share
from selfsight.weights.run import STATE_SCHEMA, checkpoints, read_state

# What a checkpoint must have in common with the run that takes it up → how to speak of it.
IDENTITY = {
    "corpus_id": "corpus",
    "encoder": "encoder",
    "objective": "objective",
    "batch_size": "batch_size",
    "lanes": "stream.lanes",
    "window": "stream.window",
    "seed": "seed",
    "total_steps": "number of steps",
    "zero": "ZeRO stage",
}


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of `run`."""
    found = checkpoints(run)
    return found[max(found)] if found else None


def save(run: Path, engine: Engine, state: dict[str, Any], *, keep: int) -> Path:
    """Writes the checkpoint of `state["step"]` and removes all complete ones but the newest `keep`. All ranks call it.

    Raises UserError when the disk does not take it; the checkpoints that were there are still there.
    """
    cluster: Cluster = engine.cluster
    final = run / "checkpoints" / f"step_{state['step']:08d}"
    temporary = final.with_name(f".{final.name}")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def publish() -> None:
        save_file(weights, temporary / OBJECTIVE)
        for script in temporary.glob("zero_to_*.py"):  # DeepSpeed's converters: the safetensors file is what they make
            script.unlink()
        document = {"schema": STATE_SCHEMA, **state, "files": _sizes(temporary / STATE)}
        (temporary / "state.json").write_text(json.dumps(document, indent=1) + "\n")
        share(temporary / OBJECTIVE, like=temporary / "state.json")
        sync_files(temporary / STATE)
        sync_files(temporary)
        (temporary / "COMPLETE").touch()
        sync_files(temporary)
        if final.exists():  # of a run that went on from an earlier checkpoint
            _remove(final)
        temporary.rename(final)
        sync(final.parent)
        for old in sorted(checkpoints(run).values())[:-keep]:
            _remove(old)

    cluster.on_first(lambda: _tell(final, begin))
    cluster.together(lambda: _tell(final, lambda: engine.save(temporary)))
    weights = engine.whole_state()
    cluster.on_first(lambda: _tell(final, publish))
    return final


def check(path: Path, state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises UserError naming the first thing in which a checkpoint belongs to another run than `expected`."""
    for key, called in IDENTITY.items():
        if state.get(key) != expected[key]:
            raise UserError(
                f"{path} is from another {called} ({_short(state.get(key))}, now {_short(expected[key])}): "
                "give another output, or the recipe and corpus it was made with"
            )
    finished = state["step"] >= state["total_steps"]
    if state["zero"] and not finished and state["world_size"] != expected["world_size"]:
        raise UserError(
            f"{path} was written by {state['world_size']} processes under ZeRO-{state['zero']} and this is "
            f"{expected['world_size']}: "
            f"start {state['world_size']} processes (ZeRO-0 checkpoints go with any number)"
        )


def load(path: Path, engine: Engine) -> None:
    """Puts `engine` where it was when the checkpoint was written. All ranks call it.

    Un-pickles DeepSpeed's files. Raises UserError when a file or a tensor is missing, cut short or of another shape.
    """
    files = read_state(path).get("files", {})
    there = _sizes(path / STATE)
    # DeepSpeed goes on without the moments of a file that it does not find.
    if damaged := [name for name, size in files.items() if there.get(name) != size]:
        raise UserError(
            f"{path} is damaged ({STATE}/{damaged[0]} is missing or cut short): "
            "remove it to continue from the one before"
        )
    engine.load(path, read_tensors(path / OBJECTIVE, sharding.shapes(engine.objective)))


def _sizes(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def sweep(run: Path) -> None:
    """Removes what a killed process left half written or half removed."""
    for path in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(path)


def _remove(path: Path) -> None:
    hidden = path.with_name(f".{path.name}.old")  # never a COMPLETE one with files missing
    path.rename(hidden)
    shutil.rmtree(hidden)


def _tell(path: Path, work: Callable[[], None]) -> None:
    try:
        work()
    except (OSError, SafetensorError, RuntimeError) as e:
        # torch and safetensors report a full disk as their own errors
        if isinstance(e, RuntimeError) and not re.search("PytorchStreamWriter|inline_container", str(e)):
            raise
        shutil.rmtree(path.with_name(f".{path.name}"), ignore_errors=True)
        raise UserError(
            f"{path} could not be written ({' '.join(str(e).split())[:200]}): "
            "make room, then give the same command again; it continues from the checkpoint before"
        ) from e


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return text if len(text) <= 80 else text[:77] + "…"
