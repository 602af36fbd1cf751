"""Weights that a run starts from, when it does not start from nothing: what an earlier run has learnt.

In: an objective as it was built, and a folder. A run or a checkpoint gives its heads, its teachers and all the rest, to
the next phase of the same method (DINOv2's and DINOv3's high resolution, Gram anchoring); an export gives its encoder,
to any objective. Students start as their teachers do, as in the official codes: the average is what was learnt. Nothing
is matched by guessing; what does not fit is refused by name.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from selfsight import encoders
from selfsight.encoders import Encoder
from selfsight.encoders.positions import resampling_matrix
from selfsight.errors import UserError
from selfsight.files import sha256_of
from selfsight.objectives import Objective
from selfsight.weights import fingerprint
from selfsight.weights.checkpoint import OBJECTIVE
from selfsight.weights.pretrained import load_pretrained
from selfsight.weights.run import checkpoints, is_run

TABLE = ".vit.pos_embed"


@dataclass(frozen=True)
class Source:
    """Weights to start from."""

    path: Path  # of the export or the checkpoint
    digest: str  # sha256 of the file that holds them
    encoder: Encoder  # the teacher, or the student where there is none; on the CPU
    state: dict[str, Tensor] | None  # of the whole objective; None in an export


def read_source(folder: str) -> Source:
    """What `folder` holds: an export, a checkpoint, or a run, of which the newest checkpoint is taken.

    Raises UserError for anything else, for files that are damaged, and for an export that does not reproduce its
    fingerprint.
    """
    path = Path(folder)
    if is_run(path):
        if not (found := checkpoints(path)):
            raise UserError(f"{path} has no complete checkpoint yet: let `selfsight pretrain` reach its first one")
        path = found[max(found)]
    if not (path / "state.json").is_file():
        export = load_pretrained(path)
        return Source(path, export.digest, export.encoder, None)
    if not (path / "COMPLETE").is_file():
        raise UserError(f"{path} is not a complete checkpoint: take another one")
    try:
        state = load_file(path / OBJECTIVE)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path / OBJECTIVE} is missing or not whole ({e}): take another checkpoint") from e
    return Source(path, sha256_of(path / OBJECTIVE), encoders.read_checkpoint_encoder(path, state), state)


def inherit(objective: Objective, source: Source) -> str:
    """Puts the weights of `source` into `objective`, on the CPU, and returns a sentence about it.

    Raises UserError naming what is missing, left over or of another shape, and when the encoder then answers otherwise
    than that of `source` (its names and shapes may agree and the number of its heads may not). Position tables of
    another size are resampled as the source's encoder does when it sees that size.
    """
    own, names = objective.state_dict(), {module: name for name, module in objective.named_modules()}
    pairs = [(names[student], names[teacher]) for student, teacher in objective.teacher_pairs()]
    seeing = ["student", *(teacher for student, teacher in pairs if student == "student")]
    if source.state is not None:
        state, wanted, advice = dict(source.state), own.keys(), "; or start from one of its exports: encoders alone"
    else:
        state = {f"{name}.{key}": x for name in seeing for key, x in source.encoder.state_dict().items()}
        wanted, advice = {key for key in own if key.startswith(tuple(f"{name}.vit." for name in seeing))}, ""
    for student, teacher in pairs:
        taught = {key.removeprefix(f"{teacher}."): x for key, x in state.items() if key.startswith(f"{teacher}.")}
        state |= {f"{student}.{key}": x for key, x in taught.items()}
    state = objective.inherit(state)
    tables = {key for key in state.keys() & own.keys() if key.endswith(TABLE) and state[key].shape != own[key].shape}
    for key in tables:
        encoder: Any = objective.get_submodule(key.removesuffix(TABLE))
        state[key] = _resampled(state[key], source.encoder, encoder)
    if apart := _difference(own, state, wanted):
        raise UserError(f"{source.path} {apart}: give encoder and objective the values they had there{advice}")
    objective.load_state_dict(own | state)
    size = objective.student.table_grid[0] * objective.student.patch_size
    expected, found = (fingerprint.take(encoder, size) for encoder in (source.encoder, objective.student))
    if apart := fingerprint.difference(expected, found):
        raise UserError(
            f"with the weights in {source.path} the encoder answers otherwise than it does there ({apart}): give "
            "encoder the name and the args it was trained with"
        )
    what = "encoder" if source.state is None else "all weights"
    grids = "×".join(map(str, objective.student.table_grid))
    said = f"; its position table is resampled to {grids} patches" if tables else ""
    return f"{what} from {source.path} (sha256 {source.digest[:12]}…){said}"


def _resampled(table: Tensor, old: Encoder, new: Encoder) -> Tensor:
    """A position table (1, P + N, D) made for the grid of `old`, for that of `new`; as it is if it is none of these."""
    (old_rows, old_columns), (rows, columns) = old.table_grid, new.table_grid
    prefix = new.vit.pos_embed.shape[1] - rows * columns
    if table.ndim != 3 or table.shape[1] != prefix + old_rows * old_columns:
        return table
    matrix = resampling_matrix(old.table_grid, new.table_grid, old.pos_interpolation).to(table.dtype)
    return torch.cat([table[:, :prefix], matrix @ table[:, prefix:]], dim=1)


def _difference(own: dict[str, Tensor], state: dict[str, Tensor], wanted: Iterable[str]) -> str | None:
    """In words, the first way in which `state` does not fit, if any."""
    if missing := sorted(set(wanted) - state.keys()):
        return f"lacks {_list(missing)}, which this objective has"
    if extra := sorted(state.keys() - own.keys()):
        return f"has {_list(extra)}, which this objective has not"
    for key in sorted(state):
        if state[key].shape != own[key].shape:
            return f"has {key} of shape {tuple(state[key].shape)}, here it is {tuple(own[key].shape)}"
    return None


def _list(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
