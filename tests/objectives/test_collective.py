"""Collectives with gradients: two processes that average their gradients are one process on the joined batch."""

import sys

import pytest
import torch

from selfsight.collective import Collective, DistributedCollective
from selfsight.encoders import MLP, BatchNorm


def loss_of(x: torch.Tensor, weight: torch.Tensor, collective: Collective, joined: bool) -> torch.Tensor:
    """A loss in which every sample meets every other: of all samples on every rank, or of each rank's own."""
    z = BatchNorm(4, collective, affine=False)(x @ weight)
    everyone = collective.gather(z)
    rows = everyone if joined else z
    return (rows @ everyone.T).softmax(dim=-1).pow(2).sum(dim=-1).mean()


def one_rank(rank: int, rendezvous: str, output: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(0)
    x, weight = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    found = []
    for joined in (True, False):
        w, collective = weight.clone().requires_grad_(), DistributedCollective()
        loss = loss_of(x[3 * rank : 3 * rank + 3], w, collective, joined)
        loss.backward()
        found += [collective.all_reduce_sum(loss) / 2, collective.all_reduce_sum(w.grad) / 2]
    if rank == 0:
        torch.save(found, output)
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(run_two, tmp_path):
    run_two(__file__, str(tmp_path / "found.pt"))
    torch.manual_seed(0)
    x, weight = torch.randn(6, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    loss = loss_of(x, weight, Collective(), True)
    loss.backward()
    for loss_2, gradient_2 in zip(*[iter(torch.load(tmp_path / "found.pt", weights_only=True))] * 2, strict=True):
        torch.testing.assert_close(loss_2, loss.detach())
        torch.testing.assert_close(gradient_2, weight.grad)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_torchs(affine):
    torch.manual_seed(0)
    x = torch.randn(16, 5)
    torch.testing.assert_close(BatchNorm(5, Collective(), affine=affine)(x), torch.nn.BatchNorm1d(5, affine=affine)(x))


def test_mlp_has_the_layers_it_says():
    mlp = MLP([8, 16, 16, 4], Collective(), last_bn=True)
    names = [type(layer).__name__ for layer in mlp]
    assert names == ["Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm"]
    assert all(layer.bias is None for layer in mlp if isinstance(layer, torch.nn.Linear))
    assert mlp(torch.randn(6, 8)).shape == (6, 4)


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), sys.argv[2], sys.argv[3])
