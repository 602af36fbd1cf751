import os
import pickle
import threading

import numpy as np
import pytest
import torch

from selfsight.errors import UserError
from selfsight.shards import decode_image
from selfsight.stream.loader import StepLoader, auto_workers, to_device
from selfsight.stream.mixture import Mixture, Part
from selfsight.stream.order import Order
from selfsight.stream.quarantine import Quarantine, read_quarantine
from selfsight.stream.views import Views
from selfsight.viewspec import MEAN, STD, CropSpec, NoiseSpec, ViewSpec

SPEC = ViewSpec(
    (
        CropSpec("global", 2, 16, (0.4, 1.0), jitter=0.8, brightness=0.4, hue=0.1, blur=(1.0, 0.1)),
        CropSpec("local", 3, 8, (0.05, 0.4), grayscale=0.2),
    ),
    (NoiseSpec("mask", 4),),
)


@pytest.fixture(scope="module")
def loader(images):
    def make(corpus=None, *, batch_size=16, total_steps=6, workers=0, **more):
        mixture = Mixture([Part(corpus or images())], batch_size=batch_size, lanes=4, window=2, seed=1)
        views = Views(SPEC, seed=1)
        return StepLoader(mixture, views, total_steps=total_steps, workers=workers, **more)

    return make


def joined(steps):
    """One dict per step, its micro-batches put together again."""
    return [
        {k: torch.cat([b[k] for b in batches], dim=1 if batches[0][k].ndim == 5 else 0) for k in batches[0]}
        for batches in steps
    ]


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in b:
            assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def unbroken(loader):
    return joined(loader())


def test_shapes_and_types(unbroken, loader):
    assert {k: (tuple(v.shape), v.dtype) for k, v in unbroken[0].items()} == {
        "global": ((2, 16, 3, 16, 16), torch.uint8),
        "local": ((3, 16, 3, 8, 8), torch.uint8),
        "mask": ((16, 4), torch.float32),
        "ordinal": ((16,), torch.int64),
        "part": ((16,), torch.int64),
    }
    assert len(loader()) == len(unbroken) == 6


def test_an_item_is_the_views_of_its_sample(unbroken, images):
    ordinals, visits = Order(images().chunks["n"], batch_size=16, lanes=4, window=2, seed=1).step(5)
    want = Views(SPEC, seed=1)(decode_image(images().sample(int(ordinals[9])).data), int(ordinals[9]), int(visits[9]))
    np.testing.assert_array_equal(unbroken[5]["ordinal"], ordinals)
    np.testing.assert_array_equal(unbroken[5]["local"][:, 9], want["local"])
    np.testing.assert_array_equal(unbroken[5]["mask"][9], want["mask"])


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_workers_change_nothing(workers, unbroken, loader):
    assert_same(joined(loader(workers=workers)), unbroken)


@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_ranks_share_out_the_same_batch(world_size, unbroken, loader):
    ranks = [joined(loader(rank=r, world_size=world_size)) for r in range(world_size)]
    assert_same(joined(zip(*ranks, strict=True)), unbroken)


@pytest.mark.parametrize("start", range(6))
def test_resuming_is_beginning_at_a_later_step(start, unbroken, loader):
    assert_same(joined(loader(start_step=start)), unbroken[start:])


def test_accumulation_splits_the_step_of_a_rank(unbroken, loader):
    steps = list(loader(accumulation=4))
    assert [len(s) for s in steps] == [4] * 6
    assert steps[0][0]["global"].shape == (2, 4, 3, 16, 16)
    assert all(tensor.is_contiguous() for tensor in steps[0][1].values())
    assert_same(joined(steps), unbroken)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_random_state_of_the_trainer_is_left_alone(workers, loader):
    torch.manual_seed(5)
    np.random.seed(5)
    before, before_numpy = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    list(loader(workers=workers, total_steps=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert pickle.dumps(np.random.get_state()) == before_numpy


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 4])
def test_a_bad_image_is_replaced_and_the_stream_does_not_shift(workers, world_size, unbroken, tmp_path, loader, images):
    """On any number of ranks the same sample stands in, from the same window, and the others stay what they were."""
    bad = (47, 11)
    loaders = [
        loader(
            images(bad=bad),
            rank=r,
            world_size=world_size,
            workers=workers,
            quarantine=Quarantine(tmp_path / f"{r}.jsonl"),
        )
        for r in range(world_size)
    ]
    ranks = [joined(one) for one in loaders]
    got = joined(zip(*ranks, strict=True))
    replaced = 0
    for step, want in zip(got, unbroken, strict=True):
        for place, ordinal in enumerate(want["ordinal"].tolist()):
            shown = int(step["ordinal"][place])
            same = all(torch.equal(step[n][:, place], want[n][:, place]) for n in ("global", "local"))
            if ordinal in bad:
                replaced += 1
                assert shown not in (ordinal, *bad)
                assert not same
            else:
                assert shown == ordinal
                assert same
    assert replaced
    found = list(read_quarantine(tmp_path))
    assert {f.sample for f in found} <= set(bad)
    assert len({f.sample for f in found}) == len({o for s in unbroken for o in s["ordinal"].tolist()} & set(bad))
    assert all(f.what == "not an image" and f"{f.sample:012d} in corpus/shards" in f.where for f in found)
    one = joined(loader(images(bad=bad)))
    assert_same(got, one)
    assert sum(sum(one.delivered.values()) for one in loaders) == 96  # a replaced place is a delivered one


