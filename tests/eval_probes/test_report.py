"""A report is made from a miniature real run: real corpora, real exports, scores from the store."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval_probes.bench import Bench
from eval_probes.protocol import find
from eval_probes.report import build_report
from eval_probes.results import ResultsStore, figure, score_of
from eval_probes.subject import Subject
from launch.cli import main
from selfsight import corpus, encoders
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig, Recipe
from selfsight.weights import export_encoder
from selfsight.weights.folder import Export

HOSTILE = "<script>alert(1)</script> & co"
CONFIG = EncoderConfig(
    name="vit_tiny_patch16_224", img_size=16, args={"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
)
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Reads a page as a strict reader would: every element that opens is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words += data

    def images(self) -> list[str]:
        return [str(attrs["src"]) for tag, attrs in self.tags if tag == "img"]


def draw(folder: Path, classes: list[str], each: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for number in range(len(classes)):
        (folder / f"class{number}").mkdir(parents=True)
        for i in range(each):
            pixels = generator.integers(0, 80, (20, 24, 3)) + np.eye(3, dtype=int)[number % 3] * 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{number}" / f"{i}.png")
        # A file system takes such a name, and so a class may have it.
        (folder / f"class{number}").rename(folder / classes[number].replace("/", "⁄"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Labelled train and test corpora, an unlabelled one, and a run with an untrained and a trained encoder."""
    home = tmp_path_factory.mktemp("report")
    draw(home / "files", ["apple", HOSTILE, "pear"], 6, seed=0)
    draw(home / "others", ["apple", HOSTILE, "pear"], 4, seed=1)
    for i, path in enumerate(sorted((home / "files").rglob("*.png"))):
        (home / "flat").mkdir(exist_ok=True)
        (home / "flat" / f"{i}.png").write_bytes(path.read_bytes())
    for source, name in (("files", "train"), ("others", "test"), ("flat", "bare")):
        corpus.build([home / source], home / name, workers=1)
    make_run(home, "run", "train")
    return home


