"""Protocols are named, hashed and changed by key; a name is found without loading the others."""

from dataclasses import fields
from importlib import import_module

import pytest

from eval_probes.protocol import MODULES, FeatureProtocol, find
from selfsight.errors import UserError


def test_every_name_is_where_it_is_said_to_be():
    presets = {module: import_module(module).PRESETS for module, _ in MODULES.values()}
    assert {name for found in presets.values() for name in found} == MODULES.keys()
    for name, (module, about) in MODULES.items():
        assert find(name) is presets[module][name]
        assert find(name).name == name
        assert about
        assert all(f.type for f in fields(find(name)))


def test_digests_are_those_of_the_numbers():
    assert find("knn").digest == find("dino-knn").digest, "a name decides nothing"
    digests = [find("knn").override([o]).digest for o in ("k=10", "temperature=0.1", "tokens=cls+avg", "resize=256")]
    assert len({*digests, find("knn").digest}) == 5
    assert find("knn").override(["k=20"]).digest == find("knn").digest
    # Scores of other releases are found by it: it may change only with the numbers or `version`.
    assert find("knn").digest.startswith("a8e0a3fcaec9")


def test_keys_are_taken_as_they_are_typed():
    linear = find("linear").override(["lrs=[1e-3,1]", "epochs=3", "held_out=0.2"])
    assert (linear.lrs, linear.epochs, linear.held_out) == ((0.001, 1.0), 3, 0.2)
    assert find("knn").override(["k=7"]).ks == (7, 10, 20, 100, 200)
    assert find("knn").override(["resize=256", "resize=null"]).resize is None
    assert isinstance(find("knn"), FeatureProtocol)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("knn", "kk=3", "did you mean k"),
        ("knn", "k=many", "should be like 20"),
        ("knn", "k=1.5", "should be like 20"),
        ("knn", "k=null", "should be like 20"),
        ("knn", "tokens=1", "should be like 'cls'"),
        ("knn", "k", "give k=VALUE"),
        ("knn", "name=other", "no key"),
        ("linear", "lrs=[a]", "should be like"),
    ],
)
def test_mistakes_are_one_sentence(name, override, message):
    with pytest.raises(UserError, match=message):
        find(name).override([override])
    with pytest.raises(UserError, match="did you mean knn"):
        find("kn")
