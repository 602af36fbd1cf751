"""A run folder seen from outside: its recipe, its complete checkpoints, its exports; and an export made from a checkpoint.

Reads `recipe.yaml`, `state.json` and `objective.safetensors`, never a pickle and never the trainer's code.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

from selfsight import encoders
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig
from selfsight.weights.folder import ORIGIN, Export, read_tensors

OBJECTIVE = "objective.safetensors"


def is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file()


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
    """sha256 of what a recipe says, wherever its corpus and its run lie on this machine."""
    said = {k: v for k, v in recipe.items() if k not in ("corpus", "output")}
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
        raise UserError(
            f"{run} has no exports yet: wait for its first checkpoint, or run `selfsight export {run} --out …`"
        )
    return found[max(found)]


def _steps(folder: Path) -> list[tuple[int, Path]]:
    numbered = [
        (int(p.name.removeprefix("step_")), p) for p in folder.glob("step_*") if p.name.removeprefix("step_").isdigit()
    ]
    return sorted(numbered)


def export_run(run: Path, out: Path, *, which: str | None = None, step: int | None = None) -> Path:
    """Exports an encoder of `run` to the folder `out` and returns it.

    `which` is "teacher" or "student"; None takes the teacher if the objective has one. `step` None is the newest complete
    checkpoint. Raises UserError when there is no such checkpoint or encoder.
    """
    from selfsight.weights.export import export_encoder

    run = Path(run)
    recipe = read_recipe(run)
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run} has no complete checkpoint yet: let `selfsight pretrain` reach its first one")
    step = max(found) if step is None else step
    if step not in found:
        raise UserError(f"{run} has no complete checkpoint at step {step}: there are {', '.join(map(str, found))}")
    source = found[step] / OBJECTIVE
    which = _choose(source, which)
    config = encoder_config(recipe)
    with torch.random.fork_rng(devices=[]):
        encoder = encoders.build(config, drop_path=False)
    state = _state(found[step])
    encoder.pos_interpolation = _pos_interpolation(run, state) or encoder.pos_interpolation
    encoder.vit.load_state_dict(read_tensors(source, encoder.vit.state_dict(), prefix=f"{which}.vit."), strict=True)
    meta = {
        "which": which,
        "objective": recipe["objective"].get("name"),
        "step": step,
        "corpus_id": state.get("corpus_id"),
        "recipe_digest": recipe_digest(recipe),
    }
    return export_encoder(encoder, config, Path(out), meta=meta)


def encoder_config(recipe: dict[str, Any]) -> EncoderConfig:
    try:
        return EncoderConfig(**recipe["encoder"])
    except TypeError as e:
        raise UserError(f"the encoder section of recipe.yaml has a key this selfsight does not know ({e})") from e


def _choose(source: Path, which: str | None) -> str:
    try:
        with safe_open(source, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, FileNotFoundError) as e:
        raise UserError(f"{source} is missing or not a whole safetensors file ({e}): take another checkpoint") from e
    there = [w for w in ("teacher", "student") if any(n.startswith(f"{w}.vit.") for n in names)]
    if not there:
        raise UserError(f"{source} holds no encoder: neither teacher.vit.* nor student.vit.* is in it")
    if which is not None and which not in there:
        raise UserError(f"this run has no {which}: export its {there[0]} instead")
    return which or there[0]


def _state(checkpoint: Path) -> dict[str, Any]:
    try:
        return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{checkpoint / 'state.json'} cannot be read ({e}): take another checkpoint") from e


def _pos_interpolation(run: Path, state: dict[str, Any]) -> str | None:
    """How the objective resizes position embeddings: as the checkpoint says, or as the run's own exports do."""
    if said := (state.get("encoder") or {}).get("pos_interpolation"):
        return said
    for path in exports(run).values():
        return Export.open(path).origin["pos_interpolation"]
    return None
