"""Un-indexed shards through the webdataset library: the batches of a StepLoader, and its promises only."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from selfsight.errors import UserError
from selfsight.shards import decode_image
from selfsight.stream.foreign import WEAKER_PROMISES, ForeignLoader
from selfsight.stream.views import Views
from selfsight.viewspec import CropSpec, NoiseSpec, ViewSpec

SPEC = ViewSpec(
    (CropSpec("global", 2, 16, (0.4, 1.0), jitter=0.8, brightness=0.4), CropSpec("local", 3, 8, (0.05, 0.4))),
    (NoiseSpec("mask", 4),),
)
PLAIN = ViewSpec((CropSpec("crop", 1, 8, (1.0, 1.0), ratio=(1.0, 1.0), flip=0.0),))
SHARDS, PER_SHARD = 4, 10


def pack(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def plain_png(value: int) -> bytes:
    Image.new("RGB", (8, 8), (value, 7, 255 - value)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """40 PNGs of one colour each, with labels and captions, in 4 shards."""
    folder = tmp_path_factory.mktemp("theirs")
    for shard in range(SHARDS):
        members = []
        for i in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
            members += [(f"{i:03d}.cls", b"1"), (f"{i:03d}.json", b"{}"), (f"{i:03d}.png", plain_png(i))]
        pack(folder / f"{shard}.tar", members)
    return f"{folder}/{{0..{SHARDS - 1}}}.tar"


def loader(shards, spec=SPEC, *, batch_size=8, total_steps=5, workers=0, **more):
    views = Views(spec, seed=1, decode=decode_image)
    return ForeignLoader(shards, views, batch_size=batch_size, total_steps=total_steps, workers=workers, **more)


def same(got, want) -> bool:
    pairs = [(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)]
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in b)


def colours(steps) -> list[int]:
    return [int(v) for step in steps for batch in step for v in batch["crop"][0, :, 0, 0, 0]]


def test_batches_are_those_of_a_step_loader_and_it_is_said_what_they_are_not(shards, capsys):
    steps = list(loader(shards, accumulation=2))
    assert [len(step) for step in steps] == [2] * 5
    assert {k: (tuple(v.shape), v.dtype) for k, v in steps[0][0].items()} == {
        "global": ((2, 4, 3, 16, 16), torch.uint8),
        "local": ((3, 4, 3, 8, 8), torch.uint8),
        "mask": ((4, 4), torch.float32),
        "part": ((4,), torch.int64),
        "ordinal": ((4,), torch.int64),
    }
    assert set(steps[0][0]["ordinal"].tolist()) == {-1}
    assert capsys.readouterr().err == WEAKER_PROMISES + "\n"
    noise = torch.cat([batch["mask"] for step in steps for batch in step])
    assert len(np.unique(noise.numpy(), axis=0)) == 40  # every sample has random numbers of its own


def test_one_process_sees_every_image_once_an_epoch_in_an_order_of_each_epochs_own(shards):
    seen = colours(loader(shards, PLAIN, total_steps=15))
    epochs = [seen[i : i + SHARDS * PER_SHARD] for i in range(0, len(seen), SHARDS * PER_SHARD)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(40))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_steps_whoever_decodes_and_another_start_another_order(shards, workers):
    steps = list(loader(shards, workers=workers, seed=3))
    assert same(list(loader(shards, workers=0, seed=3)), steps)
    assert not same(list(loader(shards, workers=workers, seed=4)), steps)
    assert not same(list(loader(shards, workers=workers, seed=3, start_step=2)), steps[2:])


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_out_the_shards(shards, workers):
    ranks = [colours(loader(shards, PLAIN, rank=r, world_size=2, workers=workers, total_steps=6)) for r in range(2)]
    assert not set(ranks[0]) & set(ranks[1])
    assert set(ranks[0]) | set(ranks[1]) == set(range(40))


def test_every_image_of_a_sample_is_one_of_the_batch(tmp_path):
    pack(tmp_path / "s.tar", [("a.left.png", plain_png(1)), ("a.right.PNG", plain_png(2)), ("a.txt", b"png")])
    assert sorted(colours(loader(str(tmp_path / "s.tar"), PLAIN, batch_size=2, total_steps=1))) == [1, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_decode_is_named_or_skipped(tmp_path, workers):
    pack(tmp_path / "s.tar", [("a.png", plain_png(1)), ("bad.png", b"no image"), ("c.png", plain_png(2))])
    url = str(tmp_path / "s.tar")
    with pytest.raises(UserError, match=rf"bad\.png in {url} does not decode .*selfsight corpus adopt"):
        list(loader(url, PLAIN, batch_size=4, workers=workers))
    skipping = loader(url, PLAIN, batch_size=4, total_steps=1, workers=workers, skip_undecodable=True)
    assert sorted(colours(skipping)) == [1, 1, 2, 2]


def test_the_random_state_of_the_trainer_is_left_alone(shards):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(loader(shards, workers=1, total_steps=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_streamed_ends_in_a_sentence(shards, tmp_path):
    with pytest.raises(UserError, match="8 is no multiple of 3 processes"):
        loader(shards, world_size=3)
    with pytest.raises(UserError, match="4 shards are too few for 8 processes"):
        loader(shards, world_size=8)
    with pytest.raises(UserError, match=r"webdataset cannot read the shards .*no\.tar"):
        list(loader(str(tmp_path / "no.tar")))
    pack(tmp_path / "text.tar", [("a.txt", b"a")])
    with pytest.raises(UserError, match=r"no images in .*text\.tar"):
        list(loader(str(tmp_path / "text.tar")))
    (tmp_path / "page.tar").write_text("<html>" * 1000)
    with pytest.raises(UserError, match="webdataset cannot read the shards"):
        list(loader(str(tmp_path / "page.tar")))
