import os
import pickle
import signal
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from selfsight.errors import UserError
from selfsight.shards import decode_image
from selfsight.shards.corpus import CHUNK_DTYPE
from selfsight.stream.loader import StepLoader, auto_workers, to_device
from selfsight.stream.order import Order
from selfsight.stream.views import Views
from selfsight.viewspec import MEAN, STD, CropSpec, NoiseSpec, ViewSpec

SPEC = ViewSpec(
    (
        CropSpec("global", 2, 16, (0.4, 1.0), jitter=0.8, brightness=0.4, hue=0.1, blur=(1.0, 0.1)),
        CropSpec("local", 3, 8, (0.05, 0.4), grayscale=0.2),
    ),
    (NoiseSpec("mask", 4),),
)
BAD = b"no image"


class Images:
    """What the loader uses of a Corpus, in memory: images each like no other, 5 chunks to a shard."""

    path = Path("corpus")

    def __init__(self, sizes=(4, 4, 4, 4, 4) * 4, bad=()):
        self.chunks = np.zeros(len(sizes), dtype=CHUNK_DTYPE)
        self.chunks["n"], self.chunks["first"] = sizes, np.cumsum(sizes) - sizes
        self.chunks["shard"] = np.arange(len(sizes)) // 5
        self.n, self.bad = sum(sizes), bad

    def sample(self, ordinal):
        if ordinal in self.bad:
            return SimpleNamespace(data=BAD)
        pixels = np.random.default_rng(ordinal).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file := BytesIO(), "PNG")
        return SimpleNamespace(data=file.getvalue())


def loader(images=None, *, batch_size=16, total_steps=6, decode=decode_image, workers=0, **more):
    images = images or Images()
    order = Order(images.chunks["n"], batch_size=batch_size, lanes=4, window=2, seed=1)
    views = Views(SPEC, seed=1, decode=decode)
    return StepLoader(images, order, views, total_steps=total_steps, workers=workers, **more)


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
def unbroken():
    return joined(loader())


def test_shapes_and_types(unbroken):
    assert {k: (tuple(v.shape), v.dtype) for k, v in unbroken[0].items()} == {
        "global": ((2, 16, 3, 16, 16), torch.uint8),
        "local": ((3, 16, 3, 8, 8), torch.uint8),
        "mask": ((16, 4), torch.float32),
        "ordinal": ((16,), torch.int64),
    }
    assert len(loader()) == len(unbroken) == 6


def test_an_item_is_the_views_of_its_sample(unbroken):
    ordinals, visits = Order(Images().chunks["n"], batch_size=16, lanes=4, window=2, seed=1).step(5)
    want = Views(SPEC, seed=1, decode=decode_image)(
        decode_image(Images().sample(int(ordinals[9])).data), int(ordinals[9]), int(visits[9])
    )
    np.testing.assert_array_equal(unbroken[5]["ordinal"], ordinals)
    np.testing.assert_array_equal(unbroken[5]["local"][:, 9], want["local"])
    np.testing.assert_array_equal(unbroken[5]["mask"][9], want["mask"])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers, unbroken):
    assert_same(joined(loader(workers=workers)), unbroken)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_out_the_same_batch(world_size, unbroken):
    ranks = [joined(loader(rank=r, world_size=world_size)) for r in range(world_size)]
    assert_same(joined(zip(*ranks, strict=True)), unbroken)


@pytest.mark.parametrize("start", range(6))
def test_resuming_is_beginning_at_a_later_step(start, unbroken):
    assert_same(joined(loader(start_step=start)), unbroken[start:])


def test_accumulation_splits_the_step_of_a_rank(unbroken):
    steps = list(loader(accumulation=4))
    assert [len(s) for s in steps] == [4] * 6
    assert steps[0][0]["global"].shape == (2, 4, 3, 16, 16)
    assert all(tensor.is_contiguous() for tensor in steps[0][1].values())
    assert_same(joined(steps), unbroken)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_random_state_of_the_trainer_is_left_alone(workers):
    torch.manual_seed(5)
    np.random.seed(5)
    before, before_numpy = torch.get_rng_state(), pickle.dumps(np.random.get_state())
    list(loader(workers=workers, total_steps=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert pickle.dumps(np.random.get_state()) == before_numpy


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_decode_is_named(workers):
    with pytest.raises(UserError) as caught:
        list(loader(Images(bad=(47,)), workers=workers))
    assert str(caught.value) == (
        "cannot read image 000000000047 in corpus/shards/000002.tar (not an image): run selfsight corpus verify"
    )


def test_an_image_that_kills_its_process_is_named():
    def deadly(data):
        if data == BAD:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode_image(data)

    with pytest.raises(UserError, match=r"died at image 000000000047 in corpus/shards/000002\.tar: .*stream.workers"):
        list(loader(Images(bad=(47,)), workers=2, decode=deadly))


def test_workers_outlive_signals_that_are_meant_for_the_trainer(unbroken):
    def interrupted(data):
        if os.getpid() != trainer:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return decode_image(data)

    trainer = os.getpid()
    assert_same(joined(loader(workers=1, decode=interrupted)), unbroken)


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="16 is no multiple of 3 processes"):
        loader(world_size=3)
    with pytest.raises(UserError, match="accumulation 5"):
        loader(accumulation=5)


def test_auto_workers_leaves_a_core_to_training(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)))
    assert [auto_workers(r) for r in (1, 2, 4, 8, 24, 32)] == [16, 11, 5, 2, 0, 0]


def test_to_device_normalises_crops(unbroken):
    out = to_device(unbroken[0], "cpu")
    pixels = unbroken[0]["local"].double() / 255
    want = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert out["local"].dtype == torch.float32
    np.testing.assert_allclose(out["local"], want, atol=2e-6, rtol=0)
    assert torch.equal(out["mask"], unbroken[0]["mask"])
    assert unbroken[0]["local"].dtype == torch.uint8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_batches_are_pinned_and_the_same():
    batch = next(iter(loader(workers=1)))[0]
    assert all(t.is_pinned() for t in batch.values())
    on_gpu, here = to_device(batch, "cuda"), to_device(batch, "cpu")
    for name in here:
        np.testing.assert_allclose(on_gpu[name].cpu(), here[name], atol=2e-6, rtol=0)
