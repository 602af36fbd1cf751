"""Pieces of named parameters, at every stage of ZeRO, are what DeepSpeed says that its optimiser holds."""

import pytest
import torch
from torch import nn

from selfsight.training.pieces import by_shard, inner, pieces

STAGES = [{"stage": stage} for stage in range(4)] + [
    {"stage": stage, "offload_optimizer": {"device": "cpu"}} for stage in (1, 2, 3)
]


class Odd(nn.Module):
    """Sizes that no number of ranks divides, a scalar, a parameter that a frozen group has and one of no group."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):  # (B, 7) → (B, 3)
        return self.last(self.first(x).tanh()) * self.scale + self.fixed


def ranks(zeros) -> None:
    """What every rank checks; called in processes of their own."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from selfsight.training import cluster

    joined = cluster.join()
    for zero in zeros:
        torch.manual_seed(0)
        model = Odd()
        vectors = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]
        optimizer = torch.optim.AdamW([{"params": [model.first.weight, model.last.weight]}, {"params": vectors}])
        config = {
            "train_batch_size": 4,
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        assert not any(
            inner(engine.optimizer).state.get(shard) for shard, _ in by_shard(pieces(model, engine.optimizer))
        )
        for step in range(3):
            torch.manual_seed(step)
            engine.backward(engine(torch.randn(4, 7).chunk(joined.world_size)[joined.rank]).square().sum())
            engine.step()
        if zero["stage"] in (1, 2):  # it looks for the states after the step of the first group, when others have none
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        found = {piece.name: piece for piece in pieces(model, engine.optimizer)}
        for name, p in model.named_parameters():
            if not p.requires_grad:
                assert name not in found
                continue
            whole = {"": safe_get_full_fp32_param(p) if zero["stage"] else p}
            for state in ("exp_avg", "exp_avg_sq"):
                sharded = safe_get_full_optimizer_state(p, state) if zero["stage"] else optimizer.state[p][state]
                whole[state] = sharded
            stretch = (0, 0)
            if piece := found.get(name):
                stretch = (piece.start, piece.stop)
                states = inner(engine.optimizer).state[piece.shard]
                assert states["step"] == 3
                for state, tensor in whole.items():
                    mine = piece.of(states[state] if state else piece.shard)
                    assert torch.equal(mine, tensor.detach().flatten()[piece.start : piece.stop]), (zero, name, state)
            stretches = [None] * joined.world_size
            dist.all_gather_object(stretches, stretch)
            numel = whole["exp_avg"].numel()
            if zero["stage"]:  # all of it, and nothing twice
                assert sorted(i for a, b in stretches for i in range(a, b)) == list(range(numel)), (zero, name)
            else:
                assert stretches == [(0, numel)] * joined.world_size


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_pieces_are_what_deepspeed_holds(warm, world_size):
    answer = warm("test_pieces:ranks", STAGES, ranks=world_size)
    assert answer["codes"] == [0] * world_size, answer["err"][0]
