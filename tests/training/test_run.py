"""A run from the command line: what it leaves behind, how it stops and continues, what it says to mistakes."""

import json
import os
import random
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
import yaml
from safetensors import SafetensorError

from selfsight.shards.corpus import Corpus
from selfsight.shards.selection import write_selection
from selfsight.stream.order import auto_lanes
from selfsight.training import checkpoint, loop
from selfsight.training.interrupts import Interrupts
from selfsight.weights.run import checkpoints, exports

STEPS = 12  # 48 images in batches of 8, twice


def stop_after(monkeypatch, steps: int) -> None:
    """As if a signal came in during the step of that number."""
    asked = iter(range(1, 10**6))
    monkeypatch.setattr(Interrupts, "asked_to_stop", lambda self: next(asked) >= steps)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_leaves_checkpoints_exports_and_a_log(selfsight, command, read, tmp_path, capsys):
    assert selfsight(command()) == 0
    run = tmp_path / "run"
    assert capsys.readouterr().out.strip() == str(run)
    assert list(checkpoints(run)) == [9, 12]  # keep: 2
    assert list(exports(run)) == [0, 3, 6, 9, 12]
    assert not list((run / "checkpoints").glob(".*"))
    records, weights = read(run)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert {"epoch", "loss", "lr", "weight_decay", "momentum", "grad_norm", "feature_spread", "rankme"} <= set(
        records[0]
    )
    assert "teacher_entropy" in records[0]
    assert any(p.name.startswith("events") for p in (run / "tensorboard").iterdir())
    assert all(w.dtype == torch.float32 for w in weights.values())
    state = json.loads((run / "checkpoints/step_00000012/state.json").read_text())
    assert (state["step"], state["batch_size"], state["world_size"]) == (12, 8, 1)

    # The same command again finds it finished; the corpus may have moved and the log may be kept differently.
    before = (run / "metrics.jsonl").read_bytes()
    assert selfsight(command("run", "training.log_every=2", "training.keep=5")) == 0
    assert "is finished" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before

    # What would make it another run is refused, by name.
    assert selfsight(command("run", "epochs=3", "optimizer.clip=1.0")) == 2
    said = capsys.readouterr().err
    assert "epochs was 2.0 and is 3.0" in said
    assert "optimizer.clip was 0.3 and is 1.0" in said
    assert selfsight(command(corpus="two")) == 2
    assert "is from another corpus" in capsys.readouterr().err