def make_run(home: Path, name: str, on: str, config: EncoderConfig = CONFIG) -> Path:
    run, corpus_id = home / name, json.loads((home / on / "manifest.json").read_text())["id"]
    for step in (0, 40):
        torch.manual_seed(step)
        meta = {"which": "teacher", "objective": "dino", "step": step, "corpus_id": corpus_id}
        export_encoder(encoders.build(config), config, run / "exports" / f"step_{step:08d}", meta=meta)
    recipe = Recipe(str(home / on), str(run), encoder=config, objective={"name": "dino", "out_dim": 64}, batch_size=8)
    recipe.provenance = {"batch_size": "command line"}
    (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    lines = [
        {"step": s, "epoch": s / 4, "loss": None if s == 20 else 4 - s / 40, "weight_decay": 0.04, "momentum": 0.996}
        | {"lr": 1e-3 / s, "images_per_second": 80.0 + s, "rankme": 5.0 + s / 10, "new_metric": s * 2.0}
        for s in range(1, 41)
    ]
    lines.insert(20, {"step": 20, "event": f"step 20: the loss is nan; {HOSTILE}"})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41, "lo'
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    return run


@pytest.fixture(autouse=True)
def cache(home, monkeypatch):
    monkeypatch.setenv("SELFSIGHT_CACHE", str(home / "cache"))


def add_scores(home: Path, run: Path) -> None:
    store = ResultsStore(run / "results.sqlite")
    for weights in ("pixels", run / "exports" / "step_00000000", run / "exports" / "step_00000040"):
        store.add(*Bench.open(weights, home / "train", home / "test").run([find("knn")]))


def test_report_holds_everything_and_needs_nothing(home):
    run = make_run(home, "whole", "train")
    add_scores(home, run)
    out = build_report(run, train=home / "train", test=home / "test")
    assert out == run / "report.html"
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    for words in ("whole", "DINO", "18 images", "k-nearest neighbours", "Raw pixels", "Untrained encoder"):
        assert words in page.words
    score = ResultsStore(run / "results.sqlite").rows()[-1]
    assert f"{100 * score.low:.1f}–{100 * score.high:.1f}" in page.words
    assert score.protocol_digest[:8] in page.words
    assert "New metric" in page.words  # an objective's own metric needs no change here
    assert "weight decay 0.04" in page.words  # a constant is said, not drawn
    assert "command line" in page.words  # provenance
    assert f"selfsight.load_pretrained('{run.resolve()}/exports/step_00000040')" in page.words

    # 8 queries with 6 neighbours under either encoder, and 8 images with 2 colour maps, mean attention and 3 heads.
    assert len(page.images()) == 8 * (1 + 6 + 6) + 8 * (1 + 2 + 1 + 3)
    assert all(re.match(r"data:image/(png|webp);base64,", source) for source in page.images())
    assert not any(tag in ("script", "link", "iframe") for tag, _ in page.tags)
    assert not re.search(r"https?:|url\(|@import|(src|href)=.//", re.sub(r"base64,[^\"]*", "", text))
    assert len(text) < 3_000_000
    assert list(run.glob(".report*")) == []


def test_what_strangers_wrote_is_text(home):
    text = build_report(home / "run", test=home / "test", out=home / "hostile.html").read_text(encoding="utf-8")
    assert HOSTILE.replace("/", "⁄") in Page(text).words  # as a class and in the alarm
    assert "<script" not in text


def test_alarms_are_marked_and_said(home):
    text = build_report(home / "run", out=home / "alarms.html").read_text(encoding="utf-8")
    assert "the loss is nan" in Page(text).words
    assert 'class="alarm"' in text


def test_without_labels(home):
    run = make_run(home, "unlabelled", "bare")
    page = Page(build_report(run, out=home / "bare.html").read_text(encoding="utf-8"))
    assert "no labels" in page.words
    assert "nothing to probe for" in page.words
    assert "RankMe: how many dimensions" in page.words
    assert not {"✓", "✗"} & set(page.words)
    assert len(page.images()) == 8 * (1 + 6 + 6) + 8 * (1 + 2 + 1 + 3)


def test_without_corpus_scores_or_metrics(home):
    run = make_run(home, "bones", "train")
    (run / "metrics.jsonl").unlink()
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(home / "train"), "/gone"))
    page = Page(build_report(run).read_text(encoding="utf-8"))
    assert page.images() == []
    for words in ("No scores yet", "No metrics were written", "no corpus was found", "no longer where the recipe says"):
        assert words in page.words


def test_run_that_has_not_exported_yet(home):
    run = home / "young"
    run.mkdir()
    (run / "recipe.yaml").write_text((home / "run" / "recipe.yaml").read_text())
    assert "the run has no exports yet" in Page(build_report(run).read_text(encoding="utf-8")).words


def test_encoder_without_class_token(home):
    args = {**CONFIG.args, "class_token": False, "global_pool": "avg"}
    args.pop("global_pool")
    run = make_run(home, "classless", "bare", EncoderConfig(CONFIG.name, img_size=16, args=args))
    page = Page(build_report(run).read_text(encoding="utf-8"))
    assert "no class token" in page.words
    assert len(page.images()) == 8 * (1 + 6 + 6) + 8 * (1 + 2)


def test_corpus_smaller_than_a_sheet(home):
    draw(home / "two_files", ["apple", "pear"], 1, seed=3)
    corpus.build([home / "two_files"], home / "two", workers=1)
    page = Page(build_report(home / "run", train=home / "two", out=home / "two.html").read_text(encoding="utf-8"))
    assert len(page.images()) == 2 * (1 + 1 + 1) + 2 * (1 + 2 + 1 + 3)


