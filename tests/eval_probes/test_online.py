"""Probes in training: the images they take, how ranks share them, and numbers that a plain computation gives too."""

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier

from eval_probes.labelfree import alpha_req, lidar
from eval_probes.online import LIDAR_VIEWS, OnlineProbes, open_probes
from selfsight import encoders
from selfsight.corpus import build
from selfsight.encoders import rankme
from selfsight.errors import UserError
from selfsight.recipe import EncoderConfig, ProbeConfig, Recipe
from selfsight.shards.corpus import Corpus
from selfsight.shards.decode import decode_image
from selfsight.training.cluster import Cluster

ALONE = Cluster(0, 0, 1, torch.device("cpu"))
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Images of three colours, in folders by colour and in one folder."""
    base, rng = tmp_path_factory.mktemp("online"), np.random.default_rng(0)
    for i in range(63):
        pixels = np.clip(np.array(COLOURS[i % 3]) + rng.normal(0, 60, (20, 20, 3)), 0, 255).astype(np.uint8)
        for path in (base / "by-colour" / f"colour{i % 3}" / f"{i}.png", base / "plain" / f"{i}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    for name in ("by-colour", "plain"):
        build([base / name], base / f"{name}-corpus", workers=1)
    return {name: Corpus.open(base / f"{name}-corpus") for name in ("by-colour", "plain")}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    args = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    return encoders.build(EncoderConfig("vit_tiny_patch16_224", 16, args=args)).eval()


@torch.no_grad()
def test_the_numbers_are_those_of_features_taken_by_hand(corpora, encoder):
    corpus = corpora["by-colour"]
    probes = OnlineProbes(corpus, 16, images=60)
    found = probes(encoder, ALONE)
    again = probes(encoder, ALONE)
    assert found == again

    def features(pixels):
        return encoder(probes.transform.normalise(pixels)).cls

    pictures = [decode_image(corpus.sample(int(o)).data) for o in probes.chosen]
    X = features(torch.from_numpy(np.stack([probes.transform.pixels(p) for p in pictures])))
    y = corpus.labels()[probes.chosen]
    assert len(set(probes.chosen.tolist())) == 60
    assert np.bincount(y[::2]).tolist() == pytest.approx(np.bincount(y[1::2]).tolist(), abs=1)
    views = torch.cat([probes._views(p, int(o)) for p, o in zip(pictures, probes.chosen, strict=True)])
    assert len(torch.unique(views, dim=0)) == len(views)
    assert len(set(y[OnlineProbes(corpus, 16, images=60).viewed])) == 3
    views = rearrange(features(views), "(n q) d -> n q d", q=LIDAR_VIEWS)
    assert found["probe/rankme"] == pytest.approx(float(rankme(X)), rel=1e-4)
    assert found["probe/alpha_req"] == pytest.approx(alpha_req(X), rel=1e-4)
    assert found["probe/lidar"] == pytest.approx(lidar(views), rel=1e-4)

    # Other opinions: unweighted neighbours and another penalty tell these colours apart as well.
    bank, queries = X[::2].numpy(), X[1::2].numpy()
    assert found["probe/n"] == len(queries) == 30
    neighbours = KNeighborsClassifier(20, metric="cosine").fit(bank, y[::2]).score(queries, y[1::2])
    ridge = RidgeClassifier(0.1).fit(bank, y[::2]).score(queries, y[1::2])
    assert found["probe/knn"] == pytest.approx(neighbours, abs=0.1)
    assert found["probe/ridge"] == pytest.approx(ridge, abs=0.1)
    assert found["probe/ridge"] > 0.8
    assert found["probe/knn_low"] < found["probe/knn"] <= found["probe/knn_high"]


def test_without_labels_the_label_free_figures_are_left(corpora, encoder):
    with torch.no_grad():
        found = OnlineProbes(corpora["plain"], 16, images=40)(encoder, ALONE)
    assert set(found) == {"probe/rankme", "probe/alpha_req", "probe/lidar"}


@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_take_turns_and_equally_many(corpora, ranks, monkeypatch):
    probes = OnlineProbes(corpora["plain"], 16, images=33)
    clusters = [Cluster(rank, 0, ranks, torch.device("cpu")) for rank in range(ranks)]
    shares = [probes._share(33, cluster) for cluster in clusters]
    assert {len(share) for share in shares} == {-(-33 // ranks)}
    joined = torch.from_numpy(np.concatenate(shares))[:, None]
    monkeypatch.setattr(Cluster, "gather_rows", lambda self, x: joined)
    assert probes._gather(joined, 33, clusters[0])[:, 0].tolist() == list(range(33))


def test_features_that_are_not_finite_give_no_numbers(corpora):
    probes = OnlineProbes(corpora["by-colour"], 16, images=12)
    assert probes.measure(torch.full((12, 4), torch.nan), torch.zeros(4, 2, 4)) == {}


def test_what_a_recipe_asks_for(corpora):
    recipe = Recipe(encoder=EncoderConfig(img_size=16), probe=ProbeConfig())
    assert open_probes(recipe) is None
    recipe.probe.corpus = str(corpora["plain"].path)
    probes = open_probes(recipe)
    assert probes is not None
    assert len(probes.chosen) == 63
    recipe.probe.images = 4
    with pytest.raises(UserError, match=r"probe\.images is 4"):
        open_probes(recipe)
    recipe.probe = ProbeConfig(corpus="/nowhere")
    with pytest.raises(UserError, match="is no corpus"):
        open_probes(recipe)
