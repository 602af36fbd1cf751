"""Steps that cannot be taken: which images they were, the return to a checkpoint, and the way past them."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from selfsight.shards import Corpus
from selfsight.stream.mixture import Mixture, Part
from selfsight.training import loop, monitor
from selfsight.training.engine import Engine
from selfsight.training.interrupts import Interrupts
from selfsight.weights.run import checkpoints

# An objective of one's own, whose loss is NaN for some images, or so many times what it would be.
POISONED = """
from dataclasses import dataclass, field
import torch
from selfsight.objectives.mae import MAE, MAEConfig

@dataclass
class PoisonedConfig(MAEConfig):
    poison: list[int] = field(default_factory=list)
    factor: float = 0.0  # 0 is a NaN

class Poisoned(MAE):
    Config = PoisonedConfig

    def forward(self, batch, progress):
        outcome = super().forward(batch, progress)
        if set(self.config.poison) & set(batch["ordinal"].tolist()):
            return outcome._replace(loss=outcome.loss * (self.config.factor or torch.nan))
        return outcome
"""
STEPS, BATCH = 9, 4  # of the 12 batches of an epoch


@pytest.fixture
def poisoned(recipe, corpora, tmp_path, monkeypatch):
    """Arguments for a run of 9 steps in which the images of these batches (from 1) are poisoned, checkpoints after
    every third step and two refused steps being enough."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "poisoned.py").write_text(POISONED)
    monkeypatch.syspath_prepend(tmp_path)
    plain = yaml.safe_load(recipe.read_text())
    plain |= {"batch_size": BATCH, "epochs": STEPS / 12}
    plain["encoder"]["drop_path_rate"] = 0.0  # which images lose a block depends on how the batch is split
    plain["objective"] = {"name": "mine.poisoned", "crop_size": 32, "decoder_embed_dim": 32, "decoder_depth": 1}
    plain["optimizer"] = {"warmup_epochs": 0.25, "clip": 1.0}
    plain["stream"] |= {"lanes": 2}
    plain["training"] |= {"patience": 2}
    recipe.write_text(yaml.safe_dump(plain))
    mixture = Mixture([Part(Corpus.open(corpora["one"]))], batch_size=BATCH, lanes=2, window=2, seed=0)

    def images(batches):
        return sorted(o for b in batches for o in mixture.step(b - 1).ordinal.tolist())

    def arguments(name, batches, *overrides):
        return [
            *("pretrain", str(recipe), f"corpus={corpora['one']}", f"output={tmp_path / name}"),
            *(f"objective.poison={images(batches)}", *overrides),
        ]

    arguments.images = images
    return arguments


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    timings = ("images_per_second", "data_wait", "peak_memory")
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timings} for line in found]


