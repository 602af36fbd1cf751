"""The verbs eval and info: one JSON object on stdout, mistakes in one line with exit code 2, scores kept."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval_probes.results import ResultsStore
from launch.cli import main
from selfsight import encoders
from selfsight.corpus import build
from selfsight.recipe import EncoderConfig
from selfsight.weights import export_encoder

TINY = EncoderConfig("vit_tiny_patch16_224", 32, args={"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3})


def images(folder: Path, seed: int, classes=("dark", "light")) -> Path:
    generator = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(0, 100, size=(32, 32, 3)) + 60 * label
            pixels[:, :16] += 40 * label  # so that channels standardised over the corpus still tell them apart
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """train and test corpora, an unlabelled one, one of other classes, and a run with one export."""
    root = tmp_path_factory.mktemp("place")
    build([images(root / "a", 0)], root / "train")
    build([images(root / "b", 1)], root / "test")
    build([images(root / "c", 2, classes=("dark", "other"))], root / "other")
    flat = root / "flat"
    flat.mkdir()
    for i, path in enumerate((root / "a").rglob("*.png")):
        shutil.copy(path, flat / f"{i}.png")
    build([flat], root / "unlabelled")
    torch.manual_seed(0)
    run = root / "run"
    export_encoder(encoders.build(TINY), TINY, run / "exports" / "step_00000004", meta={"step": 4, "which": "student"})
    (run / "recipe.yaml").write_text("encoder: {name: vit_tiny_patch16_224}\nobjective: {name: mae}\ncorpus: null\n")
    (run / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 1.0}\n{"step": 4, "loss": 0.5}\n{"step": 4, "event": "x"}\n{"st'
    )
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))


def evaluate(place: Path, probe: str, weights: str | Path, *rest: str, train="train", test="test") -> int:
    corpora = ["--train", str(place / train), "--test", str(place / test)]
    return main(["eval", probe, str(weights), *corpora, *rest])


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_json_is_one_object_with_everything(place, tmp_path, capsys, probe):
    results = tmp_path / "results.sqlite"
    assert evaluate(place, probe, "pixels", "--json", "--results", str(results)) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["n"] == 24
    assert said["low"] <= said["value"] <= said["high"]
    assert (said["metric"], said["protocol"], said["weights"]) == ("top1", probe, "pixels")
    (kept,) = ResultsStore(results).rows()
    assert kept.to_dict() == said


def test_a_person_reads_one_line(place, capsys):
    assert evaluate(place, "knn", "pixels", "k=3") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "k=3" in out
    assert "n=24" in out


def test_scores_of_a_run_are_kept_in_the_run(place, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    assert evaluate(place, "knn", run) == 0
    assert evaluate(place, "mae-linprobe-kept", run / "exports" / "step_00000004", "tokens=cls+avg") == 0
    protocols = [s.protocol for s in ResultsStore(run / "results.sqlite").rows()]
    assert protocols == ["knn", "mae-linprobe-kept"]
    capsys.readouterr()
    assert main(["info", str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kind"], said["step"], said["exports"]) == ("run", 4, [4])
    assert said["metrics"]["loss"] == 0.5
    assert [s["protocol"] for s in said["scores"]] == ["knn", "mae-linprobe-kept"]
    assert said["scores"][0]["step"] == 4
    assert said["newest"] == said["scores"]
    assert evaluate(place, "knn", run) == 0
    capsys.readouterr()
    assert main(["info", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.count("knn top1 at step 4: ") == 1
    assert f"and 1 more: selfsight results {run}" in said


def test_keys_of_a_protocol_need_no_weights(capsys):
    assert keys(capsys, "--keys")["k"] == 20
    changed = keys(capsys, "--keys", "k=5")
    assert changed["k"] == 5
    assert changed["digest"] != keys(capsys, "--keys")["digest"]
    assert keys(capsys, "run", "k=5", "--keys") == changed
    with pytest.raises(SystemExit) as e:
        main(["eval", "knn", "--keys", "kk=5"])
    assert e.value.code == 2
    assert "did you mean k?" in capsys.readouterr().err


def keys(capsys, *arguments: str) -> dict:
    with pytest.raises(SystemExit) as e:
        main(["eval", "knn", *arguments])
    assert e.value.code == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test": "unlabelled"}, "has no labels"),
        ({"test": "other"}, "different classes"),
        ({"test": "train"}, "same corpus"),
        ({"test": "nowhere"}, "nowhere"),
    ],
)
def test_corpora_that_mean_nothing_are_one_line(place, capsys, arguments, message):
    assert evaluate(place, "knn", "pixels", "--json", **arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert "Traceback" not in said.err
    assert "features of" not in said.err  # said before hours of work, not after


def test_a_score_that_cannot_be_kept_is_said_all_the_same(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert evaluate(place, "knn", "pixels", "--json", "--results", str(tmp_path / "file" / "results.sqlite")) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["n"] == 24
    assert "file" in said.err.splitlines()[-1]


def test_arguments_without_sense_are_one_line(place, capsys):
    for rest in (
        ["k=0"],
        ["k=many"],
        ["kk=3"],
        ["temperature=0"],
        ["--batch-size", "0"],
        ["tokens=patches"],
        ["--device", "quantum"],
    ):
        assert evaluate(place, "knn", place / "run", *rest) == 2
    assert evaluate(place, "knn", place / "nowhere") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_info_knows_every_folder(place, capsys):
    for path, kind in (("train", "corpus"), ("run", "run"), ("run/exports/step_00000004", "weights")):
        assert main(["info", str(place / path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kind"] == kind
        assert main(["info", str(place / path)]) == 0
        text = capsys.readouterr().out
        assert kind in text.splitlines()[0].rsplit(":", 1)[1]
        assert "None" not in text
    assert main(["info", str(place / "unlabelled")]) == 0
    assert "unlabelled" in capsys.readouterr().out


def test_info_on_anything_else_is_one_line(place, capsys):
    assert main(["info", str(place)]) == 2
    assert main(["info", str(place / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
