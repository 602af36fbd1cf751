"""From an `EncoderConfig` to an `Encoder`. timm holds the architectures; this module checks what the recipe asks of it,
so that a wrong name or argument ends in one sentence and not in a traceback from inside timm.
"""

import difflib
import inspect
from typing import Any

import timm
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer

from selfsight.encoders.encoder import Encoder, PosInterpolation
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
    "dynamic_img_size": "any size works already",
    "dynamic_img_pad": "give images whose sides are multiples of the patch",
    "patch_drop_rate": "masking is the objective's business",
}


def build(config: EncoderConfig, *, drop_path: bool = True, pos_interpolation: PosInterpolation = "timm") -> Encoder:
    """A freshly initialised encoder (timm's initialisation: an objective may lay its own over it).

    `drop_path=False` builds it without stochastic depth, for teachers and for inference; the parameters are the same.
    Raises UserError for a name that is no timm VisionTransformer and for arguments that it does not take.
    """
    _check_name(config.name)
    _check_args(config.args)
    check_range("encoder.drop_path_rate", config.drop_path_rate, 0, 1)
    for key in ("patch_size", "embed_dim", "depth", "num_heads"):
        if isinstance(value := config.args.get(key), int):
            check_range(f"encoder.args.{key}", value, 1)
    try:
        vit = timm.create_model(
            config.name,
            pretrained=False,
            num_classes=0,
            drop_path_rate=config.drop_path_rate if drop_path else 0.0,
            global_pool="",  # whether there is a class token to pool is known once it is built
            **model_args(config),
        )
    except (TypeError, AssertionError, ValueError, RuntimeError, LookupError, ArithmeticError) as e:
        raise UserError(f"timm cannot build {config.name} with encoder.args={config.args}: {_one_line(e)}") from e
    if type(vit) is not VisionTransformer or not isinstance(vit.patch_embed, PatchEmbed):
        raise UserError(f"timm's {config.name} is not a plain Vision Transformer: choose one that is")
    vit.reset_classifier(0, "token" if vit.has_class_token else "avg")
    height, width = (int(side) for side in vit.patch_embed.patch_size)
    if height != width:
        raise UserError(f"encoder.args.patch_size is {height}×{width}: choose a square patch")
    if config.img_size % height:
        raise UserError(
            f"encoder.img_size={config.img_size} is not a multiple of the patch size {height}: "
            f"use {max(config.img_size // height, 1) * height}"
        )
    return Encoder(vit, pos_interpolation=pos_interpolation)


def model_args(config: EncoderConfig) -> dict[str, Any]:
    """The arguments with which `timm.create_model(config.name, …)` makes the same architecture, for exports."""
    return {"img_size": config.img_size, "dynamic_img_size": True, "fc_norm": False, **config.args}


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        raise UserError(f"timm has no model called {name!r}: did you mean {_nearest(name)}?")
    if name.split(".")[0] not in _vits():
        raise UserError(f"timm's {name} is not a plain Vision Transformer: choose one that is, {_nearest(name)} say")


def _vits() -> list[str]:
    return timm.list_models(module="vision_transformer") + timm.list_models(module="deit")


def _nearest(name: str) -> str:
    return difflib.get_close_matches(name, _vits(), n=1, cutoff=0.0)[0]


def _check_args(args: dict[str, Any]) -> None:
    known = set(inspect.signature(VisionTransformer.__init__).parameters) - {"self", "device", "dtype"}
    for key in args:
        if key in ELSEWHERE:
            raise UserError(f"encoder.args.{key} cannot be set: {ELSEWHERE[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, known - ELSEWHERE.keys(), n=1, cutoff=0.0)
            raise UserError(f"unknown key encoder.args.{key}: did you mean encoder.args.{near[0]}?")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
