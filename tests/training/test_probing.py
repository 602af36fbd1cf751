"""When probes are called, and what they leave as it was."""

import pytest
import torch
from torch import nn

from selfsight.training import probing
from selfsight.training.cluster import Cluster
from selfsight.training.probing import SHARE, Probing

ALONE = Cluster(0, 0, 1, torch.device("cpu"))


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(probing.time, "monotonic", lambda: self.now)


def run(clock, every, steps, *, start=0, step=1.0, cost=5.0):
    """Step → the share at its probe."""

    def probe(encoder, cluster):
        clock.now += cost
        return {"probe/knn": 0.5}

    looks = Probing(probe, nn.Identity(), ALONE, every=every, bf16=False, start=start, total_steps=steps)
    found = {}
    for done in range(start + 1, steps + 1):
        clock.now += step
        if values := looks.look(done):
            assert values["probe_seconds"] == pytest.approx(cost)
            found[done] = values["probe_share"]
    return found


def test_a_fixed_interval_counts_from_the_beginning_and_the_last_step_is_probed(monkeypatch):
    assert list(run(Clock(monkeypatch), 30, 100, start=45)) == [60, 90, 100]


def test_without_an_interval_probes_take_their_share_and_no_more(monkeypatch):
    found = run(Clock(monkeypatch), None, 3000)
    first, *others, last = found
    assert first == 20  # it has to be seen once what it costs
    assert last == 3000
    assert all(found[done] <= SHARE for done in others)
    assert len(others) == 11  # the second one when 10 s are 2 % of all, the next ones every 250 s: 500, 750, …
    assert max(found[done] for done in others) > 0.99 * SHARE
    assert len(run(Clock(monkeypatch), None, 3000, cost=10.0)) < len(found)


def test_modes_generators_and_gradients_are_left_alone():
    encoder = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    encoder[2].eval()
    before = {name: x.clone() for name, x in encoder.state_dict().items()}

    def probe(encoder, cluster):
        assert not any(part.training for part in encoder.modules())
        x = encoder(torch.randn(4, 2))
        assert not x.requires_grad
        assert not x.is_inference()  # what encoders keep between calls must be fit for training
        return {"probe/knn": x.mean().item()}

    torch.manual_seed(0)
    looks = Probing(probe, encoder, ALONE, every=1, bf16=False, start=0, total_steps=9)
    assert looks.look(1)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(3))
    assert [part.training for part in encoder] == [True, True, False]
    assert all(torch.equal(x, before[name]) for name, x in encoder.state_dict().items())
