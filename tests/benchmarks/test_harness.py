"""The arithmetic and the output of benchmarks, on made-up numbers, and one whole run that asserts no speed."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import Absent, Rival, Row, Sample
from selfsight.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HERE = {
    "cpu": "a CPU",
    "cores": 4,
    "memory_gib": 8,
    "gpu": None,
    "system": "Linux 6",
    "python": "3.11.0",
    "packages": {"torch": "2.11"},
    "load": 0.1,
}
KEYS = ["name", "value", "unit", "against", "ratio", "aim"]
QUICK = ["--quick", "--json", "--count", "8", "--batch", "8", "--cores", "1", "--repeats", "1"]


@pytest.fixture
def rows():
    rows = [
        Row("ours", 120.0, "images/s/core", more={"images/s": 1234.5}),
        Row("theirs", 30.0, "images/s/core"),
        Row("absent", None, "images/s/core", note="not installed"),
    ]
    harness.compare(rows, "ours", "theirs", aim=3.0)
    harness.compare(rows, "absent", "theirs")
    return rows


def test_ratio_is_value_over_the_other_and_none_where_one_is_missing(rows):
    assert (rows[0].ratio, rows[0].against, rows[0].aim) == (4.0, "theirs", 3.0)
    assert rows[2].ratio is None


def test_json_has_the_schema(rows):
    plain = json.loads(json.dumps(harness.to_json("stream", HERE, rows)))
    assert list(plain) == ["benchmark", "machine", "rows"]
    assert plain["benchmark"] == "stream"
    assert plain["machine"] == HERE
    assert all(list(row)[:6] == KEYS for row in plain["rows"])
    assert plain["rows"][0]["images/s"] == 1234.5
    assert plain["rows"][2]["note"] == "not installed"


def test_the_table_is_markdown_with_a_column_for_each_thing(rows):
    head, rule, ours, theirs, absent = harness.table(rows).splitlines()
    assert [c.strip() for c in head.split("|")[1:-1]] == [
        *("", "value", "unit", "images/s", "ratio", "aim", "against"),
    ]
    assert [c.strip() for c in ours.split("|")[1:-1]] == ["ours", "120", "images/s/core", "1,234", "4", "3", "theirs"]
    assert "–" in theirs
    assert "not installed" in absent
    assert {len(line) for line in (head, rule, ours, theirs, absent)} == {len(head)}


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (12345.6, "12,346"), (99.96, "100"), (0.01234, "0.0123")])
def test_numbers_have_three_digits(value, text):
    assert harness.number(value) == text


def test_medians_and_rates():
    samples = [Sample(100, 1.0, 2.0), Sample(100, 2.0, 4.0), Sample(100, 50.0, 100.0)]
    assert harness.middle(samples, "per_core") == 25.0
    assert harness.middle(samples, "rate") == 50.0


def test_everybody_has_a_turn_in_each_round_and_the_absent_are_not_asked_again():
    asked = []

    def contestant(name):
        def ask():
            asked.append(name)
            if name == "b":
                raise Absent("not installed")
            return Sample(1, 1.0, 1.0)

        return ask

    found = harness.interleave({name: contestant(name) for name in "abc"}, repeats=3)
    assert asked == ["a", "b", "c", "c", "a", "c", "a"]
    assert len(found["a"]) == len(found["c"]) == 3
    assert str(found["b"]) == "not installed"


def test_cpu_seconds_count_children_that_live_and_that_have_ended():
    """A child that works for 0.3 s of CPU is seen while it lives and, no less, after it."""
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); input()"
    before = harness.cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout
    child.stdout.readline()
    living = harness.cpu_seconds() - before
    child.communicate(b"\n")
    assert living >= 0.28  # the kernel counts in hundredths
    assert harness.cpu_seconds() - before >= living - 0.02


RIVAL = """
import sys, time
from benchmarks import harness
def prepare(job):
    print("what a library prints")
    if job == "absent": raise harness.Absent("not installed")
    if job == "raises": raise ValueError("two\\nlines")
    if job == "dies": sys.exit(1)
    return lambda: 7
harness.serve(prepare)
"""


@pytest.mark.parametrize(
    ("job", "reason"),
    [("absent", "not installed"), ("raises", "ValueError: two lines"), ("dies", "its process died")],
)
def test_a_rival_answers_or_says_why_not(job, reason):
    rival = Rival("r", [sys.executable, "-c", RIVAL])
    try:
        assert rival.run("works").images == 7
        with pytest.raises(Absent, match=f"^{reason}$"):
            rival.run(job)
    finally:
        rival.close()


def test_a_rival_stands_still_between_its_answers():
    """What it would do ahead of the next question would not be counted."""
    rival = Rival("r", [sys.executable, "-c", RIVAL])
    try:
        for _ in range(2):
            assert rival.run("works").images == 7
            # Returns once the kernel has stopped it: a process that answers is on its way to a stop.
            stopped = os.waitid(os.P_PID, rival._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert stopped is not None
            assert stopped.si_code == os.CLD_STOPPED
    finally:
        rival.close()


def test_writing_into_a_page_replaces_its_place_and_nothing_else(tmp_path, rows):
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- stream -->\nold\n<!-- end of stream -->\nafter\n")
    for _ in range(2):
        harness.write(page, "stream", "python benchmarks/stream.py", HERE, rows)
        text = page.read_text()
        assert text.startswith("before\n<!-- stream -->\n`python benchmarks/stream.py`")
        assert text.endswith("<!-- end of stream -->\nafter\n")
        assert harness.table(rows) in text
        assert "old" not in text
    with pytest.raises(UserError, match="has no place for this table"):
        harness.write(page, "feed", "python benchmarks/feed.py", HERE, rows)


def test_json_is_alone_on_stdout(capsys, rows):
    harness.report("stream", HERE, rows, argparse.Namespace(json=True, write=None))
    assert json.loads(capsys.readouterr().out)["benchmark"] == "stream"


def test_stream_runs_quickly_and_prints_the_schema():
    paths = os.pathsep.join([str(ROOT / "ssl"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "stream.py"), *QUICK, "--jobs", "mae", "--only", "ours, CPU"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plain = json.loads(done.stdout)
    assert plain["benchmark"] == "stream"
    assert plain["machine"]["cores used"] == 1
    rows = {row["name"]: row for row in plain["rows"]}
    assert all(list(row)[:6] == KEYS for row in rows.values())
    assert {"mae: ours, CPU path", "reading: bare decode, Pillow", "imports before it"} <= rows.keys()
    assert all(row["value"] is None or row["value"] > 0 for row in rows.values())
