"""Checkpoints: a folder that appears whole or not at all, holds all that training needs, and says what it belongs to.

    checkpoints/step_00000100/
        objective.safetensors         all weights, teacher, centres, queues: whole, fp32
        optimizer/00000.safetensors   what that rank's optimiser held, as stretches of named parameters
        state.json                    step, place in the stream, seed, size and sha256 of every file
        COMPLETE

Written under a hidden name, flushed to the disk, marked COMPLETE, renamed. Every process takes out of it what it needs,
so that any number of processes and any ZeRO stage go on from it. No generator's state is in it: the order of samples,
the crops and torch's own numbers follow from (seed, step), as the schedules do. There is no pickle in it.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfsight.errors import UserError
from selfsight.files import sha256_of, sync, sync_files
from selfsight.training import sharding
from selfsight.training.cluster import Cluster
from selfsight.training.engine import Engine
from selfsight.training.pieces import Piece, by_shard, inner, pieces
from selfsight.training.snapshot import Snapshot
from selfsight.weights.checkpoint import OBJECTIVE
from selfsight.weights.folder import read_tensors, share
from selfsight.weights.run import STATE_SCHEMA, checkpoints, read_state

T = TypeVar("T")

OPTIMIZER = "optimizer"
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
}
MEND = "remove it to continue from the one before"


def newest(run: Path) -> Path | None:
    """The newest complete checkpoint of `run`."""
    found = checkpoints(run)
    return found[max(found)] if found else None


def write(run: Path, cluster: Cluster, snapshot: Snapshot, state: dict[str, Any]) -> Path:
    """Writes the checkpoint of `state["step"]` out of every rank's snapshot. All ranks call it.

    Raises UserError, on all of them, when the disk does not take it; the checkpoints that were there are still there.
    """
    final = run / "checkpoints" / f"step_{state['step']:08d}"
    temporary = final.with_name(f".{final.name}")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / OPTIMIZER).mkdir(parents=True)

    def write_own() -> dict[str, Any]:
        written = {}
        mine = f"{OPTIMIZER}/{cluster.rank:05d}.safetensors"
        for name, tensors in ((OBJECTIVE, snapshot.objective), (mine, snapshot.optimizer)):
            if tensors is not None:
                save_file(tensors, temporary / name, {"starts": json.dumps(snapshot.starts)} if name == mine else None)
                sync(temporary / name)
                written[name] = {"bytes": (temporary / name).stat().st_size, "sha256": sha256_of(temporary / name)}
        return written

    def publish() -> None:
        document = {"schema": STATE_SCHEMA, **state, "files": {k: v for part in parts for k, v in part.items()}}
        (temporary / "state.json").write_text(json.dumps(document, indent=1) + "\n")
        for name in document["files"]:
            share(temporary / name, like=temporary / "state.json")
        sync_files(temporary / OPTIMIZER)
        sync_files(temporary)
        (temporary / "COMPLETE").touch()
        sync_files(temporary)
        if final.exists():  # of a run that went on from an earlier checkpoint
            remove(final)
        temporary.rename(final)
        sync(final.parent)

    cluster.on_first(lambda: _tell(final, begin))
    parts = cluster.gather_objects(cluster.together(lambda: _tell(final, write_own)))
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


def load(path: Path, engine: Engine) -> None:
    """Puts `engine` where it was when the checkpoint was written, whatever it has done since. All ranks call it; those
    that wrote may have been more or fewer.

    Raises UserError when a file is missing, damaged or not the one that was written, or is of another objective.
    """
    cluster = engine.cluster
    files: dict[str, Any] = read_state(path)["files"]
    cluster.together(lambda: _verify(path, dict(list(files.items())[cluster.rank :: cluster.world_size])))
    written = cluster.on_first(lambda: Written(path, [name for name in files if name != OBJECTIVE]))
    cluster.together(lambda: _take(path / OBJECTIVE, engine, written))


def _verify(path: Path, files: dict[str, Any]) -> None:
    for name, expected in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != expected["bytes"]:
            raise UserError(f"{path} is damaged ({name} is missing or cut short): {MEND}")
        if sha256_of(file) != expected["sha256"]:
            raise UserError(f"{path} is damaged ({name} is not what was written): {MEND}")


class Written:
    """What there is of the optimiser: which stretch of which state of which parameter lies in which file."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.stretches: dict[tuple[str, str], list[tuple[Path, int, int]]] = defaultdict(list)
        self.numbers: dict[tuple[str, str], Tensor] = {}  # of a parameter as a whole: its count of steps
        self.states: dict[str, list[str]] = defaultdict(list)  # of a parameter
        self._open: dict[Path, Any] = {}
        for name in names:
            with safe_open(path / name, framework="pt") as file:
                starts = json.loads(file.metadata()["starts"])
                for key in file.keys():  # noqa: SIM118
                    state, parameter = key.split("/", 1)
                    if state not in self.states[parameter]:
                        self.states[parameter].append(state)
                    shape = file.get_slice(key).get_shape()
                    if shape:
                        start = starts[parameter]
                        self.stretches[parameter, state].append((path / name, start, start + shape[0]))
                    else:
                        self.numbers[parameter, state] = file.get_tensor(key)

    def read(self, piece: Piece, state: str, into: Tensor) -> None:
        """Fills `into` (stop − start,) with the state of one piece, from whatever files have it."""
        for path, start, stop in self.stretches[piece.name, state]:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                if path not in self._open:
                    self._open[path] = safe_open(path, framework="pt")
                part = self._open[path].get_slice(f"{state}/{piece.name}")[first - start : last - start]
                into[first - piece.start : last - piece.start].copy_(part)