def test_a_stand_in_shows_crops_that_its_own_turn_does_not(unbroken, loader, images):
    got = joined(loader(images(bad=(47,))))
    at = next((t, i) for t, s in enumerate(unbroken) for i, o in enumerate(s["ordinal"].tolist()) if o == 47)
    shown = int(got[at[0]]["ordinal"][at[1]])
    own = [(t, i) for t, s in enumerate(unbroken) for i, o in enumerate(s["ordinal"].tolist()) if o == shown]
    assert own
    for t, i in own:
        assert not torch.equal(unbroken[t]["global"][:, i], got[at[0]]["global"][:, at[1]])


def test_too_many_bad_images_end_in_a_sentence(loader, images):
    with pytest.raises(UserError, match=r"^\d+ of \d+ images cannot be read, more than stream.max_damaged=0.001 "):
        list(loader(images(bad=range(0, 80, 5)), workers=2))
    with pytest.raises(UserError, match=r"^1 of \d+ images cannot be read, more than stream.max_damaged=0 allows"):
        list(loader(images(bad=[5, 47]), quarantine=Quarantine(limit=0)))
    borne = loader(images(bad=range(0, 80, 5)), quarantine=Quarantine(limit=0.5))
    assert len(list(borne)) == 6
    assert len(borne.quarantine) == 16


def test_a_window_without_a_sound_image_ends_in_a_sentence(loader, images):
    with pytest.raises(UserError, match=r"^cannot read image \d+ in corpus/.* nor those around it: run"):
        list(loader(images(bad=range(80)), workers=1))


def test_what_was_delivered_is_counted(loader):
    one = loader(total_steps=11)
    list(one)
    assert one.delivered == {(0, 0): 80, (0, 1): 80, (0, 2): 16}


def test_leaving_early_ends_the_threads(unbroken, loader):
    before = threading.active_count()
    steps = iter(loader(workers=4, total_steps=10**6))
    assert_same(joined([next(steps)]), unbroken[:1])
    steps.close()
    assert threading.active_count() == before


def test_batches_that_do_not_divide_are_refused(loader):
    with pytest.raises(UserError, match="16 is no multiple of 3 processes"):
        loader(world_size=3)
    with pytest.raises(UserError, match="accumulation 5"):
        loader(accumulation=5)


def test_auto_workers_leaves_a_core_to_training(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)))
    assert [auto_workers(r) for r in (1, 2, 4, 8, 24, 32)] == [16, 11, 5, 2, 0, 0]


def test_to_device_normalises_crops(unbroken):
    out = to_device(unbroken[0], "cpu", SPEC)
    pixels = unbroken[0]["local"].double() / 255
    want = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert out["local"].dtype == torch.float32
    np.testing.assert_allclose(out["local"], want, atol=2e-6, rtol=0)
    assert torch.equal(out["mask"], unbroken[0]["mask"])
    assert unbroken[0]["local"].dtype == torch.uint8


def test_a_staged_batch_shows_the_same_crops(loader, unbroken):
    """Made in batches where training runs, from the same numbers: the same to half a level and its rounding."""
    ((batch,),) = loader(staged=True, total_steps=1, workers=1)
    assert batch["canvas"].dtype == torch.uint8
    device, here = to_device(batch, "cpu", SPEC), to_device(unbroken[0], "cpu", SPEC)
    assert device.keys() == here.keys()
    for name in ("ordinal", "part", "mask"):
        assert torch.equal(device[name], here[name])
    for name in ("global", "local"):
        levels = (device[name] - here[name]).abs() * 255 * torch.tensor(STD).view(3, 1, 1)
        assert levels.max() < 1.6  # the CPU rounds to whole levels at the end
        assert levels.mean() < 0.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_batches_are_pinned_and_the_same(loader):
    batch = next(iter(loader(workers=1)))[0]
    assert all(t.is_pinned() for t in batch.values())
    on_gpu, here = to_device(batch, "cuda", SPEC), to_device(batch, "cpu", SPEC)
    for name in here:
        np.testing.assert_allclose(on_gpu[name].cpu(), here[name], atol=2e-6, rtol=0)
