"""What every objective promises the trainer, checked on all that are found; or on one's own, by its dotted path:

pytest tests/objectives/test_conformance.py --objective my_methods.simsiam
"""

import subprocess
import sys

import pytest
import torch

from selfsight.errors import UserError
from selfsight.objectives import Objective, available, find


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_outcome_is_finite_and_detached(harness, name):
    objective = harness.small(name)
    outcome = objective(harness.make_batch(objective, 4), harness.START)
    assert outcome.loss.shape == ()
    assert outcome.loss.isfinite()
    assert outcome.features.shape == (4, objective.student.embed_dim)
    assert not outcome.features.requires_grad
    for metric in outcome.metrics.values():
        assert metric.shape == ()
        assert metric.isfinite()
        assert not metric.requires_grad


def test_gradients_reach_all_of_the_student_and_nothing_of_the_teacher(harness, name):
    objective = harness.small(name)
    objective(harness.make_batch(objective, 4), harness.START).loss.backward()
    teachers = {id(p) for _, teacher in objective.teacher_pairs() for p in teacher.parameters()}
    reached = {n for n, p in objective.named_parameters() if p.grad is not None and p.grad.any()}
    trainable = {n for n, p in objective.named_parameters() if p.requires_grad}
    assert reached == trainable
    assert not any(id(p) in teachers for n, p in objective.named_parameters() if n in trainable)
    assert any(n.startswith("student.vit.") for n in trainable)


def test_no_parameter_is_moved_by_rounding_noise(harness, name):
    """In float64, so that a gradient which is zero by the method's own arithmetic is told from a small one."""
    objective = harness.small(name)
    objective(harness.make_exact(objective, 6), harness.START).loss.backward()
    size = {n: g.square().mean().sqrt().item() for n, g in harness.gradients(objective).items()}
    assert [n for n, g in size.items() if g < 1e-11 * max(size.values())] == []


def test_forward_changes_no_state(harness, name):
    objective = harness.small(name)
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    objective(harness.make_batch(objective, 4), harness.START)
    assert_same(before, objective.state_dict())
    objective.discard_step()
    assert_same(before, objective.state_dict())


def test_a_discarded_step_leaves_no_trace(harness, name):
    plain, skipped = harness.small(name), harness.small(name)
    skipped(harness.make_batch(skipped, 4, seed=9), harness.START)
    skipped.discard_step()
    assert harness.train(plain, range(2)) == harness.train(skipped, range(2))
    assert_same(plain.state_dict(), skipped.state_dict())


def test_resuming_is_bit_equal(harness, name, tmp_path):
    unbroken = harness.small(name)
    harness.train(unbroken, range(3))
    torch.save(unbroken.state_dict(), tmp_path / "state.pt")
    resumed = harness.small(name, seed=1)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert_same(unbroken.state_dict(), resumed.state_dict())
    assert harness.train(unbroken, range(3, 6)) == harness.train(resumed, range(3, 6))
    assert_same(unbroken.state_dict(), resumed.state_dict())


def test_two_micro_batches_are_one_batch(harness, name):
    if find(name).joint:
        pytest.skip(f"{name} compares the images of a micro-batch with each other")
    whole, halves = harness.small(name), harness.small(name)
    batch = harness.make_batch(whole, 6)
    loss = whole(batch, harness.START).loss
    loss.backward()
    parts = [halves(harness.part(halves, batch, start, start + 3), harness.START).loss / 2 for start in (0, 3)]
    for each in parts:
        each.backward()
    torch.testing.assert_close(sum(parts), loss)
    torch.testing.assert_close(harness.gradients(halves), harness.gradients(whole), atol=1e-6, rtol=1e-4)
    whole.after_step()
    halves.after_step()
    torch.testing.assert_close(halves.state_dict(), whole.state_dict(), atol=1e-7, rtol=1e-5)


@torch.no_grad()
def test_collapse_values(harness, name):
    """Weights of zero, but for those that only make sense with a length, map every image to one output."""
    objective = harness.small(name)
    for key, p in objective.named_parameters():
        if "last_layer" not in key:
            p.zero_()
    outcome = objective(harness.make_batch(objective, 4), harness.START)
    found = {**outcome.metrics, "loss": outcome.loss}
    expected = objective.collapse_values()
    assert {key: found[key].item() for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_learns(harness, name):
    """The same batch again and again: the loss must fall, or the gradient points the wrong way."""
    objective = harness.small(name)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    batch = harness.make_batch(objective, 4)
    losses = []
    for _ in range(30):
        loss = objective(batch, harness.START).loss
        objective.discard_step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_two_processes_equal_one(harness, names, tmp_path):
    """All objectives in one pair of processes, since starting them is what costs."""
    arguments = ["2", str(tmp_path / "rendezvous"), str(tmp_path / "found.pt"), *names]
    ranks = [
        subprocess.Popen([sys.executable, harness.__file__, str(rank), *arguments], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert list(found) == names
    for name, joined in found.items():
        alone = harness.small(name)
        loss = alone(harness.make_exact(alone, 6), harness.START).loss
        loss.backward()
        alone.after_step()
        torch.testing.assert_close(joined["loss"], loss.detach())
        torch.testing.assert_close(joined["gradients"], harness.gradients(alone), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(joined["state"], alone.state_dict(), atol=1e-7, rtol=1e-5)


def test_they_are_found_by_name(tmp_path, monkeypatch):
    assert {"dino", "mae"} <= set(available())
    assert all(issubclass(find(name), Objective) for name in available())
    with pytest.raises(UserError, match="no objective is called 'dinno'"):
        find("dinno")
    (tmp_path / "mine_a.py").write_text("from selfsight.objectives.mae import MAE\nclass Mine(MAE):\n    pass\n")
    (tmp_path / "mine_b.py").write_text("from selfsight.objectives.mae import MAE\n")
    (tmp_path / "theirs").mkdir()
    for source in ("mine_a.py", "mine_b.py"):
        (tmp_path / source).rename(tmp_path / "theirs" / source)
    monkeypatch.syspath_prepend(tmp_path)
    assert find("theirs.mine_a").__name__ == "Mine"
    with pytest.raises(UserError, match="must define one Objective, it defines 0"):
        find("theirs.mine_b")
    with pytest.raises(UserError, match="cannot be imported"):
        find("theirs.mine_c")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu_and_itself(harness, name):
    on_cpu, on_gpu, again = (harness.small(name) for _ in range(3))
    batch = harness.make_batch(on_cpu, 4)
    expected = on_cpu(batch, harness.START).loss.detach()
    gradients = []
    for objective in (on_gpu.cuda(), again.cuda()):
        loss = objective({k: x.cuda() for k, x in batch.items()}, harness.START).loss
        torch.testing.assert_close(loss.detach().cpu(), expected, atol=0, rtol=1e-2)  # convolutions may be in TF32
        loss.backward()
        gradients.append(harness.gradients(objective))
    assert_same(*gradients)
