import itertools

import pytest
import torch

from selfsight.shards import Corpus
from selfsight.stream.loader import StepLoader
from selfsight.stream.mixture import Mixture, Part
from selfsight.stream.quarantine import Quarantine
from selfsight.stream.views import Views
from selfsight.training.account import Account
from selfsight.training.cluster import Cluster
from selfsight.viewspec import CropSpec, ViewSpec

SPEC = ViewSpec((CropSpec("crop", 1, 8, (1.0, 1.0)),))
ALONE = Cluster(0, 0, 1, torch.device("cpu"))
PER_EPOCH = 6  # steps of 8 for 48 images


@pytest.fixture
def begin(corpora, tmp_path):
    """Starts at a step, on a corpus of which the images in `bad` cannot be read: (account, steps)."""

    def begin(start=0, restored=None, bad=()):
        corpus = Corpus.open(corpora["one"])
        read = corpus.sample

        def sample(ordinal):
            if ordinal in bad:
                raise ValueError("the image is not what was stored")
            return read(ordinal)

        corpus.sample = sample
        mixture = Mixture([Part(corpus)], batch_size=8, lanes=2, window=2, seed=0)
        quarantine = Quarantine(tmp_path / "quarantine" / "00000.jsonl")
        loader = StepLoader(
            mixture, Views(SPEC, seed=0), start_step=start, total_steps=99, workers=0, quarantine=quarantine
        )
        return Account(loader, ALONE, start, restored or {}), iter(loader)

    return begin


def take(steps, count):
    return [b["ordinal"].tolist() for (b,) in itertools.islice(steps, count)]


def test_an_epoch_that_began_before_the_checkpoint_is_whole(begin):
    account, steps = begin()
    take(steps, 4)
    assert account.look(4) == []
    account, steps = begin(4, account.open(4))
    take(steps, PER_EPOCH)
    assert account.look(4 + PER_EPOCH) == [(False, "epoch 1 is over: all of its 48 images were delivered")]


def test_what_was_not_delivered_is_an_alarm(begin):
    account, steps = begin(4)  # a checkpoint that says nothing of the steps before
    take(steps, PER_EPOCH)
    ((alarming, sentence),) = account.look(4 + PER_EPOCH)
    assert alarming
    assert "epoch 1 is over, but 16 and not 48 images were delivered" in sentence


def test_a_bad_image_is_told_once_however_often_a_run_goes_on(begin):
    first, second = take(begin()[1], 2)
    bad = {first[0], second[0]}
    account, steps = begin(bad=bad)
    take(steps, 1)
    ((alarming, sentence),) = account.look(1)
    assert alarming
    assert sentence.startswith("1 image could not be read and others stood in")
    account, steps = begin(1, account.open(1), bad)
    take(steps, 2 * PER_EPOCH)  # over which the first one is met again
    told = [sentence for alarming, sentence in account.look(1 + 2 * PER_EPOCH) if alarming]
    assert len(told) == 1
    assert told[0].startswith("1 image could not be read")
