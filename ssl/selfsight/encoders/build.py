"""From an `EncoderConfig` to an `Encoder`. timm holds the architectures; this module checks what the recipe asks of it,
so that a wrong name or argument ends in one sentence and not in a traceback from inside timm.
"""

import difflib
import inspect
from contextlib import nullcontext
from typing import Any

import timm
import torch
from timm.layers.drop import DropPath
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from selfsight.encoders.blocks import is_residual
from selfsight.encoders.encoder import Encoder, PosInterpolation
from selfsight.encoders.execution import check_checkpointing
from selfsight.encoders.initialise import initialise
from selfsight.encoders.rope import AUGMENTATIONS, KINDS
from selfsight.errors import UserError, check_range
from selfsight.recipe import EncoderConfig

# Arguments of timm that have their own key in a recipe, or that would take the encoder's contract away.
ELSEWHERE = {
    "img_size": "use encoder.img_size",
    "drop_path_rate": "use encoder.drop_path_rate",
    "in_chans": "images are RGB",
    "num_classes": "an encoder has no classifier",
    "global_pool": "an encoder returns all tokens",
    "fc_norm": "the final norm is applied to every token",
    "use_fc_norm": "the final norm is applied to every token",
    "use_post_transformer_norm": "the final norm is applied to every token",
    "dynamic_img_size": "any size works already",
    "dynamic_img_pad": "give images whose sides are multiples of the patch",
    "patch_drop_rate": "masking is the objective's business",
}


def build(
    config: EncoderConfig,
    *,
    drop_path: bool = True,
    pos_interpolation: PosInterpolation = "timm",
    device: str | torch.device | None = None,
) -> Encoder:
    """A freshly initialised encoder (timm's initialisation: an objective may lay its own over it).

    `drop_path=False` builds it without stochastic depth and without RoPE's augmentation, for teachers and for
    inference; the parameters are the same. With a `device` it is made there at once, without passing through the CPU's
    memory; on "meta" it has shapes and no numbers. Raises UserError for a name that is no timm VisionTransformer or
    Eva, and for arguments that it does not take.
    """
    _check_name(config.name)
    _check_args(config)
    check_range("encoder.drop_path_rate", config.drop_path_rate, 0, 1)
    checkpointing = check_checkpointing(config.checkpointing)
    with nullcontext() if device is None else torch.device("meta"):
        vit = _create(config, drop_path)
    if config.drop_path_uniform and drop_path:
        _drop_uniformly(vit, config)
    vit.reset_classifier(0, "token" if vit.cls_token is not None else "avg")
    height, width = (int(side) for side in vit.patch_embed.patch_size)
    if height != width:
        raise UserError(f"encoder.args.patch_size is {height}×{width}: choose a square patch")
    if config.img_size % height:
        raise UserError(
            f"encoder.img_size={config.img_size} is not a multiple of the patch size {height}: "
            f"use {max(config.img_size // height, 1) * height}"
        )
    if device is not None and torch.device(device).type != "meta":
        initialise(vit, device)
    return Encoder(vit, pos_interpolation=pos_interpolation, checkpointing=checkpointing, compile=config.compile)


def model_args(config: EncoderConfig) -> dict[str, Any]:
    """The arguments with which `timm.create_model(config.name, …)` makes the same architecture, for exports."""
    norm = {"use_fc_norm": False, "global_pool": "token"} if _is_eva(config.name) else {"fc_norm": False}
    return {"img_size": config.img_size, "dynamic_img_size": True, **norm, **config.args}


def _create(config: EncoderConfig, drop_path: bool) -> Any:
    for key in ("patch_size", "embed_dim", "depth", "num_heads"):
        if isinstance(value := config.args.get(key), int):
            check_range(f"encoder.args.{key}", value, 1)
    args = {
        **model_args(config),
        "num_classes": 0,
        "drop_path_rate": config.drop_path_rate if drop_path else 0.0,
        "global_pool": "",  # whether there is a class token to pool is known once it is built
    }
    if not drop_path:
        args = {key: value for key, value in args.items() if key not in AUGMENTATIONS}
    try:
        vit = timm.create_model(config.name, pretrained=False, **args)
    except (TypeError, AssertionError, ValueError, RuntimeError, LookupError, ArithmeticError) as e:
        raise UserError(f"timm cannot build {config.name} with encoder.args={config.args}: {_one_line(e)}") from e
    if type(vit) not in (VisionTransformer, Eva) or not isinstance(vit.patch_embed, PatchEmbed):
        raise UserError(f"timm's {config.name} is not a plain Vision Transformer: choose one that is")
    if isinstance(vit, Eva) and vit.rope is not None and type(vit.rope) not in KINDS:
        raise UserError(f"{config.name} has rotary positions of its own kind: use encoder.args.rope_type=dinov3 or cat")
    return vit


def _drop_uniformly(vit: Any, config: EncoderConfig) -> None:
    for block in vit.blocks:
        if not is_residual(block):
            raise UserError(f"encoder.drop_path_uniform is not there for the blocks of {config.name}: set it to false")
        block.drop_path1, block.drop_path2 = DropPath(config.drop_path_rate), DropPath(config.drop_path_rate)


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        raise UserError(f"timm has no model called {name!r}: did you mean {_nearest(name)}?")
    if name.split(".")[0] not in _vits():
        raise UserError(f"timm's {name} is not a plain Vision Transformer: choose one that is, {_nearest(name)} say")


def _vits() -> list[str]:
    return [name for module in ("vision_transformer", "deit", "eva") for name in timm.list_models(module=module)]


def _is_eva(name: str) -> bool:
    return name.split(".")[0] in timm.list_models(module="eva")


def _nearest(name: str) -> str:
    return difflib.get_close_matches(name, _vits(), n=1, cutoff=0.0)[0]


def _check_args(config: EncoderConfig) -> None:
    architecture = Eva if _is_eva(config.name) else VisionTransformer
    known = set(inspect.signature(architecture.__init__).parameters) - {"self", "device", "dtype"}
    for key in config.args:
        if key in ELSEWHERE:
            raise UserError(f"encoder.args.{key} cannot be set: {ELSEWHERE[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, known - ELSEWHERE.keys(), n=1, cutoff=0.0)
            raise UserError(f"unknown key encoder.args.{key}: did you mean encoder.args.{near[0]}?")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
