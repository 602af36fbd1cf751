"""The procedural corpus: equal pictures from equal seeds, whole or not at all, and classes that colour cannot tell."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from selfsight.corpus import procedural
from selfsight.corpus.procedural import KINDS, World


def pictures(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return procedural.make(tmp_path_factory.mktemp("made") / "images", n_train=230, n_test=50, seed=3)


def drawn(seed, n=200, world=None):
    labels = np.arange(n) % len(KINDS)
    return procedural.draw(np.random.default_rng(seed), labels, world or World()), labels


def test_folders_are_classes_and_every_split_has_as_many_of_each(made):
    assert sorted(p.name for p in made.iterdir()) == ["test", "train"]
    for split, n in (("train", 230), ("test", 50)):
        counts = [len(list((made / split / kind).glob("*.png"))) for kind in KINDS]
        assert sorted(p.name for p in (made / split).iterdir()) == sorted(KINDS) == list(KINDS)
        assert sum(counts) == n
        assert max(counts) - min(counts) <= 1
    with Image.open(next((made / "train").rglob("*.png"))) as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")


def test_the_seed_decides_every_byte_whatever_the_number_of_workers(made, tmp_path):
    again = procedural.make(tmp_path / "again", n_train=230, n_test=50, seed=3, workers=2)
    assert pictures(again) == pictures(made)
    other = procedural.make(tmp_path / "other", n_train=20, n_test=20, seed=4)
    assert not set(pictures(other).values()) & set(pictures(made).values())


def test_no_picture_occurs_twice(made):
    found = list(pictures(made).values())
    assert len(set(found)) == len(found) == 280


def test_a_finished_corpus_is_left_alone(made):
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    assert procedural.make(made, n_train=230, n_test=50, seed=3) == made
    assert {p: p.stat().st_mtime_ns for p in made.rglob("*")} == before


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(block):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(procedural, "_write", full)
    with pytest.raises(OSError, match="No space"):
        procedural.make(tmp_path / "images", n_train=20, n_test=20)
    assert list(tmp_path.iterdir()) == []


def test_colour_and_brightness_do_not_tell_the_class():
    """Nearest class mean on the colour moments of held-out pictures: not far from guessing, which is 10 %."""

    def moments(images):
        flat = images.reshape(len(images), -1, 3) / 255
        return np.concatenate([flat.mean(axis=1), flat.std(axis=1).mean(axis=1, keepdims=True)], axis=1)

    (train, y), (test, truth) = drawn(0, 2000), drawn(1, 500)
    a, b = moments(train), moments(test)
    centres = np.stack([a[y == c].mean(axis=0) for c in range(len(KINDS))]) / a.std(axis=0)
    nearest = ((b / a.std(axis=0))[:, None] - centres).__pow__(2).sum(axis=-1).argmin(axis=1)
    assert (nearest == truth).mean() < 0.3


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_every_outline_is_seen_and_every_coat_but_the_plain_one_has_two_tones(kind):
    still = World(offset=0, bend=0, clutter=0, in_front=0, shadow=0, light=0, noise=0, backdrop=0, radius=(1.0, 1.0))
    outline_of, coat_of, _ = list(KINDS.values())[kind]
    axis = (np.arange(64) + 0.5) / 32 - 1
    u, v = np.meshgrid(axis, axis)
    inside = outline_of(u, v) < 0
    assert 0.2 < inside.mean() < 0.8
    tones = np.unique(coat_of(4 * u, 4 * v)[inside] > 0)
    assert len(tones) == (1 if coat_of is procedural.plain else 2)
    images, _ = drawn(5, 20, replace(still, size=48))
    assert images.shape == (20, 48, 48, 3)
    assert images.dtype == np.uint8
