"""The comparison after equal compute: what equal means, worked by hand, and one whole run that finds its work done."""

import json
import sys

import pytest

from benchmarks import objectives as benchmark
from selfsight import objectives
from selfsight.corpus import procedural
from selfsight.training import resolve


def test_all_objectives_have_the_same_encoder_batch_and_optimiser(tmp_path):
    recipes = [benchmark.adapted(name, tmp_path, tmp_path, epochs=0.5) for name in objectives.available()]
    for recipe in recipes:
        resolve.check(recipe)
    shared = [(recipe.encoder, recipe.batch_size, recipe.epochs, recipe.optimizer) for recipe in recipes]
    assert all(one == shared[0] for one in shared)


def test_a_steps_flops_are_those_of_its_products(tmp_path):
    """SimCLR's, two per multiplication and addition: forward once, and backward twice but for the pixels."""
    recipe = benchmark.adapted("simclr", tmp_path, tmp_path, epochs=1.0)
    args, rows = recipe.encoder.args, 2 * recipe.batch_size  # crops of a step
    d, tokens, hidden, out = args["embed_dim"], 17, recipe.objective["hidden_dim"], recipe.objective["out_dim"]
    patches = 16 * 3 * args["patch_size"] ** 2 * d
    others = args["depth"] - 1  # blocks before the last, of which only the class token is wanted:
    blocks = others * tokens * 12 * d * d + tokens * 3 * d * d + 9 * d * d  # all have queries, keys and values
    attention = (others * tokens + 1) * tokens * 2 * d
    head = d * hidden + hidden * out
    linear = 2 * patches + 3 * blocks + 3 * head
    # The loss compares all crops with all, and attention's backward pass multiplies its scores out once more.
    rest = 3 * rows * out + 3.5 * attention
    assert benchmark.step_flops(recipe) == pytest.approx(2 * rows * (linear + rest), rel=1e-3)


def test_a_second_run_finds_everything_done(tmp_path, monkeypatch, capsys):
    made = procedural.make(tmp_path / "images", n_train=128, n_test=32, seed=0, workers=1)
    given = ["--train", str(made / "train"), "--test", str(made / "test"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["objectives.py", "--quick", "--json", "--only", "simclr", *given])
    benchmark.main()
    first = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in first["rows"]] == ["raw pixels", "untrained encoder", "simclr"]
    assert all(0 <= row["from"] <= row["value"] <= row["to"] <= 100 for row in first["rows"])

    monkeypatch.setattr(benchmark.Bench, "features", None)  # no image is looked at again,
    monkeypatch.setattr("selfsight.training.loop.Loop.__init__", None)  # and no step taken
    benchmark.main()
    assert json.loads(capsys.readouterr().out)["rows"] == first["rows"]
