"""Weights & Biases and MLflow get the numbers of metrics.jsonl over a restart, and cannot end a run."""

import json
import struct

import pytest

from selfsight.training import trackers
from selfsight.training.log import FILE, Log


def records(run):
    lines = [json.loads(line) for line in (run / FILE).read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_one_run_over_a_restart(tmp_path, command, selfsight, monkeypatch):
    pytest.importorskip("wandb", reason="needs selfsight[wandb]")
    tracking = pytest.importorskip("mlflow.tracking", reason="needs selfsight[mlflow]")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    first = command("run", "log.wandb=tests", f"log.mlflow={store}", "epochs=1")
    assert selfsight(first) == 0
    run = tmp_path / "run"
    ids = json.loads((run / trackers.FILE).read_text())
    for begin in trackers.wanted(_config("tests", store), run, {}).values():  # as a continued run begins
        tracker = begin()
        tracker.record(7, {"loss": 0.5})
        tracker.close()
    assert json.loads((run / trackers.FILE).read_text()) == ids

    client = tracking.MlflowClient(tracking_uri=store)
    expected = [(r["step"], r["loss"]) for r in records(run)] + [(7, 0.5)]
    assert sorted((m.step, m.value) for m in client.get_metric_history(ids["mlflow"], "loss")) == expected
    there = client.get_run(ids["mlflow"])
    assert there.info.run_name == "run"
    assert there.data.params["objective.out_dim"] == "96"
    assert there.info.status == "FINISHED"

    history = []
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert [f.stem for f in files] == [f"run-{ids['wandb']}"] * 2
    for file in files:
        for data in leveldb_log(file.read_bytes()[7:], 7):  # after W&B's own head
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            history += [(items["step"], items["loss"])] if "loss" in items else []
    assert history == expected


def leveldb_log(data: bytes, start: int, block: int = 1 << 15) -> list[bytes]:
    """The records of LevelDB's log format, which offline runs have: blocks of parts (crc32, length, type)."""
    found, at = [b""], 0
    while at + 7 <= len(data):
        if (left := block - (at + start) % block) < 7:  # padding
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        found[-1] += data[at + 7 : at + 7 + length]
        found += [b""] if kind in (1, 4) else []  # whole, or the last part
        at += 7 + length
    return found[:-1]


def test_a_tracker_that_fails_is_told_once(tmp_path, capsys):
    class Broken:
        name = "broken"

        def record(self, step, values):
            raise ConnectionError("the server\nis away")

        def close(self):
            raise AssertionError("it was dropped")

    def absent():
        raise OSError("no such place")

    log = Log(tmp_path, 0, {"broken": Broken, "absent": absent})
    for step in (1, 2):
        log.record(step, {"loss": 1.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    events = [line["event"] for line in lines if "event" in line]
    assert [("absent" in e, "the server is away" in e) for e in events] == [(True, False), (False, True)]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert capsys.readouterr().err.count("ALARM") == 2


def test_a_package_that_is_missing_is_said_before_training(command, selfsight, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert selfsight(command("run", "log.wandb=tests")) == 2
    assert "pip install 'selfsight[wandb]'" in capsys.readouterr().err


def _config(wandb, mlflow):
    from selfsight.recipe import LogConfig

    return LogConfig(wandb, mlflow)
