"""Sinkhorn–Knopp where the official code would overflow, on no samples, and over two ranks; KoLeo over two ranks."""

import sys

import pytest
import torch

from selfsight.collective import Collective, DistributedCollective
from selfsight.losses import koleo, sinkhorn_knopp


def test_all_prototypes_and_all_samples_weigh_the_same():
    torch.manual_seed(0)
    q = sinkhorn_knopp(torch.randn(30, 10, dtype=torch.float64), 0.5, Collective(), n_iterations=200)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(30, dtype=torch.float64))
    torch.testing.assert_close(q.sum(dim=0), torch.full((10,), 3.0, dtype=torch.float64))


def test_two_by_two_by_hand():
    """exp(logits / temp) = [[2, 1], [1, 1]]. Columns by 3 and 2 → [[2/3, 1/2], [1/3, 1/2]]; then rows by
    7/6 and 5/6 → [[4/7, 3/7], [2/5, 3/5]]."""
    logits = torch.tensor([[2.0, 1.0], [1.0, 1.0]], dtype=torch.float64).log() * 0.1
    expected = torch.tensor([[4 / 7, 3 / 7], [2 / 5, 3 / 5]], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.1, Collective(), 1), expected)


@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_a_constant_changes_nothing_and_overflows_nothing(shift):
    logits = torch.randn(6, 8, dtype=torch.float64)
    plain = sinkhorn_knopp(logits, 0.05, Collective())
    torch.testing.assert_close(sinkhorn_knopp(logits + shift, 0.05, Collective()), plain)
    assert sinkhorn_knopp((logits + shift).float(), 0.05, Collective()).isfinite().all()


def test_a_sample_far_below_the_others_still_has_an_assignment():
    logits = torch.randn(6, 8)
    logits[2] -= 100.0  # exp(-100 / 0.05) is 0 in any precision
    q = sinkhorn_knopp(logits, 0.05, Collective())
    torch.testing.assert_close(q.sum(dim=1), torch.ones(6))


def test_no_samples_have_no_assignments():
    assert sinkhorn_knopp(torch.zeros(0, 8), 0.05, Collective()).shape == (0, 8)


def joined() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(7, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)


def one_rank(rank: int, rendezvous: str, output: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    collective = DistributedCollective()
    logits, x = joined()
    uneven = sinkhorn_knopp(logits[:2] if rank == 0 else logits[2:], 0.1, collective)
    all_of_them = sinkhorn_knopp(logits if rank == 0 else logits[:0], 0.1, collective)
    mine = x[3 * rank : 3 * rank + 3].clone().requires_grad_()
    loss = koleo(mine, collective)
    loss.backward()
    torch.save([uneven, all_of_them, loss.detach() / 2, mine.grad / 2], f"{output}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one(run_two, tmp_path):
    run_two(__file__, str(tmp_path / "found"))
    first, second = (torch.load(tmp_path / f"found.{rank}", weights_only=True) for rank in range(2))
    logits, x = joined()
    expected = sinkhorn_knopp(logits, 0.1, Collective())
    torch.testing.assert_close(torch.cat([first[0], second[0]]), expected)
    torch.testing.assert_close(first[1], expected)
    loss = koleo(x.requires_grad_(), Collective())
    loss.backward()
    torch.testing.assert_close(first[2] + second[2], loss.detach())
    torch.testing.assert_close(torch.cat([first[3], second[3]]), x.grad)


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), sys.argv[2], sys.argv[3])
