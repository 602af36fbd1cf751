"""kNN equals DINO's and DINOv2's evaluators on their numbers, and is sure of itself where they are not."""

import numpy as np
import pytest
import torch

from eval_probes import knn
from eval_probes.features import Features
from eval_probes.pooling import Pooling
from eval_probes.subject import Subject
from selfsight.errors import UserError


def features(X, y, corpus: str, classes: int = 3) -> Features:
    return Features(
        X=np.asarray(X, dtype=np.float32),
        y=None if y is None else np.asarray(y, dtype=np.int64),
        classes=None if y is None else [f"c{i}" for i in range(classes)],
        corpus=corpus,
        corpus_id=corpus,
        subject=Subject("w", "w" * 64, {}, {}, 1),
        pooling=Pooling(),
    )


@pytest.fixture(scope="module")
def numbers(golden):
    return golden.load("knn")


def golden_cases(numbers):
    for case in numbers.cases():
        hyper = numbers.hyper(case)
        for k in np.atleast_1d(hyper["ks"]).tolist():
            for temperature in np.atleast_1d(hyper["temperatures"]).tolist():
                yield case, int(k), float(temperature), hyper


def test_golden(numbers):
    seen = 0
    for case, k, temperature, hyper in golden_cases(numbers):
        given = numbers.inputs(case)
        protocol = knn.KNN(ks=tuple(sorted({k, int(hyper["max_k"])})), k=k, temperature=temperature)
        scores = knn.classify(
            given["train_features"], given["train_labels"], given["test_features"], hyper["num_classes"], protocol
        )[k]
        setting = f"k{k}_T{temperature}"
        prediction = scores.argmax(dim=1)
        top1 = (prediction == given["test_labels"]).double().mean().item()
        numbers.check(case, f"prediction.{setting}", prediction)
        numbers.check(case, f"dinov2_probas.{setting}", scores)
        numbers.check(case, f"dino_top1.{setting}", np.float64(100 * top1))
        numbers.check(case, f"dinov2_top1.{setting}", np.float64(top1))
        sure = numbers.outputs(case)[f"top5_sure.{setting}"]
        assert knn.top5_correct(scores, given["test_labels"]) == sure
        seen += 1
    assert seen >= 2


def test_golden_neighbours(numbers):
    for case in numbers.cases():
        given = numbers.inputs(case)
        bank, queries = (torch.nn.functional.normalize(given[k], dim=1) for k in ("train_features", "test_features"))
        expected = numbers.outputs(case)["neighbor_labels_maxk_first100"]
        _, index = knn.neighbours(bank, queries[:100], expected.shape[1])
        assert (given["train_labels"][index].numpy() == expected).all()


def test_equal_similarities_are_ranked_by_index():
    bank = torch.eye(4)[[0, 1, 1, 1, 2, 0]]
    similarity, index = knn.neighbours(bank, torch.eye(4)[[1, 0, 3]], 2)
    assert index.tolist() == [[1, 2], [0, 5], [0, 1]]
    assert similarity.tolist() == [[1, 1], [1, 1], [0, 0]]


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    bank, queries = torch.randn(300, 8), torch.randn(50, 8)
    whole = knn.neighbours(bank, queries, 20)
    monkeypatch.setattr(knn, "ELEMENTS", 7 * 300)
    parts = knn.neighbours(bank, queries, 20)
    assert torch.equal(whole[1], parts[1])
    torch.testing.assert_close(whole[0], parts[0])


def test_a_cold_temperature_does_not_overflow():
    protocol = knn.KNN(ks=(2,), k=2, temperature=0.001)
    scores = knn.classify(torch.eye(3), torch.tensor([0, 1, 2]), torch.eye(3), 3, protocol)[2]
    assert scores.isfinite().all()
    assert scores.argmax(dim=1).tolist() == [0, 1, 2]


def test_labels_as_features_give_all_and_noise_gives_chance():
    generator = np.random.default_rng(0)
    y, y_test = np.arange(300) % 3, np.arange(90) % 3
    score = knn.evaluate(features(np.eye(3)[y], y, "a"), features(np.eye(3)[y_test], y_test, "b"))
    assert (score.value, score.high, score.n) == (1.0, 1.0, 90)
    noise = knn.evaluate(
        features(generator.normal(size=(300, 16)), y, "a"), features(generator.normal(size=(90, 16)), y_test, "b")
    )
    assert noise.low <= 1 / 3 <= noise.high


def test_more_neighbours_than_images_is_all_of_them():
    y = np.array([0, 0, 1, 2])
    score = knn.evaluate(features(np.eye(4), y, "a"), features(np.eye(4)[:3], y[:3], "b"))
    assert score.value == 1.0
    assert score.details["top1"] == {"10": 1.0, "20": 1.0, "100": 1.0, "200": 1.0}
    assert "top5" not in score.details, "of three classes every one is among the best five"


def test_the_score_says_what_it_was_measured_on():
    y = np.arange(30) % 3
    score = knn.evaluate(features(np.eye(3)[y], y, "a"), features(np.eye(3)[y], y, "b"), knn.KNN(ks=(5,), k=5))
    assert (score.protocol, score.train_corpus, score.test_corpus, score.details["k"]) == ("knn", "a", "b", 5)
    assert score.protocol_digest == knn.KNN(ks=(5,), k=5).digest != knn.KNN().digest


def test_pairs_that_mean_nothing_are_refused():
    y = np.arange(6) % 3
    good = features(np.eye(3)[y], y, "a")
    with pytest.raises(UserError, match="no labels"):
        knn.evaluate(good, features(np.eye(3)[y], None, "b"))
    with pytest.raises(UserError, match=r"different classes \(c3 in only one\)"):
        knn.evaluate(good, features(np.eye(3)[y], y, "b", classes=4))
    with pytest.raises(UserError, match="same corpus"):
        knn.evaluate(good, good)


@pytest.mark.parametrize("wrong", [{"ks": (0,), "k": 0}, {"k": 0}, {"temperature": 0.0}, {"temperature": float("nan")}])
def test_protocols_without_sense_are_refused(wrong):
    with pytest.raises(UserError):
        knn.KNN(**wrong)


def test_the_search_agrees_with_faiss():
    faiss = pytest.importorskip("faiss", reason="faiss is an extra: selfsight[cpu] or selfsight[gpu]")
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.nn.functional.normalize(torch.randn(n, 48, generator=generator), dim=1) for n in (3000, 200))
    index = faiss.IndexFlatIP(48)
    index.add(bank.numpy())
    expected_similarity, expected = index.search(queries.numpy(), 20)
    similarity, found = knn.neighbours(bank, queries, 20)
    # Two float32 sums of 48 products each: places may be swapped where similarities differ by less than that.
    torch.testing.assert_close(similarity, torch.from_numpy(expected_similarity), rtol=0, atol=1e-6)
    assert (found.numpy() == expected).mean() > 0.999
