"""The quickstart in miniature through the real code: both objectives, own images, no labels, and running it again."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from eval_probes import linear, suite
from launch import quickstart as steps
from launch.cli import main
from launch.commands.quickstart import show
from launch.quickstart import Outcome, Row, Settings, quickstart
from selfsight import encoders
from selfsight.corpus import procedural
from selfsight.errors import UserError
from selfsight.training import pretrain, resolve
from selfsight.weights import export_encoder, load_pretrained, newest_export
from selfsight.weights.folder import Export

TINY = {
    "dino": ("batch_size=32", "epochs=0.1", "optimizer.warmup_epochs=0.01", "objective.out_dim=32"),
    "mae": ("batch_size=32", "epochs=0.1", "optimizer.warmup_epochs=0.01"),
}


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch):
    monkeypatch.setitem(linear.PRESETS, "linear", linear.Linear(lrs=(0.01, 0.1), min_steps=10, epochs=1))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return procedural.make(tmp_path_factory.mktemp("own") / "my images", n_train=150, n_test=10, seed=5) / "train"


def procedural_settings(out, objective):
    return Settings(None, objective, out, n_train=160, n_test=60, overrides=TINY[objective])


@pytest.mark.parametrize("objective", ["dino", "mae"])
def test_the_whole_way(out, objective):
    outcome = quickstart(procedural_settings(out, objective))
    assert [row.name for row in outcome.rows] == ["raw pixels", "untrained encoder", "trained encoder"]
    for row in outcome.rows:
        for score in row.scores.values():
            assert score.low <= score.value <= score.high
            assert score.n == 60
    untrained, trained = (row.scores["knn"] for row in outcome.rows[1:])
    assert untrained.weights_digest != trained.weights_digest
    assert untrained.details["features"]["tokens"] == trained.details["features"]["tokens"]
    assert outcome.report.is_file()
    encoder = load_pretrained(outcome.weights)
    picture = Image.open(next((out / "procedural-0" / "images" / "test").rglob("*.png")))
    assert encoder(encoder.preprocess(picture).unsqueeze(0)).patches.shape[-1] == encoder.embed_dim


def test_an_encoder_that_collapsed_is_told_in_table_and_report(tmp_path, monkeypatch, capsys):
    def collapse(recipe):
        run = pretrain(recipe)
        export = newest_export(run)
        meta = Export.open(export).origin["meta"]
        shutil.rmtree(export)
        encoder = encoders.build(recipe.encoder)
        encoder.vit.norm.weight.data.zero_()
        export_encoder(encoder, recipe.encoder, export, meta=meta)
        return run

    monkeypatch.setattr(steps, "pretrain", collapse)
    outcome = quickstart(procedural_settings(tmp_path, "dino"))
    assert [row.fault for row in outcome.rows] == ["", "", "collapsed"]
    show(outcome)
    said = capsys.readouterr()
    assert "collapsed" in said.out
    assert "the encoder has collapsed" in said.err
    assert "the encoder has collapsed" in outcome.report.read_text(encoding="utf-8")


def test_a_second_call_finds_all_done(out):
    settings = procedural_settings(out, "dino")
    first = quickstart(settings)
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".safetensors", ".tar", ".npy", ".png")}
    again = quickstart(settings)
    assert again == first
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert len(steps.ResultsStore(first.run / "results.sqlite").rows()) == 6


def test_ones_own_images_are_split_by_content(out, images):
    settings = Settings(images, "dino", out, overrides=TINY["dino"])
    corpora = steps._corpora(settings)
    train, test = (steps.Corpus.open(c) for c in (corpora.train, corpora.test))
    assert train.n + test.n == 150
    assert train.classes == test.classes == list(procedural.KINDS)
    pictures = [{c.sample(i).data for i in range(c.n)} for c in (train, test)]
    assert not pictures[0] & pictures[1]


def test_unlabelled_photographs_come_out_with_label_free_figures(tmp_path, images, capsys, monkeypatch):
    flat = tmp_path / "photographs"
    flat.mkdir()
    for i, path in enumerate(sorted(images.rglob("*.png"))[:60]):
        Image.open(path).resize((260, 200)).save(flat / f"{i}.jpg")
    monkeypatch.setattr(steps, "BANK", 30)
    outcome = quickstart(Settings(flat, "mae", tmp_path / "out", overrides=("batch_size=16", *TINY["mae"][1:])))
    assert [row.name for row in outcome.rows] == ["untrained encoder", "trained encoder"]
    assert all(row.figures["rankme"] >= 1 and not row.scores for row in outcome.rows)
    assert "no labels" in capsys.readouterr().err
    assert load_pretrained(outcome.weights).patch_size == 8
    assert {Image.open(p).size for p in (tmp_path / "out").rglob("*.png")} == {(125, 96)}


def test_photographs_of_classes_too_rare_to_be_on_both_sides_are_scored(tmp_path, images):
    photographs = tmp_path / "photographs"
    for i, path in enumerate(sorted(images.rglob("*.png"))[:40]):
        (photographs / f"kind {i % 20}").mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((260, 200)).save(photographs / f"kind {i % 20}" / f"{i}.jpg")
    outcome = quickstart(Settings(photographs, "dino", tmp_path / "out", overrides=TINY["dino"]))
    classes = [steps.Corpus.open(c).classes for c in (outcome.train, outcome.test)]
    assert classes[0] == classes[1] == sorted(f"kind {i}" for i in range(20))
    assert {score.n for row in outcome.rows for score in row.scores.values()} == {steps.Corpus.open(outcome.test).n}


def test_images_that_changed_are_refused_with_the_folder_to_remove(tmp_path, images):
    mine = shutil.copytree(images, tmp_path / "mine")
    settings = Settings(mine, "dino", tmp_path / "out")
    corpora = steps._corpora(settings)
    next(mine.rglob("*.png")).unlink()
    with pytest.raises(UserError, match=f"changed since.*remove {tmp_path / 'out' / 'mine'}$"):
        steps._corpora(settings)
    assert steps.verify(corpora.train) == []


def test_one_image_per_class_is_as_good_as_no_labels(tmp_path, images, capsys):
    for i, path in enumerate(sorted(images.rglob("*.png"))[:3]):
        (tmp_path / "images" / str(i)).mkdir(parents=True)
        shutil.copy(path, tmp_path / "images" / str(i))
    assert not steps._labelled(steps._built(tmp_path / "images", tmp_path / "corpus"))
    assert "one image per class" in capsys.readouterr().err


def test_the_number_of_steps_does_not_depend_on_the_number_of_images(out, images):
    settings = Settings(images, "dino", out)
    corpora = steps._corpora(settings)
    fitted, plain = steps._recipe(settings, corpora), resolve.load("quickstart/dino")
    n = steps.Corpus.open(corpora.train).n
    assert round(fitted.epochs * (n // fitted.batch_size)) == round(plain.epochs * (steps.N_TRAIN // plain.batch_size))
    assert fitted.objective["freeze_last_layer"] > plain.objective["freeze_last_layer"]


def test_another_source_under_the_same_name_is_refused(out, images, tmp_path):
    quick = Settings(images, "dino", out)
    steps._claim(quick)
    other = tmp_path / images.name
    shutil.copytree(images, other)
    with pytest.raises(UserError, match="other images"):
        steps._claim(Settings(other, "dino", out))


def test_images_that_are_not_there_end_in_one_line(tmp_path, capsys):
    assert main(["quickstart", "--images", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_among_the_images_is_refused(images, capsys, monkeypatch):
    monkeypatch.chdir(images.parent)
    before = sorted(images.rglob("*"))
    for out in (images.name, f"{images.name}/work", "."):
        assert main(["quickstart", "--images", images.name, "--out", out]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(images.rglob("*")) == before


def test_what_no_image_could_make_right_is_said_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for flags, said in ((("--seed", "-1"), "--seed is -1"), (("--out", str(tmp_path / "file")), "Not a directory")):
        assert main(["quickstart", "--out", str(tmp_path / "out"), *flags]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_too_few_images_to_hold_some_out(tmp_path, images, capsys):
    (tmp_path / "one").mkdir()
    shutil.copy(next(images.rglob("*.png")), tmp_path / "one" / "a.png")
    assert main(["quickstart", "--images", str(tmp_path / "one"), "--out", str(tmp_path / "out")]) == 2
    assert "give more images" in capsys.readouterr().err.splitlines()[-1]


def test_paths_are_shown_as_they_are(capsys):
    path = Path("photos [old] :star:")
    show(
        Outcome([Row("trained encoder", figures={"rankme": 1, "feature_spread": 0})], path, path, path, "", path, path)
    )
    assert capsys.readouterr().out.count(str(path)) == 2


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_what_the_command_prints(out, monkeypatch, capsys, flags):
    settings = procedural_settings(out, "dino")
    monkeypatch.setattr(steps, "Settings", lambda *given: settings)
    assert main(["quickstart", *flags]) == 0
    said = capsys.readouterr().out
    if flags:
        found = json.loads(said)
        assert [set(row) for row in found["rows"]] == [{"name", "knn", "linear"}] * 3
        assert Path(found["report"]).is_file()
        return
    for words in ("raw pixels", "untrained encoder", "trained encoder", "report.html", "selfsight.load_pretrained("):
        assert words in said


def test_a_suite_runs_on_the_export_and_the_report_shows_it(out, monkeypatch, capsys):
    monkeypatch.setenv("SELFSIGHT_CACHE", str(out / "cache"))
    outcome = quickstart(procedural_settings(out, "dino"))
    corpora = ["--train", str(outcome.train), "--test", str(outcome.test)]
    assert main(["eval", "suite", str(outcome.run), "--suite", "quick", *corpora]) == 0
    assert main(["report", str(outcome.run), *corpora]) == 0
    text = outcome.report.read_text(encoding="utf-8")
    for protocol in suite.load("quick"):
        assert f"Protocol {protocol.name} {protocol.digest[:8]}" in text
    capsys.readouterr()
    assert main(["results", str(outcome.run), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    trained = [s for s in scores if s["weights"] == str(outcome.weights)]
    assert {p.name for p in suite.load("quick")} <= {s["protocol"] for s in trained}
