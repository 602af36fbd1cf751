"""metrics.jsonl: strict JSON, cut back to where a run continues."""

import json
from math import isnan

from selfsight.training.log import FILE, Log, cut


def test_lines_are_strict_json_and_later_ones_are_cut(tmp_path):
    log = Log(tmp_path, 0)
    for step in range(1, 6):
        log.record(step, {"loss": float("nan") if step == 2 else 1.0 / step})
    log.event(4, "the ümlaut alarm")
    log.close()
    lines = (tmp_path / FILE).read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[1]) == {"step": 2, "loss": None}
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 6, "los')
    again = Log(tmp_path, 4)
    assert [r["step"] for r in again.records] == [1, 2, 3, 4]  # what a monitor should have seen
    assert isnan(again.records[1]["loss"])
    again.record(5, {"loss": 0.5})
    again.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / FILE).read_text(encoding="utf-8").splitlines()]
    assert steps == [1, 2, 3, 4, 4, 5]
    cut(tmp_path / "none.jsonl", 3)  # nothing there, nothing to do
