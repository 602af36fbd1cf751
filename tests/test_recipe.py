"""The recipe: strict keys, the nearest known name, and where every value came from."""

from dataclasses import dataclass

import pytest
import yaml

from selfsight import recipe
from selfsight.errors import UserError


@dataclass
class Config:
    out_dim: int = 3
    temperature: float = 0.1


TEXT = """
objective: {name: some, out_dim: 5}
optimizer: {base_lr: 1.0e-3}
encoder: {args: {patch_size: 4}}
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "r.yaml").write_text(TEXT)
    return str(tmp_path / "r.yaml")


def load(path, *overrides):
    return recipe.load(path, overrides, objective=lambda name: Config)


def test_file_and_overrides_land_in_the_schema(path):
    r = load(path, "seed=3", "corpus=a b", "encoder.args.depth=6", "optimizer.min_lr=1e-5", "objective.temperature=1")
    assert (r.seed, r.corpus, r.encoder.args) == (3, "a b", {"patch_size": 4, "depth": 6})
    assert (r.optimizer.base_lr, r.optimizer.min_lr) == (1e-3, 1e-5)
    assert r.objective == {"name": "some", "out_dim": 5, "temperature": 1.0}


@pytest.mark.parametrize("name", ["007", "1e3", "2024-01-01", "12:30", "off", "1_000", "a: b # c"])
def test_a_path_is_what_was_typed(path, name):
    r = load(path, f"corpus={name}", f"output={name}")
    assert (r.corpus, r.output) == (name, name)
    assert recipe.from_dict(yaml.safe_load(r.to_yaml()), {}, objective=lambda name: Config) == r
    assert load(path, "corpus=null").corpus is None


def test_what_is_written_reads_back_the_same(path):
    r = load(path, "corpus=it's: a # hard name", "encoder.args.reg_tokens=4")
    again = recipe.from_dict(yaml.safe_load(r.to_yaml()), {}, objective=lambda name: Config)
    assert again == r


def test_every_line_says_where_its_value_came_from(path):
    r = load(path, "seed=3")
    r.set("stream.lanes", 32, "divides 64")
    origin = dict(line.split("#", 1) for line in r.to_yaml().splitlines() if "#" in line)
    origin = {k.strip(): v.strip() for k, v in origin.items()}
    assert origin["seed: 3"] == "command line"
    assert origin["base_lr: 0.001"] == path
    assert origin["lanes: 32"] == "auto: divides 64"
    assert origin["epochs: 100.0"] == "default"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sed=1", "did you mean seed?"),
        ("optimizer.base_l=2", "did you mean optimizer.base_lr?"),
        ("objective.outdim=3", "did you mean objective.out_dim?"),
        ("batch_size=x", "batch_size"),
        ("objective.out_dim=q", "out_dim"),
        ("optimizer=3", "optimizer should be a mapping"),
        ("nonsense", "overrides look like"),
        ("seed=[1", "not YAML"),
        ("objective.name=null", "names no objective"),
    ],
)
def test_a_wrong_key_or_value_is_one_clear_sentence(path, override, sentence):
    with pytest.raises(UserError, match=r"^[^\n]+$") as e:
        load(path, override)
    assert sentence in str(e.value)


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(UserError, match="quickstart/dino"):
        load("no-such-recipe")


@pytest.mark.parametrize("content", [": :", "- a\n- b", "\xff\xfe"])
def test_a_file_that_is_no_recipe(tmp_path, content):
    (tmp_path / "r.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError):
        load(str(tmp_path / "r.yaml"))
