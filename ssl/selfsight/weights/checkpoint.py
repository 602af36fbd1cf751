"""A checkpoint → an export. Reads `recipe.yaml`, `state.json` and `objective.safetensors`: no pickle, no trainer."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from selfsight import encoders
from selfsight.encoders.encoder import PosInterpolation
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig
from selfsight.weights.export import export_encoder
from selfsight.weights.folder import Export, read_tensors
from selfsight.weights.run import checkpoints, exports, read_recipe, read_state, recipe_digest

OBJECTIVE = "objective.safetensors"


def export_run(run: Path, out: Path, *, which: str | None = None, step: int | None = None) -> Path:
    """Exports an encoder of `run` to the folder `out` and returns it.

    `which` is "teacher" or "student"; None takes the teacher if the objective has one. `step` None is the newest
    complete checkpoint. Raises UserError when there is no such checkpoint or encoder.
    """
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
    state = read_state(found[step])
    with torch.random.fork_rng(devices=[]):
        encoder = encoders.build(config, drop_path=False, pos_interpolation=_pos_interpolation(run, state))
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


def _pos_interpolation(run: Path, state: dict[str, Any]) -> PosInterpolation:
    """How the objective resizes position embeddings: as the checkpoint says, or as the run's own exports do."""
    if said := (state.get("encoder") or {}).get("pos_interpolation"):
        return said
    for path in exports(run).values():
        return Export.open(path).origin["pos_interpolation"]
    return "timm"
