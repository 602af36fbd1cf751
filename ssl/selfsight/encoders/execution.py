"""How a block is run: eagerly or compiled, keeping all activations for the backward pass or recomputing some.

Neither changes what a block computes nor what its parameters are called: they wrap the function, not the module.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from selfsight.encoders.attention import Asked, Group, Layout, layout
from selfsight.encoders.blocks import Drops, step
from selfsight.errors import UserError

Checkpointing = Literal["none", "selective", "full"]
Step = Callable[[nn.Module, Tensor, Layout, Drops, Asked | None], Tensor]

# What takes long and is kept by selective checkpointing: matrix products and attention. Norms, activations, rotations
# and LayerScale are computed again.
KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._flash_attention_forward.default,
    torch.ops.aten._cudnn_attention_forward.default,
    torch.ops.torch_attn._varlen_attn.default,  # of packs, on GPUs; is there once encoders.attention is imported
]
RECOMPILE_LIMIT = 64  # resolutions, stochastic depth and (no) gradient each need their own graph; torch allows 8


def make_step(checkpointing: Checkpointing, *, compiled: bool, backend: str | Callable = "inductor") -> Step:
    """`blocks.step`, recomputed and compiled as asked. One compiled function serves all blocks of an architecture."""
    run = checkpointed(checkpointing)
    if not compiled:
        return run
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(run, backend=backend)


def through(blocks: nn.ModuleList, x_BTD: Tensor, ids: Tensor, run: Step) -> Tensor:
    """Blocks that a method puts behind its encoder, run as that one's (`Encoder.block_step`): (B, T, D) → the tokens
    `ids` (B, n) of the result, (B, n, D). The last block is run for these alone."""
    images, length = x_BTD.shape[:2]
    rows = ids + length * torch.arange(images, device=ids.device).unsqueeze(1)
    wanted = Asked(rows.flatten(), layout([Group(images, ids.shape[1])], x_BTD))
    where, x_SD = layout([Group(images, length)], x_BTD), x_BTD.flatten(0, 1)
    for block in blocks:
        x_SD = run(block, x_SD, where, (None, None), wanted if block is blocks[-1] else None)
    return x_SD.unflatten(0, ids.shape)


def checkpointed(how: Checkpointing) -> Step:
    """ "full" keeps a block's input only, "selective" also the results of the operations in KEPT."""
    if how == "none":
        return step
    keep: dict[str, Any] = {}
    if how == "selective":
        keep["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)

    def recomputing(block: nn.Module, x_SD: Tensor, layout: Layout, drops: Drops, asked: Asked | None) -> Tensor:
        if not torch.is_grad_enabled():
            return step(block, x_SD, layout, drops, asked)
        with _casts_counted(x_SD.device.type):
            out = checkpoint(step, block, x_SD, layout, drops, asked, use_reentrant=False, **keep)
        assert isinstance(out, Tensor)
        return out

    return recomputing


def _casts_counted(device: str) -> AbstractContextManager:
    """Autocast as it is, but casting weights anew: from its cache the forward pass would take some for which the
    recomputation, that begins with an empty one, needs operations that selective checkpointing has not seen."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


def check_checkpointing(how: str) -> Checkpointing:
    """Raises UserError for a name that is none."""
    for known in get_args(Checkpointing):
        if how == known:
            return known
    raise UserError(f"encoder.checkpointing is {how!r}: use one of {', '.join(get_args(Checkpointing))}")
