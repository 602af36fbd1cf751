"""Parameter groups with their own rates and decays, the optimisers of a recipe, and clipping that is exact under ZeRO.

ZeRO hands the optimiser flat one-dimensional shards, one per parameter group, so everything that depends on a tensor's
shape or name is decided here at construction and kept in its group; a norm per tensor needs one group per tensor.
"""

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from selfsight.errors import UserError, check_range
from selfsight.objectives import Objective, ParameterRule, Progress
from selfsight.recipe import OptimizerConfig
from selfsight.training.freezing import SGD, AdamW
from selfsight.training.lamb import LAMB
from selfsight.training.lars import LARS

OPTIMIZERS = ("adamw", "sgd", "lars", "lamb")
CLIP_UNITS = ("global", "tensor", "module")
CLIP_EPSILON = 1e-6  # in the clipping coefficient, as DINO's `clip_gradients` and torch have it


def check(config: OptimizerConfig) -> None:
    """Raises UserError for values that no optimiser takes."""
    for key, choices in (("name", OPTIMIZERS), ("clip_per", CLIP_UNITS)):
        if (value := getattr(config, key)) not in choices:
            raise UserError(f"optimizer.{key} is {value!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")
    if len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas):
        raise UserError(f"optimizer.betas is {config.betas}: give two numbers from 0 to below 1, such as [0.9, 0.999]")
    for key in ("momentum", "layer_decay", "patch_embed_lr_mult"):
        check_range(f"optimizer.{key}", getattr(config, key), 0, 1)
    for key in ("clip", "trust_coefficient"):
        check_range(f"optimizer.{key}", getattr(config, key), 0)


def build(config: OptimizerConfig, groups: list[dict[str, Any]], *, fused: bool) -> torch.optim.Optimizer:
    """The optimiser that a recipe names; rate and decay are written into its groups before every step."""
    betas = (config.betas[0], config.betas[1])
    if config.name == "adamw":
        return AdamW(groups, lr=0.0, betas=betas, fused=fused)
    if config.name == "lamb":
        return LAMB(groups, lr=0.0, betas=betas)
    if config.name == "lars":
        return LARS(groups, lr=0.0, momentum=config.momentum, trust_coefficient=config.trust_coefficient)
    return SGD(groups, lr=0.0, momentum=config.momentum, fused=fused)


def parameter_groups(module: nn.Module, rules: list[ParameterRule], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of the trainable parameters of `module`, each with "names", "decay" (which trust ratios go with), "rule"
    (an index, or -1), "scale" (of the rate, from `layer_decay`) and "module" (what `clip_per: module` clips together).

    Vectors and names that end in `.bias` are not decayed unless `decay_vectors` is set, nor those that end in one of
    `undecayed`; everything else is, tokens and position tables included, as in DINO's `get_params_groups`, in DINOv2
    and in timm's `add_weight_decay`. The first rule whose prefix fits a name holds.
    """
    per_tensor = config.clip_per == "tensor" or config.name in ("lars", "lamb")
    scales = layer_scales(module, config.layer_decay, config.patch_embed_lr_mult)
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = parameter.ndim < 2 or name.endswith(".bias")
        decay = (config.decay_vectors or not vector) and not name.endswith(tuple(config.undecayed))
        rule = next((i for i, r in enumerate(rules) if name.startswith(r.prefix)), -1)
        scale = next((s for prefix, s in scales.items() if name.startswith(prefix)), 1.0)
        unit = clip_unit(name)
        key = name if per_tensor else (decay, rule, scale, unit if config.clip_per == "module" else None)
        empty = {"params": [], "names": [], "decay": decay, "adapt": decay and not vector, "rule": rule}
        group = groups.setdefault(key, {**empty, "scale": scale, "module": unit, "frozen": False})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def clip_unit(name: str) -> str:
    """The sub-module that a parameter is clipped with: a projection head, or else the encoder and what belongs to it
    (mask tokens, DINOv3's local norm), as DINOv2 has `backbone`, `dino_head` and `ibot_head`."""
    path = name.split(".")
    head = next((i for i, part in enumerate(path) if part.endswith("head")), None)
    return "encoder" if head is None else ".".join(path[: head + 1])


def layer_scales(module: nn.Module, decay: float, patch_embed: float) -> dict[str, float]:
    """Prefix → factor on the learning rate (DINOv2's `get_vit_lr_decay_rate`; BEiT). Of an encoder's L blocks the i-th
    from 0 learns at decay^(L − i) of the rate, what lies below at ^(L + 1), the patch embedding at `patch_embed` of
    that; final norms, heads, predictors and decoders at the whole rate."""
    scales: dict[str, float] = {}
    if decay == patch_embed == 1:
        return scales
    for path, part in module.named_modules():
        if isinstance(part, Objective):  # one, or one inside another
            at, depth = f"{path}." if path else "", part.student.depth
            vit, bottom = f"{at}student.vit.", decay ** (depth + 1)
            scales |= {f"{vit}blocks.{i}.": decay ** (depth - i) for i in range(depth)}
            scales[f"{vit}patch_embed."] = bottom * patch_embed
            scales |= {f"{vit}{name}": bottom for name in ("cls_token", "reg_token", "pos_embed")}
            scales |= {f"{at}{name}": bottom for name in part.encoder_inputs}
    return scales


def set_schedule(
    optimizer: torch.optim.Optimizer, rules: list[ParameterRule], progress: Progress, *, lr: float, weight_decay: float
) -> None:
    """Writes this step's values into every group."""
    for group in optimizer.param_groups:
        scale = rules[group["rule"]].lr_scale(progress) if group["rule"] >= 0 else 1.0
        group["lr"] = lr * scale * group["scale"]
        group["weight_decay"] = weight_decay if group["decay"] else 0.0
        group["frozen"] = scale == 0.0


def squared_norms(groups: list[list[Tensor]], device: torch.device) -> Tensor:
    """Squared l2 norm per group of gradients: float32 (groups,), of what this rank holds."""
    flat = [g for group in groups for g in group]
    norms = iter(torch._foreach_norm(flat, 2.0) if flat else ())  # pyright: ignore[reportPrivateImportUsage]
    zero = torch.zeros((), device=device)
    sums = [sum((n.square() for n in _take(norms, len(group))), zero) for group in groups]
    return torch.stack(sums) if sums else torch.zeros(0, device=device)


def clip(groups: list[list[Tensor]], norms: list[float], limit: float, units: list[Hashable]) -> None:
    """Scales gradients in place so that the norm of all groups of one unit together is at most `limit`.

    `norms` are whole, of each group; `units` says which unit a group belongs to.
    """
    squares: dict[Hashable, float] = {}
    for unit, norm in zip(units, norms, strict=True):
        squares[unit] = squares.get(unit, 0.0) + norm * norm
    factors = [min(1.0, limit / (squares[unit] ** 0.5 + CLIP_EPSILON)) for unit in units]
    scaled = [(g, factor) for group, factor in zip(groups, factors, strict=True) if factor < 1.0 for g in group]
    if scaled:
        gradients, by = zip(*scaled, strict=True)
        torch._foreach_mul_(gradients, by)  # pyright: ignore[reportPrivateImportUsage]


def clip_units(groups: list[dict[str, Any]], per: str) -> list[Hashable]:
    """For each parameter group, the unit that `clip` takes together."""
    return {
        "global": [0] * len(groups),
        "tensor": list(range(len(groups))),
        "module": [g["module"] for g in groups],
    }[per]


def _take(norms: Iterator[Tensor], n: int) -> list[Tensor]:
    return [next(norms) for _ in range(n)]
