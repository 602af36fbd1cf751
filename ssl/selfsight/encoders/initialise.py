"""First values for an architecture that was built on torch's meta device: shapes without numbers or memory.

A large encoder is so made once, where it will live. Memory is filled with NaN before the initialisers run, as DINOv3
does, so that a forgotten one is loud.
"""

from itertools import chain
from typing import Any

import torch


@torch.no_grad()
def initialise(vit: Any, device: str | torch.device) -> None:
    """Gives all parameters and buffers of timm's `vit` memory on `device` and timm's initial values, drawn from torch's
    generator. Raises RuntimeError naming what timm left without a value.
    """
    vit.to_empty(device=device)
    for tensor in chain(vit.parameters(), vit.buffers()):
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    vit.init_weights()
    named = chain(vit.named_parameters(), vit.named_buffers())
    if forgotten := [name for name, tensor in named if tensor.isnan().any()]:
        raise RuntimeError(f"timm initialises everything but {', '.join(forgotten)}")
