"""What a classification probe cannot use is one sentence and exit code 2, whichever probe it is."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.cli import main
from selfsight.corpus import build

PROBES = ["knn", "linear", "ridge", "logistic", "lowshot-5perclass"]


def corpus(root: Path, name: str, seed: int, classes: tuple[str, ...] = ("dark", "light"), n: int = 6) -> Path:
    generator = np.random.default_rng(seed)
    for label, folder in enumerate(classes):
        place = root / f"{name}-images" / folder
        place.mkdir(parents=True)
        for i in range(n):
            pixels = generator.integers(0, 100, (32, 32, 3)) + 100 * label
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    build([root / f"{name}-images"], root / name)
    return root / name


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("place")
    corpus(root, "train", 0)
    corpus(root, "test", 1)
    corpus(root, "unlabelled", 2, classes=(".",))
    corpus(root, "single", 3, classes=("dark",))
    corpus(root, "more", 4, classes=("dark", "light", "red"))
    shutil.copytree(root / "train-images", root / "part-images")
    for image in (root / "part-images").rglob("[345].png"):
        image.unlink()
    build([root / "part-images"], root / "inside")
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))


def evaluate(place: Path, probe: str, capsys, train="train", test="test", weights="pixels") -> tuple[int, str]:
    weights = weights if weights == "pixels" else str(place / weights)
    code = main(["eval", probe, weights, "--train", str(place / train), "--test", str(place / test), "--json"])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert (said.out == "") == (code != 0)
    return code, said.err


@pytest.mark.parametrize("probe", PROBES)
def test_corpora_that_mean_nothing(place, capsys, probe):
    for given, message in (
        ({"train": "unlabelled"}, "has no labels"),
        ({"train": "single"}, "has no labels"),  # one folder names no class
        ({"test": "more"}, "different classes (red in only one)"),
        ({"test": "inside"}, "every image of"),
        ({"test": "train"}, "same corpus"),
    ):
        code, said = evaluate(place, probe, capsys, **given)
        assert code == 2
        assert message in said
        assert said.count("\n") == 1, "said before anything is computed"
