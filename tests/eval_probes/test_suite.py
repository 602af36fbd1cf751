"""A suite runs in one pass, keeps what it measured, goes on past what cannot be run; watchers share a run's work."""

import json
import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval_probes import suite
from eval_probes.bench import Bench
from eval_probes.extraction import How
from eval_probes.results import ResultsStore
from eval_probes.subject import Subject
from eval_probes.watch import Watcher
from launch.cli import main
from selfsight import encoders
from selfsight.corpus import build
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig
from selfsight.shards.corpus import Corpus
from selfsight.weights import export_encoder
from selfsight.weights.run import STATE_SCHEMA

TINY = EncoderConfig("vit_tiny_patch16_224", 32, args={"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3})


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """train and test corpora, and a run with exports at steps 0, 4 and 8."""
    root = tmp_path_factory.mktemp("suite")
    for name, seed in (("train", 0), ("test", 1)):
        generator = np.random.default_rng(seed)
        for i in range(24):
            folder = root / f"{name}-images" / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 100, (32, 32, 3)) + 100 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        build([root / f"{name}-images"], root / name)
    run = root / "run"
    for step in (0, 4, 8):
        torch.manual_seed(step)
        export_encoder(encoders.build(TINY), TINY, run / "exports" / f"step_{step:08d}", meta={"step": step})
    (run / "recipe.yaml").write_text("encoder: {name: vit_tiny_patch16_224}\nobjective: {name: mae}\n")
    last = run / "checkpoints" / "step_00000008"
    last.mkdir(parents=True)
    (last / "state.json").write_text(json.dumps({"schema": STATE_SCHEMA, "step": 8, "total_steps": 8}))
    (last / "COMPLETE").touch()
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(place, tmp_path) -> Path:
    return Path(shutil.copytree(place / "run", tmp_path / "run"))


def bench(place: Path, run: Path) -> Bench:
    return Bench.open(run, place / "train", place / "test")


def test_one_pass_serves_all_and_nothing_is_measured_twice(place, run, monkeypatch):
    protocols = [
        suite.find("knn"),
        suite.find("ridge").override(["tokens=cls2"]),
        suite.find("knn").override(["tokens=avg"]),
    ]
    loaded = []
    load = Subject.load
    monkeypatch.setattr(Subject, "load", lambda *args: loaded.append(1) or load(*args))
    store = ResultsStore(run / "results.sqlite")
    first = list(suite.run(bench(place, run), protocols, store))
    assert len(loaded) == 2, "one pass for each corpus"
    assert [o.known for o in first] == [False] * 3
    assert len(store.rows()) == 3
    again = list(suite.run(bench(place, run), protocols, store))
    assert [o.known for o in again] == [True] * 3
    assert [o.scores for o in again] == [o.scores for o in first]
    assert len(store.rows()) == 3
    alone = suite.find("knn").run(Bench.open(run, place / "train", place / "test", How(cache=str(run / "other"))))
    assert alone == first[0].scores


def test_what_cannot_be_run_does_not_stop_the_others(place, run):
    protocols = [suite.find("ridge").override(["tokens=cls9"]), suite.find("knn"), suite.find("label-free")]
    wrong, right, free = suite.run(bench(place, run), protocols, None)
    assert "2 blocks" in wrong.fault
    assert not wrong.scores
    assert right.scores
    assert free.scores[0].metric == "rankme"
    assert free.scores[0].train_corpus is None


def test_suites_are_read_strictly(tmp_path):
    assert [p.name for p in suite.load("quick")] == ["knn", "linear", "ridge", "label-free"]
    path = tmp_path / "mine.yaml"
    path.write_text("- {protocol: linear, lrs: [0.1, 1e-3], tokens: cls+avg}\n")
    (mine,) = suite.load(str(path))
    assert (mine.lrs, mine.tokens) == ((0.1, 0.001), ("cls+avg",))
    for text, message in (
        ("knn", "should be a list"),
        ("- {k: 3}", "should be a protocol's name"),
        ("- knm", "did you mean knn"),
        ("- {protocol: knn, kk: 3}", "did you mean k"),
        ("- [", "not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            suite.load(str(path))
    with pytest.raises(UserError, match="no suite 'quik'"):
        suite.load("quik")


def test_the_command_prints_every_score_and_keeps_it(place, run, capsys):
    corpora = ["--train", str(place / "train"), "--test", str(place / "test")]
    suite_file = run / "suite.yaml"
    suite_file.write_text("- knn\n- label-free\n- {protocol: ridge, tokens: cls9}\n")
    assert main(["eval", "suite", str(run), "--suite", str(suite_file), *corpora]) == 2
    said = capsys.readouterr()
    assert "knn  top1" in said.out
    assert "label-free  rankme" in said.out
    assert "selfsight: ridge: " in said.err
    assert {s.protocol for s in ResultsStore(run / "results.sqlite").rows()} == {"knn", "label-free"}


def watch(place: Path, run: Path, seen, policy: str = "every") -> None:
    torch.set_num_threads(1)
    corpora = (Corpus.open(place / "train"), Corpus.open(place / "test"))
    protocols = [suite.find("knn"), suite.find("label-free")]
    for step, outcome in Watcher(run, protocols, *corpora, How(workers=1), policy).watch(poll=0.05):
        seen.put((step, outcome.protocol.name, outcome.fault))


def test_watchers_share_the_checkpoints(place, run):
    context = multiprocessing.get_context("spawn")
    seen = context.Queue()
    watchers = [context.Process(target=watch, args=(place, run, seen)) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    found = sorted(seen.get(timeout=120) for _ in range(6))
    for watcher in watchers:
        watcher.join(60)
        assert watcher.exitcode == 0
    assert found == [(step, name, "") for step in (0, 4, 8) for name in ("knn", "label-free")]
    assert len(ResultsStore(run / "results.sqlite").rows()) == 3 * 5, "once each"


def watch_and_hang(place: Path, run: Path, seen) -> None:
    """A watcher that hangs in the second thing it measures."""
    label_free = type(suite.find("label-free"))
    label_free.run = lambda *_: seen.put("hangs") or time.sleep(600)
    watch(place, run, seen)


def test_a_watcher_that_is_killed_leaves_its_work_to_the_next(place, run):
    context = multiprocessing.get_context("spawn")
    seen = context.Queue()
    watcher = context.Process(target=watch_and_hang, args=(place, run, seen))
    watcher.start()
    assert seen.get(timeout=120) == (0, "knn", "")
    assert seen.get(timeout=120) == "hangs"
    corpora = (Corpus.open(place / "train"), Corpus.open(place / "test"))
    protocols = [suite.find("knn"), suite.find("label-free")]
    others = Watcher(run, protocols, *corpora, How(workers=1), "newest").watch(follow=False)
    assert {step for step, _ in others} == {8}, "while it lives, its claim holds"
    watcher.kill()
    watcher.join(60)
    found = [(step, o.protocol.name) for step, o in Watcher(run, protocols, *corpora, How(workers=1)).watch(poll=0.05)]
    assert found == [(0, "label-free"), (4, "knn"), (4, "label-free")]
    kept = [(s.details["weights"]["step"], s.metric) for s in ResultsStore(run / "results.sqlite").rows()]
    metrics = ("top1", "rankme", "alpha-req", "uniformity", "spread")
    assert sorted(kept) == sorted((step, metric) for step in (0, 4, 8) for metric in metrics), "once each"


def test_the_newest_is_enough_where_that_is_asked_for(place, run):
    corpora = (Corpus.open(place / "train"), Corpus.open(place / "test"))
    watcher = Watcher(run, [suite.find("knn")], *corpora, How(), "newest")
    assert [step for step, _ in watcher.watch(poll=0.01)] == [8]
    assert list(Watcher(run, [suite.find("knn")], *corpora, How(), "newest").watch()) == []


def test_mistakes_of_a_watcher_are_one_sentence(place, run, capsys):
    assert main(["eval", "watch", str(place), "--once"]) == 2
    assert main(["eval", "watch", str(run), "--budget", "0", "--once"]) == 2
    err = capsys.readouterr().err
    assert "is not a run" in err
    assert "no share of the time" in err
    assert main(["eval", "watch", str(run), "--once", "--test", str(place / "test")]) == 2
    assert "needs a train corpus" in capsys.readouterr().err
