"""The files of an export: `config.json` and `model.safetensors` as timm lays them out, `selfsight.json` beside them.

In: a folder. Out: its description and its tensors, every name, shape and byte checked before anything is used.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig

CONFIG, WEIGHTS, ORIGIN, CARD = "config.json", "model.safetensors", "selfsight.json", "README.md"
SCHEMA = 1
# What must be in the two files, and of what kind.
CONFIG_KINDS = {"architecture": str, "model_args": dict, "num_features": int, "pretrained_cfg": dict}
ORIGIN_KINDS = {
    "pos_interpolation": str,
    "preprocess": dict,
    "weights.sha256": str,
    "weights.parameters": int,
    "fingerprint": dict,
    "meta": dict,
}
# timm arguments that the export adds to the encoder's own.
SET_BY_EXPORT = ("img_size", "dynamic_img_size", "fc_norm", "use_fc_norm", "global_pool")


@dataclass(frozen=True)
class Export:
    """What the two JSON files of an export say."""

    path: Path
    config: dict[str, Any]  # config.json: what timm reads
    origin: dict[str, Any]  # selfsight.json: fingerprint, digest, preprocessing, where it came from

    @classmethod
    def open(cls, path: Path) -> "Export":
        """Raises UserError when `path` is no complete export or its JSON is malformed."""
        if not path.is_dir():
            raise UserError(f"there is no weights folder {path}: give an export folder or a run")
        missing = [name for name in (CONFIG, WEIGHTS, ORIGIN) if not (path / name).is_file()]
        if missing:
            raise UserError(
                f"{path} is not an export: {' and '.join(missing)} missing; make one with `selfsight export`"
            )
        config, origin = _read_json(path / CONFIG), _read_json(path / ORIGIN)
        if origin.get("schema") != SCHEMA:
            raise UserError(
                f"{path / ORIGIN} has schema {origin.get('schema')!r}, this selfsight reads {SCHEMA}: install the "
                "selfsight that wrote it, or export again"
            )
        for name, document, kinds in ((CONFIG, config, CONFIG_KINDS), (ORIGIN, origin, ORIGIN_KINDS)):
            for key, kind in kinds.items():
                value: Any = document
                for part in key.split("."):
                    value = value.get(part) if isinstance(value, dict) else None
                if not isinstance(value, kind):
                    raise UserError(f"{path / name} lacks {key}, or it is malformed: export the weights again")
        if origin["pos_interpolation"] not in ("dino", "timm"):
            raise UserError(f"{path / ORIGIN}: pos_interpolation should be dino or timm: export the weights again")
        return cls(path, config, origin)

    @property
    def encoder(self) -> EncoderConfig:
        """The encoder these weights belong to. Raises UserError when config.json does not say."""
        args = {k: v for k, v in self.config["model_args"].items() if k not in SET_BY_EXPORT}
        size = self.config["model_args"].get("img_size")
        if not isinstance(size, int) or not isinstance(self.config["architecture"], str):
            raise UserError(f"{self.path / CONFIG} does not name an architecture and an img_size: export again")
        return EncoderConfig(name=self.config["architecture"], img_size=size, args=args)

    @property
    def digest(self) -> str:
        """sha256 of model.safetensors, as recorded."""
        return self.origin["weights"]["sha256"]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not JSON: {e}; export the weights again") from e
    if not isinstance(document, dict):
        raise UserError(f"{path} should hold a JSON object: export the weights again")
    return document


def read_tensors(path: Path, expected: dict[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of the safetensors file `path` below `prefix`, named without it, mapped, not copied.

    `expected` gives the names, shapes and dtypes that must be there (its values are not read; meta tensors do). Names
    and shapes are compared on the header, before memory is taken. Raises UserError naming what is missing, left over or
    of another shape, and for a file that is cut short.
    """
    found: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = {name.removeprefix(prefix): name for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
            if missing := expected.keys() - names.keys():
                raise UserError(f"{path} lacks {_list(missing)}: these are not the weights of this encoder")
            if extra := names.keys() - expected.keys():
                raise UserError(f"{path} has tensors the encoder does not: {_list(extra)}; is it another architecture?")
            for short, name in names.items():
                part = file.get_slice(name)
                shape, want = tuple(part.get_shape()), tuple(expected[short].shape)
                if shape != want:
                    raise UserError(f"{path}: {name} has shape {shape}, the encoder needs {want}: another architecture")
            for short, name in names.items():
                found[short] = file.get_tensor(name)
    except (SafetensorError, FileNotFoundError) as e:
        raise UserError(f"{path} is not a whole safetensors file ({e}): take it from elsewhere again") from e
    for name, tensor in found.items():
        if tensor.dtype != expected[name].dtype:
            raise UserError(f"{path}: {name} is {tensor.dtype}, it should be {expected[name].dtype}: export it again")
    return found


def _list(names: Iterable[str], most: int = 5) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def share(path: Path, *, like: Path) -> None:
    """Gives `path`, which safetensors and mkdtemp write for their owner alone, the permissions that the umask gave to
    the file `like`; a folder can be entered by those who can read it."""
    mode = like.stat().st_mode & 0o666
    path.chmod(mode | ((mode & 0o444) >> 2 if path.is_dir() else 0))


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` on the CPU, contiguous, floating point as float32, no two entries sharing memory: what is written."""
    return {
        name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in state.items()
    }
