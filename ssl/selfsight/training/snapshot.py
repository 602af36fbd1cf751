"""A moment of training, copied to host memory: what a checkpoint is written from while training goes on.

In: an engine between two steps. Out: on rank 0 the objective's whole state, on every rank that writes the states of its
optimiser, piece by piece. The memory is taken once, page-locked where there is a GPU, and used again.
"""

import torch
from torch import Tensor

from selfsight.training.engine import Engine
from selfsight.training.pieces import inner, pieces


class Snapshot:
    """The newest moment that `take` was called at. Between two calls nothing changes it."""

    def __init__(self) -> None:
        self.objective: dict[str, Tensor] | None = None  # on rank 0
        self.optimizer: dict[str, Tensor] | None = None  # "state/parameter" → stretch (n,), or a number ()
        self.starts: dict[str, int] = {}  # parameter → the first element of its stretch
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, engine: Engine) -> None:
        """Copies. On a GPU the copies are queued before the next step, and nobody waits for them here. All ranks call
        it."""
        if engine.recipe.training.zero == 3:  # layer by layer: no device has the memory for all of it
            self.objective = engine.whole_state() or None
        elif engine.cluster.rank == 0:
            self.objective = _copy(engine.objective.state_dict(), self.objective)
        # Under ZeRO-0 all ranks hold the same.
        if engine.recipe.training.zero or engine.cluster.rank == 0:
            self.starts, states = {}, {}
            optimizer = engine.engine.optimizer
            for piece in pieces(engine.objective, optimizer):
                self.starts[piece.name] = piece.start
                for state, value in inner(optimizer).state.get(piece.shard, {}).items():
                    states[f"{state}/{piece.name}"] = piece.of(value) if value.ndim else value
            self.optimizer = _copy(states, self.optimizer)
        if engine.cluster.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> None:
        """Until the copies are done. Any thread may call it."""
        if self._copied:
            self._copied.synchronize()


def _copy(tensors: dict[str, Tensor], before: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """`tensors` in the memory of `before`, where it fits."""
    copies = {}
    for name, tensor in tensors.items():
        copy = (before or {}).get(name)
        if copy is None or copy.shape != tensor.shape:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=torch.cuda.is_available())
        copies[name] = copy.copy_(tensor, non_blocking=True)
    return copies
