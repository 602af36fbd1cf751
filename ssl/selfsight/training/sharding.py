"""Where DeepSpeed keeps gradients and parameters under each ZeRO stage, and how to get at them: nobody else looks.

| stage | parameters | gradients before the step | optimiser state |
| 0 | whole | whole | whole |
| 1, 2 | whole | this rank's stretches of each group | this rank's |
| 3 | this rank's stretch of each, gathered while its module runs | this rank's stretches | this rank's |

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv:1910.02054.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.recipe import Recipe
from selfsight.training.freezing import Held

BUCKET_NUMBERS = 500_000_000  # of the buffer from which gradients are sent, at most: DeepSpeed's default


def deepspeed_config(recipe: Recipe, world_size: int, trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a run that trains so many numbers."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    training, stage = recipe.training, recipe.training.zero
    # It is allocated in full: for fewer weights it need not be larger than all of them.
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(trained, BUCKET_NUMBERS)}
    if training.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    elif stage in (1, 2) and "compute_grad_norm" in DeepSpeedZeroConfig.model_fields:
        zero["compute_grad_norm"] = False  # ours is computed in one reduction; theirs takes one per group
    if stage == 3:
        # Small parameters that stay whole keep a copy that a moving average of the shards does not reach.
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "train_batch_size": recipe.batch_size,
        "train_micro_batch_size_per_gpu": recipe.batch_size // (world_size * training.accumulation),
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": 0.0,  # absent means 1.0; `optim.clip` does it
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as good on a CPU, and needs no compiler
        # Not `bf16`, which rounds the master weights. Autocast begins inside DeepSpeed's forward, which on a GPU turns
        # off one that begins outside; of no module are gradients sent in bf16.
        "torch_autocast": {
            "enabled": training.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": None,
    }


def averaged_gradients(engine: Any) -> list[list[Tensor]]:
    """Per parameter group, the gradients that this rank's optimiser is about to use, averaged over the ranks.

    For between the last backward pass and the step, which changing them in place changes. Stage 0: whole tensors, on
    every rank the same. Above: this rank's stretches, flat or whole as they come, and padding, which is zero.
    """
    zero = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [[p.grad for p in g["params"] if p.grad is not None] for g in zero.param_groups]
    if engine.zero_cpu_offload() and torch.cuda.is_available():
        torch.cuda.synchronize()  # they may still be on their way to the CPU
    if stage < 3:
        if zero.cpu_offload:
            return [[flat.grad] for flat in zero.single_partition_of_fp32_groups]
        return [list(zero.averaged_gradients[i]) for i in range(len(zero.param_groups))]
    found: list[list[Tensor]] = [[] for _ in zero.param_groups]
    for i, group in sorted(zero.sub_group_to_group_id.items()):  # a group of many parameters comes in several parts
        found[group] += _gradient_of_part(zero, i)
    return found


def held(engine: Any, gradients: list[list[Tensor]]) -> Iterator[Held]:
    """(parameter, group, gradient) of what this rank's optimiser holds; `gradients` as from `averaged_gradients`.

    Stage 0: parameters as they are. Above: the optimiser's flat stretches, and of their gradients what is no padding.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:  # there the groups are empty between steps
        parts = [
            (zero.fp32_partitioned_groups_flat[i], zero.param_groups[g], _gradient_of_part(zero, i))
            for i, g in sorted(zero.sub_group_to_group_id.items())
        ]
    else:
        parts = [(p, g, found) for g, found in zip(zero.param_groups, gradients, strict=True) for p in g["params"]]
    for p, group, found in parts:
        if stage:
            flat = [g.flatten() for g in found]
            yield p, group, flat[0] if len(flat) == 1 else torch.cat([p.new_empty(0), *flat])
        elif p.grad is not None:
            yield p, group, p.grad


def _gradient_of_part(zero: Any, i: int) -> list[Tensor]:
    return [zero.fp32_partitioned_groups_flat[i].grad] if zero.offload_optimizer else zero.averaged_gradients[i]


@torch.no_grad()
def clear_padding(engine: Any) -> None:
    """Zeroes what stands behind the stretches of stage 3, so that norms of stretches are norms of what is in them."""
    if engine.zero_optimization_stage() < 3:
        return
    for parameter in engine.module.parameters():
        start = parameter.ds_tensor.numel() * engine.global_rank
        parameter.ds_tensor[max(parameter.ds_numel - start, 0) :].zero_()
    engine.optimizer.refresh_fp32_params()


def forget_gradients(engine: Any) -> None:
    """For after a step. Stage 3 and offload keep gradients in buffers, from which a parameter that the next step does
    not use would be moved once more by its last gradient."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        zero.grad_partitions_flat_buffer.zero_()
    if engine.zero_cpu_offload():
        flats = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
        for flat in flats:
            flat.grad.zero_()


def shapes(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` as it would be if every parameter were whole, without values for those that are not."""
    state = module.state_dict(keep_vars=True)
    return {k: torch.empty(v.ds_shape, dtype=v.dtype, device="meta") if _cut(v) else v for k, v in state.items()}


def whole_state(module: nn.Module, *, wanted: bool = True) -> dict[str, Tensor]:
    """`module.state_dict()` on the CPU with whole parameters and no shared storage; empty on ranks where it is not
    `wanted`. All ranks call it; the device holds no more than one layer's parameters at a time."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    state, whole = module.state_dict(keep_vars=True), {}
    for _, names in groupby(state, key=lambda name: name.rpartition(".")[0]):
        layer = {name: state[name] for name in names}
        with GatheredParameters([v for v in layer.values() if _cut(v)]):
            if wanted:
                whole |= {name: v.detach().to("cpu", copy=True) for name, v in layer.items()}
    return whole


@torch.no_grad()
def load_state(engine: Any, state: dict[str, Tensor]) -> None:
    """Puts whole parameters and buffers, as `whole_state` gives them, into the engine's module and its optimiser's
    fp32 weights; moments stay. Every rank needs the state, and takes its own part."""
    module, cut = engine.module, set()
    for name, parameter in module.named_parameters():
        if _cut(parameter):
            cut.add(name)
            n = parameter.ds_tensor.numel()
            own = state[name].flatten()[n * engine.global_rank :][:n]  # the last ranks may have less, or nothing
            parameter.ds_tensor[: len(own)].copy_(own)
    module.load_state_dict({k: v for k, v in state.items() if k not in cut}, strict=not cut)
    if engine.zero_optimization_stage():
        engine.optimizer.refresh_fp32_params()


@contextmanager
def frugal_linear(stage: int) -> Iterator[None]:
    """Under stage 3, linear layers that do not keep the gathered weight for their backward pass. DeepSpeed replaces
    torch's function for good; here it is replaced for the length of a step."""
    if stage < 3:
        yield
        return
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    usual, F.linear = F.linear, zero3_linear_wrap
    try:
        yield
    finally:
        F.linear = usual


def _cut(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_tensor")
