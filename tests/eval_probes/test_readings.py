"""Scores of runs and stores as they are read: folded, grouped and held against each other."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from eval_probes.comparison import compare
from eval_probes.intervals import holm, mcnemar
from eval_probes.protocol import Protocol, find
from eval_probes.readings import read, short_names
from eval_probes.results import ResultsStore, figure, score_of
from eval_probes.subject import PIXELS, Subject
from selfsight.errors import UserError


@dataclass(frozen=True)
class Errors(Protocol):
    kind = "errors"

    def run(self, bench):
        raise NotImplementedError


def subject(run: Path, step: int) -> Subject:
    return Subject(f"{run}/exports/step_{step:08d}", f"{run.name}-{step}", {}, {"step": step}, 8)


def run_of(folder: Path, name: str) -> Path:
    run = folder / name
    run.mkdir()
    (run / "recipe.yaml").write_text("encoder: {name: x}\nobjective: {name: mae}\n")
    return run


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two runs of two checkpoints: kNN apart at the newest, ridge not, errors the other way round, RankMe untested."""
    generator = np.random.default_rng(0)
    ease, noise = generator.random(500), generator.random(500).astype(np.float32)
    made = []
    for name, ahead in (("a", 0.0), ("b", 0.2)):
        run = run_of(tmp_path, name)
        store = ResultsStore(run / "results.sqlite")
        on = {"train": "train", "test": "test"}
        store.add(score_of("top1", ease < 0.3, find("knn"), Subject(PIXELS, "pixels", {}, {}, 8), **on))
        for step in (10, 20):
            s = subject(run, step)
            store.add(score_of("top1", ease < 0.4 + ahead * (step == 20), find("knn"), s, **on))
            store.add(score_of("top1", ease + 0.01 * noise < 0.5 + 0.002 * (name == "b"), find("ridge"), s, **on))
            errors = [
                score_of("error", noise + ahead, Errors(), s, train=None, test="test", unit="px", better="lower"),
                figure("chance", 0.1, 500, Errors(), s, train=None, test="test", unit="%"),
            ]
            store.add(*errors, figure("rankme", 9.0, 500, find("label-free"), s, train=None, test="test"))
        made.append(run)
    return made


def test_what_was_measured_twice_is_read_once_and_the_newest_holds(runs):
    store = ResultsStore(runs[0] / "results.sqlite")
    (old,) = [s for s in store.rows() if s.protocol == "knn" and s.weights_digest == "a-20"]
    store.add(replace(old, value=0.75, protocol="dino-knn"))  # another name for the same numbers
    knn, ridge, free, errors = read([runs[0], runs[0] / "results.sqlite", str(runs[1])])
    assert [g.protocol for g in (knn, ridge, free, errors)] == ["knn", "ridge", "label-free", "errors"]
    found = [(Path(r.run).name, r.step) for r in knn.metrics["top1"]]
    assert found == [(PIXELS, None), ("a", 10), ("a", 20), ("b", 10), ("b", 20)]
    assert knn.metrics["top1"][2].score.value == 0.75
    assert (errors.headline, list(errors.metrics)) == ("error", ["error", "chance"])
    assert knn.runs == [str(run.resolve()) for run in runs]


def test_other_corpora_and_other_numbers_are_other_groups(runs):
    store = ResultsStore(runs[0] / "results.sqlite")
    old = store.rows()[0]
    store.add(replace(old, test_corpus="another"), replace(old, protocol_digest="k=5"))
    assert len([g for g in read(runs) if g.protocol == "knn"]) == 3


def test_a_run_that_was_moved_keeps_its_scores_and_a_strangers_are_his(runs, tmp_path):
    moved = runs[0].rename(tmp_path / "moved")
    ResultsStore(moved / "results.sqlite").add(
        score_of("top1", np.ones(500, bool), find("knn"), subject(runs[1], 99), train="train", test="test")
    )
    names = {r.run: r.step for r in read([moved])[0].metrics["top1"] if r.run != PIXELS}
    assert names == {str(moved.resolve()): 20, str(runs[1].resolve()): 99}


def test_names_are_as_short_as_they_can_be():
    assert short_names(["/x/one/dino-0", "/x/two/dino-0"]) == {
        "/x/one/dino-0": "one/dino-0",
        "/x/two/dino-0": "two/dino-0",
    }
    assert short_names(["/x/dino-0"]) == {"/x/dino-0": "dino-0"}


def test_holm():
    # By hand: 4 · 0.005, 3 · 0.01, 2 · 0.03, and 0.04 not below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_comparison_claims_no_more_than_its_test(runs):
    knn, ridge, free, errors = compare(read(runs))
    assert {c.base.step for c in (knn, ridge, free, errors)} == {20}
    a, b = (ResultsStore(run / "results.sqlite").rows(protocol="knn")[-1] for run in runs)
    assert knn.p == mcnemar(a.items, b.items)
    assert knn.adjusted == pytest.approx(3 * knn.p)  # three tests, this the smallest p
    assert knn.difference == pytest.approx(b.value - a.value)
    assert (knn.verdict, ridge.verdict, free.verdict) == ("b is better", "no difference shown", "not tested")
    assert (errors.metric, errors.verdict) == ("error", "a is better")  # lower is better
    assert {c.metric for c in compare(read(runs), every_metric=True)} == {"top1", "rankme", "error", "chance"}


def test_the_same_weights_are_not_tested(runs):
    store = ResultsStore(runs[1] / "results.sqlite")
    (same,) = [s for s in ResultsStore(runs[0] / "results.sqlite").rows(protocol="knn") if s.weights_digest == "a-20"]
    store.add(replace(same, weights=f"{runs[1]}/exports/step_00000030", details={"weights": {"step": 30}}))
    knn, *others = compare(read(runs))
    assert (knn.verdict, knn.p) == ("the same weights", None)
    assert [c.p is None for c in others] == [False, True, False]


def test_mistakes_are_one_sentence(runs, tmp_path):
    with pytest.raises(UserError, match="one run only"):
        compare(read(runs[:1]))
    other = run_of(tmp_path, "c")
    with pytest.raises(UserError, match="no scores yet"):
        read([other])
    ResultsStore(other / "results.sqlite").add(
        score_of("top1", np.ones(5, bool), find("knn"), subject(other, 1), train="t", test="u")
    )
    with pytest.raises(UserError, match="nothing was measured on two of a, c alike"):
        compare(read([runs[0], other]))
    with pytest.raises(UserError, match="no run"):
        read([tmp_path])
    with pytest.raises(UserError, match="there is no"):
        read([tmp_path / "nowhere"])
    (tmp_path / "text").write_text("x" * 200)
    with pytest.raises(UserError, match="cannot be used as a results store"):
        read([tmp_path / "text"])
