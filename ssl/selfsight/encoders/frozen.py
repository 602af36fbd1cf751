"""A trained teacher from a folder: its encoder and, where the folder has them, its projection heads, all frozen.

In: a timm-layout folder (`config.json`, `model.safetensors`: an export, or what a hub hands out), which has no heads;
or a checkpoint folder of a run (`state.json`, `objective.safetensors`), which has. JSON and safetensors only, and every
name and shape checked: a stranger's folder can be wrong, but not run anything.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from selfsight.encoders.build import build
from selfsight.encoders.encoder import Encoder
from selfsight.encoders.heads import DINOHead
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig
from selfsight.viewspec import MEAN, STD

EXPORT_ARGS = ("img_size", "dynamic_img_size", "fc_norm", "use_fc_norm", "global_pool")  # timm's, not the encoder's


@dataclass(frozen=True)
class Frozen:
    encoder: Encoder
    head: DINOHead | None  # of class tokens; None in a folder without
    patch_head: DINOHead | None  # of patch tokens, the same module where one head is for both


def read_frozen(folder: str | Path) -> Frozen:
    """The teacher in `folder`, on the CPU, in evaluation mode, without gradients. Raises UserError for a folder that is
    neither, is damaged, or holds weights of another architecture than it says."""
    folder = Path(folder)
    if (folder / "state.json").is_file():
        tensors = _tensors(folder / "objective.safetensors")
        encoder = read_checkpoint_encoder(folder, tensors)
        head = _head(folder, _below(tensors, "teacher_head."))
        patch_head = _head(folder, _below(tensors, "teacher_patch_head.")) or head
    elif (folder / "config.json").is_file():
        said = _timm_encoder(folder)
        tensors = _tensors(folder / "model.safetensors")
        encoder = _encoder(folder, said, {k: v for k, v in tensors.items() if not k.startswith("head.")})
        head = patch_head = None
    else:
        raise UserError(f"{folder} is no teacher: give an export, timm's folder of a model, or a run's checkpoint")
    for module in (encoder, head, patch_head):
        if module is not None:
            module.requires_grad_(False).eval()
    return Frozen(encoder, head, patch_head)


def read_checkpoint_encoder(folder: Path, tensors: dict[str, Tensor]) -> Encoder:
    """The teacher in a run's checkpoint, all of whose tensors are given, or the student where there is none."""
    which = "teacher" if any(name.startswith("teacher.vit.") for name in tensors) else "student"
    return _encoder(folder, _json(folder / "state.json").get("encoder"), _below(tensors, f"{which}.vit."))


def _timm_encoder(folder: Path) -> dict[str, Any]:
    """What `config.json` says, as state.json says it."""
    config = _json(folder / "config.json")
    pretrained = config.get("pretrained_cfg") or {}
    for key, ours in (("mean", MEAN), ("std", STD)):
        if tuple(pretrained.get(key, ours)) != ours:
            raise UserError(f"{folder} wants images of {key} {pretrained[key]}, here it is {list(ours)}: take another")
    args = config.get("model_args") or {}
    origin = folder / "selfsight.json"
    return {
        "name": config.get("architecture"),
        "img_size": args.get("img_size") or pretrained.get("input_size", (0,))[-1],
        "args": {k: v for k, v in args.items() if k not in EXPORT_ARGS},
        "pos_interpolation": _json(origin).get("pos_interpolation") if origin.is_file() else "timm",
    }


def _encoder(folder: Path, said: Any, tensors: dict[str, Tensor]) -> Encoder:
    try:
        config = EncoderConfig(**{k: v for k, v in said.items() if k != "pos_interpolation"})
        how = said["pos_interpolation"]
        kinds = isinstance(config.name, str), type(config.img_size) is int, isinstance(config.args, dict)
        malformed = not all(kinds) or how not in ("dino", "timm")
    except (AttributeError, KeyError, TypeError):
        malformed = True
    if malformed:
        raise UserError(f"{folder} does not say which encoder its weights belong to: export them again")
    with torch.random.fork_rng(devices=[]):  # building draws initial weights
        encoder = build(config, drop_path=False, pos_interpolation=how)
    _load(folder, encoder.vit, tensors)
    return encoder


def _head(folder: Path, tensors: dict[str, Tensor]) -> DINOHead | None:
    """The head whose sizes are those of its tensors; None if there are none."""
    if not tensors:
        return None
    layers = [tensors[name] for name in sorted(tensors) if name.startswith("mlp.") and name.endswith(".weight")]
    normed = "last_layer.weight_v" in tensors
    prototypes = tensors.get("last_layer.weight_v" if normed else "last_layer.weight")
    if prototypes is None or not layers or any(x.ndim != 2 for x in (*layers, prototypes)):
        raise UserError(f"{folder} has a projection head of an unknown kind: take a checkpoint of dino, ibot or dinov2")
    with torch.random.fork_rng(devices=[]):
        head = DINOHead(
            layers[0].shape[1],
            len(prototypes),
            hidden_dim=len(layers[0]),
            bottleneck_dim=len(layers[-1]),
            nlayers=len(layers),
            weight_norm=normed,
        )
    _load(folder, head, tensors)
    return head


def _load(folder: Path, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as e:
        raise UserError(f"the weights in {folder} are of another architecture: {' '.join(str(e).split())[:300]}") from e


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is missing or not a whole safetensors file ({e}): take it from elsewhere again") from e


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not JSON ({e}): take it from elsewhere again") from e
    if not isinstance(document, dict):
        raise UserError(f"{path} should hold a JSON object: take it from elsewhere again")
    return document
