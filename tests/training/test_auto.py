"""Keys that say auto: values between the published ones, never backwards with the size, settled once for a run."""

import pytest

from selfsight import objectives
from selfsight.errors import UserError
from selfsight.objectives.base import Scale
from selfsight.recipe import AUTO, AUTOMATIC
from selfsight.training import auto, resolve


def settled(images, *overrides, ranks=1, memory=None):
    recipe = resolve.load("dino/auto", overrides)
    auto.settle(recipe, images=images, ranks=ranks, memory=memory)
    return recipe


def test_values_grow_with_the_corpus_from_small_runs_to_the_published_ones():
    runs = [settled(n) for n in (40, 300, 2000, 10_000, 50_000, 200_000, 1_281_167, 10**8)]
    for key in ("out_dim", "warmup_teacher_temp", "teacher_temp", "momentum_teacher"):
        values = [run.objective[key] for run in runs]
        assert values == sorted(values), key
    assert [run.batch_size for run in runs] == [4, 32, 128, 256, 256, 256, 256, 256]
    small, imagenet = runs[0], runs[6]
    assert small.objective["out_dim"] == 1024
    published = {"out_dim": 65536, "warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "momentum_teacher": 0.996}
    assert {k: imagenet.objective[k] for k in published} == published
    assert all(0 <= run.objective["freeze_last_layer"] <= run.epochs / 10 for run in runs)
    assert imagenet.provenance["objective.out_dim"].startswith("auto: a power of two near a sixteenth of 1,281,167")


def test_a_warm_up_is_never_longer_than_a_tenth_of_the_run():
    assert settled(1000, "epochs=5").optimizer.warmup_epochs == 0.5
    assert settled(1000, "epochs=800").optimizer.warmup_epochs == 10


def test_the_batch_and_the_stage_are_what_fits_into_a_gpu():
    small = ("encoder.args={embed_dim: 96, depth: 1, num_heads: 3}", "objective.local_crops_number=0")
    little, much = (settled(10**6, *small, memory=gib * 2**30) for gib in (0.6, 80))
    assert little.batch_size < much.batch_size == 256
    assert little.provenance["batch_size"] == f"auto: {little.batch_size} images at a time fit into 1 GiB of GPU memory"
    assert settled(10**6, ranks=4).training.zero == 1
    assert settled(10**6).training.zero == 0
    assert settled(10**6, *small, ranks=4, memory=80 * 2**30).training.zero == 0
    assert settled(10**6, "training.offload=true").training.zero == 1
    assert settled(10**6, "batch_size=auto", ranks=3).batch_size == 768  # of equal parts


def test_every_objective_names_keys_of_its_own():
    for name in objectives.available():
        kind = objectives.find(name)
        rules = kind.auto(Scale(50_000, 195, 19_500))
        config = kind.Config(**{key: value for key, (value, _) in rules.items()})
        assert all(reason for _, reason in rules.values())
        assert config


@pytest.mark.parametrize(
    ("override", "sentence"), [("seed=auto", "seed cannot"), ("objective.flip=auto", "objective.flip cannot")]
)
def test_a_key_without_a_rule(override, sentence):
    with pytest.raises(UserError, match=f'{sentence} be "auto"'):
        resolve.check(resolve.load("dino/auto", [override]))


def test_keys_whose_default_is_auto_may_say_it():
    """A null, as older run folders have it, reads as the same; a folder may be called auto."""
    plain = resolve.load("quickstart/dino")
    for word in (AUTO, "null"):
        assert resolve.load("quickstart/dino", [f"{key}={word}" for key in AUTOMATIC]).autos == list(AUTOMATIC)
    resolve.settle(plain, chunks=12, images=384)
    assert plain.autos == ["probe.every"]  # which training measures
    assert {key for key, _, _ in plain.chosen()} >= {"stream.lanes", "stream.workers", "encoder.compile"}
    assert resolve.load("quickstart/dino", ["corpus=auto", "output=auto"]).corpus == AUTO


def test_without_a_corpus_there_is_nothing_to_follow_from():
    with pytest.raises(UserError, match="add corpus=DIR"):
        resolve.settle(resolve.load("dino/auto"))


def test_what_was_settled_stays(corpora, selfsight, tmp_path, capsys):
    small = ["encoder.img_size=32", "encoder.args={patch_size: 8, embed_dim: 48, depth: 1, num_heads: 3}"]
    small += ["objective.global_crops_size=32", "objective.local_crops_size=16", "objective.hidden_dim=32"]
    run = [
        "pretrain",
        "dino/auto",
        f"corpus={corpora['one']}",
        f"output={tmp_path / 'run'}",
        "stream.workers=0",
        *small,
    ]
    assert selfsight([*run, "epochs=0.25"]) == 0
    begun = resolve.load(str(tmp_path / "run/recipe.yaml"))
    assert not begun.asked
    assert begun.batch_size == 4
    assert selfsight([*run, "epochs=0.25", "batch_size=auto"]) == 0  # adopts, and finds it finished
    assert selfsight([*run, "epochs=0.25", "batch_size=8"]) == 2
    assert "batch_size was 4 and is 8" in capsys.readouterr().err
