"""A run folder seen from outside: its recipe, its complete checkpoints and its exports."""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from selfsight.errors import UserError
from selfsight.weights.folder import ORIGIN

STATE_SCHEMA = 2
# Keys of a recipe that change nothing about what is learnt: they may differ when a run goes on.
FREE = (
    *("corpus", "selection", "mixture", "unindexed.shards", "output"),  # what they hold is in the corpus id
    "weights",  # likewise in weights_sha256
    *(
        "encoder.compile",
        "stream.workers",
        "stream.crops",
        "stream.decode",
        "stream.max_damaged",
        "training.log_every",
        "training.zero",
        "training.offload",
        "training.checkpoint_every",
        "training.keep",
        "log.wandb",
        "log.mlflow",
        "training.patience",
        "training.returns",
        "training.return_on_spike",
        "probe.corpus",
        "probe.every",
        "probe.images",
        "training.keep_every",
        "training.keep_best",
    ),
)


def is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises UserError when it is damaged or of another version of selfsight."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        schema, _ = int(state["schema"]), int(state["step"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{checkpoint} is damaged (state.json: {e}): "
            "take another checkpoint, or remove it to continue from the one before"
        ) from e
    if schema > STATE_SCHEMA:
        raise UserError(
            f"{checkpoint} was written by a newer selfsight (schema {schema}, this one reads {STATE_SCHEMA}): update"
        )
    if schema < STATE_SCHEMA:
        raise UserError(
            f"{checkpoint} was written by an older selfsight (schema {schema}, this one reads {STATE_SCHEMA}): "
            "finish the run with that one, or begin it anew in another output"
        )
    return state


def read_recipe(run: Path) -> dict[str, Any]:
    """The resolved recipe of `run` as a plain dict. Raises UserError when it is no run or the file is damaged."""
    if not is_run(run):
        raise UserError(f"{run} is not a run: it has no recipe.yaml; give the output folder of `selfsight pretrain`")
    try:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{run / 'recipe.yaml'} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(recipe, dict) or not all(isinstance(recipe.get(k), dict) for k in ("encoder", "objective")):
        raise UserError(f"{run / 'recipe.yaml'} is not a recipe: encoder and objective are missing")
    return recipe


def recipe_digest(recipe: dict[str, Any]) -> str:
    """sha256 of what a recipe says about what is learnt: of all but the keys in `FREE`."""
    said = {k: dict(v) if isinstance(v, dict) else v for k, v in recipe.items() if k not in FREE}
    for section, _, key in (name.partition(".") for name in FREE if "." in name):
        if isinstance(said.get(section), dict):
            said[section].pop(key, None)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def checkpoints(run: Path) -> dict[int, Path]:
    """Step → folder of every complete checkpoint, oldest first."""
    return {step: path for step, path in _steps(run / "checkpoints") if (path / "COMPLETE").is_file()}


def exports(run: Path) -> dict[int, Path]:
    """Step → folder of every export in the run, oldest first."""
    return {step: path for step, path in _steps(run / "exports") if (path / ORIGIN).is_file()}


def newest_export(run: Path) -> Path:
    """The folder of the newest export. Raises UserError when there is none."""
    found = exports(Path(run))
    if not found:
        raise UserError(f"{run} has no exports yet: wait for its first checkpoint, or run `selfsight export {run}`")
    return found[max(found)]


def _steps(folder: Path) -> list[tuple[int, Path]]:
    numbered = [
        (int(p.name.removeprefix("step_")), p) for p in folder.glob("step_*") if p.name.removeprefix("step_").isdigit()
    ]
    return sorted(numbered)


def run_of(path: Path) -> Path | None:
    """The run that `path` is, or in whose `exports` it lies; None for anything else."""
    for folder, fits in ((path, True), (path.absolute().parent.parent, path.absolute().parent.name == "exports")):
        if fits and is_run(folder):
            return folder
    return None