def killed(monkeypatch, selfsight, arguments, at: int) -> None:
    """Runs until step number `at` begins, and leaves what a kill would leave."""
    before, calls = Engine.step, iter(range(1, 10**6))

    def step(self, *args, **kwargs):
        if next(calls) == at:
            raise KeyError("killed")
        return before(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", step)
        with pytest.raises(KeyError, match="killed"):
            selfsight(arguments)


def test_a_poisoned_stretch_is_passed_over_and_kills_in_between_change_nothing(
    poisoned, selfsight, read, tmp_path, capsys, monkeypatch
):
    assert selfsight(poisoned("whole", [5, 6])) == 0
    said = capsys.readouterr().err
    assert "ALARM step 5: the loss is nan; the step was not taken; refused.jsonl names its images" in said
    news = (
        "step 6: 2 steps in a row were not finite; training returns to step 3 and goes on past the batches 4 to 6 of "
        "the stream"
    )
    assert f"ALARM {news}" in said
    assert list(checkpoints(tmp_path / "whole")) == [6, 9]
    log = lines(tmp_path / "whole")
    assert [line["step"] for line in log if "loss" in line] == list(range(1, STEPS + 1))
    assert [(line["step"], line["event"]) for line in log if "event" in line] == [(4, news)]
    # 12 of 48 passed over, though no one trained on them: the books say so.
    assert [line["note"] for line in log if "note" in line] == [
        "epoch 1 is over: 36 of its 48 images were delivered and 12 passed over"
    ]
    refused = lines(tmp_path / "whole", "refused.jsonl")
    assert [(line["step"], line["batch"], line["rank"], line["loss"]) for line in refused] == [
        (5, 5, 0, None),
        (6, 6, 0, None),
    ]
    named = sorted(int(image.split(" in ")[0]) for line in refused for image in line["images"])
    assert named == poisoned.images([5, 6])

    _, weights = read(tmp_path / "whole")
    for at in (
        5,
        8,
        11,
    ):  # asked to stop while a step is refused; killed on the way back, and after the next checkpoint
        run = tmp_path / f"broken{at}"
        if at == 5:
            with monkeypatch.context() as patch:
                asked = iter(range(1, 100))
                patch.setattr(Interrupts, "asked_to_stop", lambda self, asked=asked: next(asked) >= 5)
                assert selfsight(poisoned(run.name, [5, 6])) == 85
            assert "its loss is out of bounds, so no checkpoint is written" in capsys.readouterr().err
        else:
            killed(monkeypatch, selfsight, poisoned(run.name, [5, 6]), at)
        assert selfsight(poisoned(run.name, [5, 6])) == 0
        assert lines(run) == log, f"broken off at {at}"
        assert lines(run, "refused.jsonl") == refused, f"broken off at {at}"
        found = read(run)[1]
        assert all(torch.equal(found[name], w) for name, w in weights.items()), f"broken off at {at}"


def test_nothing_good_yet_returns_to_the_beginning_and_too_often_ends_the_run(poisoned, selfsight, tmp_path, capsys):
    assert selfsight(poisoned("early", [1, 2], "training.zero=0")) == 0
    assert "returns to step 0 and goes on past the batches 1 to 2 of the stream" in capsys.readouterr().err
    assert [line["step"] for line in lines(tmp_path / "early") if "loss" in line] == list(range(1, STEPS + 1))

    # Steps that are refused one at a time are borne; a checkpoint that falls due then is written after the next one.
    assert selfsight(poisoned("single", [3, 8], "training.keep=9")) == 0
    assert "training returns" not in capsys.readouterr().err
    assert list(checkpoints(tmp_path / "single")) == [0, 4, 6, 9]

    assert selfsight(poisoned("hopeless", range(4, 13), "training.returns=1")) == 1
    said = capsys.readouterr().err
    assert (
        "training ended at step 5: 2 steps in a row were not finite, after 1 returns to step 3; try a smaller" in said
    )
    assert selfsight(poisoned("hopeless", range(4, 13), "training.returns=1")) == 1  # from step 3, as before


def test_a_loss_that_leaves_its_band_is_returned_from_if_the_recipe_says_so(
    poisoned, selfsight, read, tmp_path, capsys, monkeypatch
):
    """As from steps that were refused, and with the same bits: what the steps did since is undone."""
    monkeypatch.setattr(monitor, "WINDOW", 4)
    for module in (monitor, loop):
        monkeypatch.setattr(module, "PATIENCE", 2)
    high = [*poisoned("high", [7, 8]), "objective.factor=100"]
    assert selfsight([*high, "training.return_on_spike=true"]) == 0
    news = (
        "step 8: the loss stays far above what it was; training returns to step 6 and goes on past the batches 7 to 8 "
        "of the stream"
    )
    assert f"ALARM {news}" in capsys.readouterr().err
    assert (7, news) in [(line["step"], line.get("event")) for line in lines(tmp_path / "high")]
    assert list(checkpoints(tmp_path / "high")) == [6, 9]
    assert not (tmp_path / "high" / "refused.jsonl").exists()
    assert selfsight(poisoned("nan", [7, 8])) == 0
    (records, weights), (records_nan, weights_nan) = read(tmp_path / "high"), read(tmp_path / "nan")
    assert records == records_nan
    assert all(torch.equal(weights_nan[name], w) for name, w in weights.items())


TWO = """
import json, sys
from selfsight.training.engine import Engine
from launch.cli import main

whole, parts = json.loads(sys.argv[1])
assert main(whole) == 0
before, calls = Engine.step, iter(range(1, 10**6))

def step(self, *args, **kwargs):
    if next(calls) == 8:
        raise KeyError("killed")
    return before(self, *args, **kwargs)

Engine.step = step
try:
    main(parts)
    sys.exit("it should have been killed")
except KeyError:
    Engine.step = before
sys.exit(main(parts))
"""


def test_two_ranks_return_alike_and_probes_change_nothing(poisoned, corpora, selfsight, torchrun, read, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    probes = [f"probe.corpus={corpora['two']}", "probe.every=4", "probe.images=45"]
    launch = [poisoned("two", [5, 6]), poisoned("parts", [5, 6], *probes)]
    child = torchrun(2, [str(script), json.dumps(launch)])
    _, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    assert selfsight(poisoned("one", [5, 6], *probes)) == 0
    two, parts = read(tmp_path / "two"), read(tmp_path / "parts")
    assert two[0] == parts[0]
    assert all(torch.equal(parts[1][name], w) for name, w in two[1].items())
    (records, weights), (records_one, weights_one) = two, read(tmp_path / "one")
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in records_one], rel=1e-5)
    for name, weight in weights_one.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-3 if "qkv.bias" in name else 1e-5)
    refused = lines(tmp_path / "two", "refused.jsonl")
    assert [(line["batch"], line["rank"]) for line in refused] == [(5, 0), (5, 1), (6, 0), (6, 1)]
    named = sorted(int(image.split(" in ")[0]) for line in refused for image in line["images"])
    assert named == poisoned.images([5, 6])
    found = [[line for line in lines(tmp_path / name) if "probe_share" in line] for name in ("parts", "one")]
    for shared, alone in zip(*found, strict=True):  # of 45 images one rank has 23, the other 22 and one again
        assert shared["step"] == alone["step"]
        for name in ("probe/rankme", "probe/lidar", "probe/alpha_req", "probe/knn", "probe/ridge", "probe/n"):
            assert shared[name] == pytest.approx(alone[name], rel=1e-3), name
    assert [line["step"] for line in found[0]] == [4, 8, 9]