def test_same_run_same_report(home):
    first = build_report(home / "run", test=home / "test", out=home / "a.html").read_bytes()
    assert build_report(home / "run", test=home / "test", out=home / "b.html").read_bytes() == first


def test_command_says_where_the_report_is(home, capsys):
    assert main(["report", str(home / "run"), "--out", str(home / "said.html")]) == 0
    assert capsys.readouterr().out == f"{home / 'said.html'}\n"
    assert (home / "said.html").is_file()


def test_folder_that_is_no_run(home, capsys):
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        build_report(home / "train")
    assert main(["report", str(home / "nowhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_failed_report_leaves_the_old_one(home, monkeypatch):
    out = home / "kept.html"
    out.write_text("the old one")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        build_report(home / "run", out=out)
    assert out.read_text() == "the old one"
    assert list(home.glob(".kept*")) == []


def test_only_scores_of_one_measurement_are_compared(home):
    run = make_run(home, "compared", "train")
    store = ResultsStore(run / "results.sqlite")
    (base,) = Bench.open("pixels", home / "train", home / "test").run([find("knn")])
    trained, untrained = (Export.open(run / "exports" / f"step_{s:08d}").digest for s in (40, 0))
    store.add(replace(base, value=0.9, low=0.8, high=0.95, n=500, weights="t", weights_digest=trained))
    store.add(replace(base, value=0.5, low=0.4, high=0.6, n=500, weights="u", weights_digest=untrained))
    store.add(replace(base, value=0.7, low=0.6, high=0.8, n=500, test_corpus="another"))
    page = Page(build_report(run, out=home / "compared.html").read_text(encoding="utf-8"))
    words = "On the trained encoder, k-NN recognises 90.0 % of 500 held-out images (untrained 50.0 %). "
    assert words + "The intervals are apart." in page.words.replace("\xa0", " ")


def test_every_protocol_is_shown_and_many_figures_are_folded(home):
    run = make_run(home, "many", "train")
    for step in (10, 20):
        torch.manual_seed(step)
        export_encoder(encoders.build(CONFIG), CONFIG, run / "exports" / f"step_{step:08d}", meta={"step": step})
    store = ResultsStore(run / "results.sqlite")
    on = {"train": "one", "test": "two"}
    for step in (0, 10, 20, 40):
        subject = Subject.open(run / "exports" / f"step_{step:08d}")
        items = np.linspace(2, 6, 50) - step / 40
        store.add(
            score_of("error", items, find("ridge"), subject, **on, unit="px", better="lower"),
            *(figure(f"level-{i}", i / 100, 50, find("ridge"), subject, **on, unit="%") for i in range(30)),
            figure("rankme", 20.0 + step, 50, find("label-free"), subject, train=None, test="two"),
        )
    text = build_report(run, out=home / "many.html").read_text(encoding="utf-8")
    page = Page(text)
    for words in (
        "Ridge regression: error",
        "label-free: rankme",
        "30 more figures",
        "level-29, %",
        "Over the checkpoints",
    ):
        assert words in page.words
    assert "After step" not in page.words  # the curve shows them
    (curve,) = re.findall(r'<svg[^>]*aria-label="Ridge regression: error.*?</svg>', text)
    assert (curve.count("<circle"), curve.count('class="band"')) == (4, 1)
    assert "step 40: 3 px" in curve


def test_checkpoints_are_shown_before_the_last_one_is_measured(home):
    run = make_run(home, "half", "train")
    store = ResultsStore(run / "results.sqlite")
    for step in (1, 2, 3):
        torch.manual_seed(step)
        export = export_encoder(
            encoders.build(CONFIG), CONFIG, run / "exports" / f"step_{step:08d}", meta={"step": step}
        )
        store.add(figure("rankme", step, 9, find("label-free"), Subject.open(export), train=None, test="two"))
    words = Page(build_report(run, out=home / "half.html").read_text(encoding="utf-8")).words
    assert "After step 3" in words
    assert "After step 2" not in words