def _take(source: Path, engine: Engine, written: Written) -> None:
    sharding.load_state(engine.engine, read_tensors(source, sharding.shapes(engine.objective)))
    optimizer = inner(engine.engine.optimizer)
    # torch's own rule for where a count of steps lives.
    on_device = any(optimizer.defaults.get(key) for key in ("fused", "capturable"))
    for shard, parts in by_shard(pieces(engine.objective, engine.engine.optimizer)):
        states = sorted({state for piece in parts for state in written.states.get(piece.name, ())})
        held = {}
        for state in states:
            before = optimizer.state.get(shard, {}).get(state)
            numbers = [written.numbers[key] for piece in parts if (key := (piece.name, state)) in written.numbers]
            if numbers:  # as many steps as the shard has done; a parameter that got no gradient may have done fewer
                held[state] = max(numbers).to(shard.device if on_device else "cpu")
                continue
            # Zero is what the padding has, and a parameter without a state of its own.
            held[state] = torch.zeros_like(shard) if before is None else before.zero_()
            for piece in parts:
                written.read(piece, state, piece.of(held[state]))
        if held:
            optimizer.state[shard] = held
        else:
            optimizer.state.pop(shard, None)


def sweep(run: Path) -> None:
    """Removes what a killed process left half written or half removed."""
    for path in (run / "checkpoints").glob(".step_*"):
        shutil.rmtree(path)


def remove(path: Path) -> None:
    hidden = path.with_name(f".{path.name}.old")  # never a COMPLETE one with files missing
    path.rename(hidden)
    shutil.rmtree(hidden)


def _tell(path: Path, work: Callable[[], T]) -> T:
    try:
        return work()
    except (OSError, SafetensorError) as e:  # safetensors reports a full disk as its own error
        shutil.rmtree(path.with_name(f".{path.name}"), ignore_errors=True)
        raise UserError(
            f"{path} could not be written ({' '.join(str(e).split())[:200]}): "
            "make room, then give the same command again; it continues from the checkpoint before"
        ) from e


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return text if len(text) <= 80 else text[:77] + "…"