@pytest.mark.parametrize(("zero", "accumulation"), [(0, 2), (1, 1), (3, 2)])
def test_stopping_and_continuing_is_as_never_having_stopped(
    selfsight, command, read, tmp_path, capsys, monkeypatch, zero, accumulation
):
    options = [f"training.zero={zero}", f"training.accumulation={accumulation}"]
    assert selfsight(command("whole", *options)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert selfsight(command("parts", *options)) == 85
        assert "stopped at step 5 of 12" in capsys.readouterr().err
    assert selfsight(command("parts", *options)) == 0
    (records, weights), (records_parts, weights_parts) = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert records == records_parts
    assert same(weights, weights_parts)


def test_mae_with_decoding_processes_continues_as_exactly(selfsight, command, recipe, read, tmp_path, monkeypatch):
    plain = yaml.safe_load(recipe.read_text())
    plain["objective"] = {"name": "mae", "crop_size": 32, "decoder_embed_dim": 32, "decoder_depth": 1}
    plain["optimizer"] = {"warmup_epochs": 1, "schedule": "mae_cosine", "clip": 1.0}
    recipe.write_text(yaml.safe_dump(plain))
    assert selfsight(command("whole")) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        assert selfsight(command("parts", "stream.workers=2")) == 85
    assert selfsight(command("parts", "stream.workers=1")) == 0
    (records, weights), (records_parts, weights_parts) = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert records == records_parts
    assert same(weights, weights_parts)


def test_kill_minus_nine_at_a_random_step_changes_nothing(selfsight, command, spawn, read, tmp_path):
    run, at = tmp_path / "killed", random.randint(1, STEPS - 1)
    child = spawn(command("killed"))
    log = run / "metrics.jsonl"
    while child.poll() is None and not (log.exists() and log.read_text().count("\n") >= at):
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    with log.open("a") as file:
        file.write('{"step": 11, "lo')  # as a kill in the middle of a write leaves it
    shutil.copytree(run / "exports/step_00000000", run / "checkpoints/.step_00000099")  # and of a checkpoint
    assert selfsight(command("killed")) == 0
    assert selfsight(command("whole")) == 0
    (records, weights), (records_killed, weights_killed) = read(tmp_path / "whole"), read(run)
    assert records == records_killed, f"killed at step {at}"
    assert same(weights, weights_killed), f"killed at step {at}"
    assert not list((run / "checkpoints").glob(".*"))


def test_a_signal_ends_the_run_with_a_checkpoint(command, spawn, tmp_path):
    child = spawn(command("run", "epochs=400", "optimizer.warmup_epochs=10"))
    log = tmp_path / "run/metrics.jsonl"
    while child.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    child.send_signal(signal.SIGUSR1)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 85, err
    assert "on SIGUSR1; a checkpoint is written" in err
    assert "Traceback" not in err
    assert not out
    newest = max(checkpoints(tmp_path / "run"))
    assert json.loads(log.read_text().splitlines()[-1])["step"] == newest


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["corpus=/nowhere"], "is no corpus"),
        (["corpus=null"], "needs a corpus and an output"),
        (["batch_size=49"], "fewer images (48) than a batch (49)"),
        (["batch_size=0"], "batch_size is 0"),
        (["training.accumulation=3"], "batch_size 8 is no multiple of"),
        (["training.zero=4"], "choose 0, 1, 2 or 3"),
        (["training.zero=0", "training.offload=true"], "set training.zero to 1, 2 or 3"),
        (["training.zero=3", "encoder.compile=true"], "set training.zero=2"),
        (["training.precision=fp16"], "choose bf16, which has fp32's range"),
        (["training.precision=half"], "choose fp32, bf16 or auto"),
        (["optimizer.warmup_epochs=3"], "longer than the run"),
        (["optimizer.schedule=cubic"], "choose dino_cosine, mae_cosine"),
        (["epochs=0"], "give a positive number"),
        (["epochs=.inf"], "give a positive number"),
        (["stream.workers=-1"], "stream.workers is -1: give 0 or more"),
        (["training.keep_best=max probe/knn"], "add probe.corpus=DIR"),
        (["weights_sha256=0123"], "add weights=DIR"),
        (["stream.decode=gpu"], "stream.decode is 'gpu': choose cpu or device"),
        (["stream.decode=device", "stream.crops=cpu"], "set stream.crops=device"),
        (["seed=123456789012345678901234567890"], "seed is 123456789012345678901234567890"),
        (["optimizer.base_lr=.nan"], "optimizer.base_lr is nan"),
        (["optimizer.min_lr=-1"], "optimizer.min_lr is -1"),
        (["optimizer.betas=[0.9, 1.5]"], "optimizer.betas is [0.9, 1.5]"),
        (["encoder.drop_path_rate=2"], "encoder.drop_path_rate is 2"),
        (["encoder.args={patch_size: 0}"], "encoder.args.patch_size is 0"),
        (["objective.out_dim=0"], "objective.out_dim is 0"),
        (["objective.local_crops_number=-1"], "objective.local_crops_number is -1"),
        (["objective.global_crops_size=0"], "size of the global crops is 0"),
        (["objective.global_crops_scale=[0.5, 2]"], "scale of the global crops is [0.5, 2.0]"),
        (["objective.flip=2"], "flip of the global crops is 2"),
        (["objective.momentum_teacher=2"], "objective.momentum_teacher is 2"),
        (["objective.name=.dino"], "cannot be imported"),
        (["optimizer.learning_rate=1"], "unknown recipe key optimizer.learning_rate"),
        (["encoder.name=resnet50"], "resnet50"),
        (["objective.name=dinosaur"], "no objective is called 'dinosaur'"),
    ],
)
def test_mistakes_end_in_one_line(selfsight, command, capsys, overrides, said):
    assert selfsight(command("run", *overrides)) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_an_output_that_is_something_else_is_left_alone(selfsight, command, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    assert selfsight(command()) == 2
    assert "exists and is no run" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_an_unwritable_output_ends_in_one_line(selfsight, command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert selfsight(command("file/run")) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_keeps_the_checkpoints_that_were_there(
    selfsight, command, tmp_path, capsys, monkeypatch, read, error
):
    def full(tensors, path, metadata):
        if "step_00000006" in str(path):
            raise error
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        save_file = checkpoint.save_file
        patch.setattr(checkpoint, "save_file", full)
        assert selfsight(command()) == 2
    assert re.search(r"could not be written \(.*\): make room", capsys.readouterr().err)
    assert list(checkpoints(tmp_path / "run")) == [0, 3]
    assert selfsight(command()) == 0  # room was made
    assert [r["step"] for r in read(tmp_path / "run")[0]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("change", "said"), [({"encoder": {"name": "vit_huge"}}, "another encoder"), ({"schema": 99}, "newer selfsight")]
)
def test_a_checkpoint_of_something_else_is_refused(selfsight, command, tmp_path, capsys, monkeypatch, change, said):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert selfsight(command()) == 85
    state = tmp_path / "run/checkpoints/step_00000001/state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | change))
    capsys.readouterr()
    assert selfsight(command()) == 2
    assert said in capsys.readouterr().err


def test_a_loss_that_is_not_finite_moves_nothing_and_ends_the_run_after_a_while(
    selfsight, command, tmp_path, capsys, monkeypatch
):
    to_device = loop.to_device

    def poisoned(batch, device, spec):
        batch = to_device(batch, device, spec)
        if next(step) > 2:
            batch["global"][:] = float("nan")
        return batch

    step = iter(range(1, 10**6))
    monkeypatch.setattr(loop, "to_device", poisoned)
    assert selfsight(command("run", "training.returns=0")) == 1
    said = capsys.readouterr().err
    assert "ALARM step 3: the loss is nan; the step was not taken" in said
    assert "training ended at step 12: 10 steps in a row were not finite" in said
    events = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if "event" in e] == list(range(3, 13))
    assert list(checkpoints(tmp_path / "run")) == [0]  # none is written while steps are refused


def test_a_checkpoint_with_files_missing_or_changed_is_not_continued_from(
    selfsight, command, tmp_path, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert selfsight(command()) == 85
    path = tmp_path / "run/checkpoints/step_00000001"

    def change(content: bytes) -> bytes:
        return content[:-100] + bytes(b ^ 1 for b in content[-100:])

    for name in ("optimizer/00000.safetensors", "objective.safetensors"):
        file = path / name
        whole = file.read_bytes()
        for damaged in (None, whole[: len(whole) // 2], change(whole)):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            capsys.readouterr()
            assert selfsight(command()) == 2
            said = capsys.readouterr().err
            assert f"is damaged ({name}" in said
            assert "remove it to continue from the one before" in said
            file.write_bytes(whole)
    assert selfsight(command()) == 0


def test_a_kill_before_the_last_export_is_made_good(selfsight, command, tmp_path):
    assert selfsight(command()) == 0
    last = tmp_path / "run/exports/step_00000012"
    before = {p.name: p.read_bytes() for p in last.iterdir()}
    shutil.rmtree(last)
    assert selfsight(command()) == 0
    after = {p.name: p.read_bytes() for p in last.iterdir()}
    assert after == before

    # Its checkpoint is removed, as a damaged one would be: what it had been exported to is not that of the new one.
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000012")
    (last / "model.safetensors").write_bytes(b"of other weights")
    assert selfsight(command()) == 0
    assert {p.name: p.read_bytes() for p in last.iterdir()} == before


def test_weights_are_as_readable_as_the_umask_says(selfsight, command, tmp_path):
    before = os.umask(0o027)
    try:
        assert selfsight(command("run", "epochs=0.5", "optimizer.warmup_epochs=0")) == 0
    finally:
        os.umask(before)
    run = tmp_path / "run"
    files = [*run.glob("checkpoints/*/*.safetensors"), *run.glob("exports/*/*"), run / "recipe.yaml"]
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in files} == {p.name: "0o640" for p in files}
    assert {oct(p.stat().st_mode & 0o777) for p in run.glob("exports/*")} == {"0o750"}


def test_print_shows_the_recipe_without_a_corpus(selfsight, recipe, corpora, capsys):
    assert selfsight(["pretrain", str(recipe), "--print", "seed=7"]) == 0
    out = capsys.readouterr().out
    assert "seed: 7" in out
    assert "command line" in out
    assert "lanes: auto" in out
    assert selfsight(["pretrain", str(recipe), "--print", f"corpus={corpora['one']}"]) == 0
    lanes = auto_lanes(8, len(Corpus.open(corpora["one"]).chunks))
    assert f"lanes: {lanes} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rarely", "stop", "delivered", "told"),
    [
        ([], 5, [[0, 0, 40]], [6, 12]),
        # The first epoch ends between two looks, and the run is stopped before the second one.
        (["training.log_every=50", "training.checkpoint_every=50"], 8, [[0, 1, 16]], [8, 12]),
    ],
)
def test_every_epoch_is_accounted_for_across_a_stop(
    rarely, stop, delivered, told, selfsight, command, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        asked = iter(range(1, 100))
        patch.setattr(Interrupts, "asked_to_stop", lambda self: next(asked) >= stop)
        assert selfsight(command("run", *rarely)) == 85
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob(f"step_*{stop}/state.json")).read_text())
    assert state["delivered"] == delivered
    assert selfsight(command("run", *rarely)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    notes = [(line["step"], line["note"]) for line in lines if "note" in line]
    assert notes == [
        (step, f"epoch {epoch} is over: all of its 48 images were delivered") for epoch, step in enumerate(told, 1)
    ]


def test_parts_of_a_mixture_and_a_selection(selfsight, command, corpora, tmp_path, capsys):
    write_selection(Corpus.open(corpora["two"]), "half", np.arange(0, 48, 2), np.full(24, 2))
    parts = f"[{{corpus: {corpora['one']}}}, {{corpus: {corpora['two']}, selection: half, weight: 0.5, alone: 0.25}}]"
    arguments = command("mixed", f"mixture={parts}", "corpus=null")
    assert selfsight(arguments) == 0
    assert "on 96 images" in capsys.readouterr().err
    finished = command("mixed", f"mixture={parts.replace('0.25', '0.3')}", "corpus=null")
    assert selfsight(finished) == 2
    assert "is from another corpus" in capsys.readouterr().err
    for key, wrong in (("weight", ".inf"), ("weight", "-1"), ("alone", ".nan"), ("alone", "1.5")):
        mixture = f"mixture=[{{corpus: {corpora['one']}, {key}: {wrong}}}]"
        assert selfsight(command("wrong", mixture, "corpus=null")) == 2
        assert re.search(rf"the .*{key}.* of .* is .*: give 0 ", capsys.readouterr().err)
    assert selfsight(command("both", f"mixture={parts}")) == 2
    assert "corpus and mixture name images" in capsys.readouterr().err
    assert selfsight(command("none", "selection=nothing")) == 2
    assert re.search(r"there is no .*selections/nothing.parquet: give", capsys.readouterr().err)


def test_shards_without_an_index(selfsight, command, corpora, tmp_path, capsys):
    shards = f"unindexed.shards=[{corpora['one']}/shards/000000.tar]"
    assert selfsight(command("foreign", "corpus=null", shards)) == 2
    assert "unindexed.images" in capsys.readouterr().err
    decode = ["stream.crops=device", "stream.decode=device"]
    assert selfsight(command("foreign", "corpus=null", shards, "unindexed.images=48", *decode)) == 2
    assert "set stream.decode=cpu, or adopt them" in capsys.readouterr().err
    assert selfsight(command("foreign", shards, "unindexed.images=48")) == 2
    assert "corpus and unindexed.shards name images" in capsys.readouterr().err
    assert selfsight(command("foreign", "corpus=null", shards, "unindexed.images=48")) == 0
    said = capsys.readouterr().err
    assert "these shards have no index: a resumed run sees other samples" in said
    assert "on 48 images" in said
    lines = [json.loads(line) for line in (tmp_path / "foreign" / "metrics.jsonl").read_text().splitlines()]
    assert not any("note" in line for line in lines)  # there is nothing to hold an account against


def test_a_corpus_at_a_url_trains_the_same(selfsight, command, corpora, read, tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("memory").put(str(corpora["one"]), "/far", recursive=True)
    assert selfsight(command("far", "corpus=memory://far")) == 0
    assert selfsight(command("near")) == 0
    (far, far_weights), (near, near_weights) = read(tmp_path / "far"), read(tmp_path / "near")
    assert far == near
    torch.testing.assert_close(far_weights, near_weights, atol=0, rtol=0)
    assert any((tmp_path / "cache").rglob("*"))
