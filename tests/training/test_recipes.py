"""The recipes under configs/: each loads, names a whole run, and builds; and no key of any schema is dead."""

import ast
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from selfsight import objectives, recipe
from selfsight.errors import UserError
from selfsight.recipe import configs_dir
from selfsight.training import resolve

RECIPES = sorted(p.relative_to(configs_dir()).with_suffix("").as_posix() for p in configs_dir().rglob("*.yaml"))
ROOT = Path(recipe.__file__).parents[2]


def leaves(node: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in node.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_of_a_recipe_lands_where_it_says(name):
    loaded = resolve.load(name)
    resolve.check(loaded)
    given = leaves(yaml.safe_load((configs_dir() / f"{name}.yaml").read_text()))
    found = leaves(loaded.to_dict())
    assert {k: found.get(k) for k in given} == given
    assert loaded.objective_name in name.split("/")  # the folder's name, or in quickstart/ the file's
    key = next(iter(given))
    with pytest.raises(UserError, match="unknown recipe key"):
        resolve.load(name, [f"{key}_=1"])


@pytest.mark.parametrize("name", [n for n in RECIPES if "large" not in n])
def test_the_objective_of_a_recipe_can_be_built(name):
    """Its sizes fit together: crops, patches, heads. On the meta device, where weights take no room."""
    import torch

    loaded = resolve.load(name)
    kind = objectives.find(loaded.objective_name)
    config = kind.Config(**{k: v for k, v in loaded.objective.items() if k != "name"})
    with torch.device("meta"):
        spec = kind(config, loaded.encoder).views()
    assert spec.crops


@pytest.mark.parametrize("kind", ["vit_micro_patch8_cifar10", "vit_tiny_patch4_cifar10"])
def test_recipes_for_cifar10_are_made_to_be_compared(kind):
    """At the images' own size, on whatever corpus is named; those for two cores with one encoder, down to its seed."""
    named = [name for name in RECIPES if name.endswith(kind)]
    recipes = [resolve.load(name) for name in named]
    assert {recipe.encoder.img_size for recipe in recipes} == {32}
    assert {(recipe.corpus, recipe.seed) for recipe in recipes} == {(None, 0)}
    text = (ROOT / "docs/objectives.md").read_text(encoding="utf-8")
    if "micro" in kind:
        assert [recipe.objective_name for recipe in recipes] == ["dino", "mae", "simclr"]
        assert all(recipe.encoder == recipes[0].encoder for recipe in recipes)
        assert f"configs/{{dino,mae,simclr}}/{kind}.yaml" in text
    else:
        assert [recipe.objective_name for recipe in recipes] == objectives.available()
        assert f"configs/NAME/{kind}.yaml" in text


# Of the recipe's own values everything but sizes.
SMALL = (
    "batch_size=24",
    "epochs=1",
    "encoder.img_size=32",
    "encoder.args.depth=1",
    "encoder.args.embed_dim=48",
    "objective.crop_size=32",
    "optimizer.warmup_epochs=1",
    "stream.workers=0",
    "training.precision=fp32",
    "training.log_every=1",
)
LARGE_BATCH = {
    "byol/vit_small_patch16_imagenet_lars": ("objective.hidden_dim=32",),
    "mae/vit_base_patch16_imagenet_32k": ("objective.decoder_depth=1", "objective.decoder_embed_dim=32"),
}


@pytest.mark.parametrize("name", LARGE_BATCH)
def test_recipes_of_large_batches_take_their_first_steps(name, selfsight, corpora, read, tmp_path):
    run = tmp_path / "run"
    assert selfsight(["pretrain", name, f"corpus={corpora['one']}", f"output={run}", *SMALL, *LARGE_BATCH[name]]) == 0
    records, weights = read(run)
    assert len(records) == 2
    assert records[1]["lr"] > 0
    assert all(record["grad_norm"] > 0 for record in records)
    assert all(w.isfinite().all() for w in weights.values())


def schemas() -> list[type]:
    """The recipe's dataclasses and those of the objectives."""
    own = [c for c in vars(recipe).values() if isinstance(c, type) and is_dataclass(c)]
    return own + [objectives.find(name).Config for name in objectives.available()]


def read_attributes() -> set[str]:
    """Names read as an attribute anywhere in the packages, and strings, by which dynamic look-ups name a key."""
    found = set()
    for folder in ("ssl/selfsight", "launch", "eval_probes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    found.add(node.attr)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                    found.add(node.value)
    return found


def unread(schema: type, read: set[str]) -> list[str]:
    return [f"{schema.__name__}.{f.name}" for f in fields(schema) if f.name not in read]


def test_no_key_is_dead():
    read = read_attributes()
    assert not [key for schema in schemas() for key in unread(schema, read)]


def test_a_dead_key_would_be_found():
    from dataclasses import make_dataclass

    schema = make_dataclass("Config", [("zero", int), ("saveckp" + "_freq", int)])
    assert unread(schema, read_attributes()) == ["Config.saveckp_freq"]
