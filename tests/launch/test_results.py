"""The verb results: tables that fit a terminal, one JSON object, a page of plots."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from eval_probes.protocol import find
from eval_probes.results import ResultsStore, figure, score_of
from eval_probes.subject import PIXELS, Subject
from launch.cli import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    """Two runs with kNN at three checkpoints, and thirty figures of another protocol at one."""
    ease, found = np.arange(400) / 400, []
    on = {"train": "c0ffee" * 8, "test": "decade" * 8}
    for name in ("dino [1]", "mae :star:"):
        run = tmp_path_factory.mktemp("results") / name
        run.mkdir()
        (run / "recipe.yaml").write_text("encoder: {name: x}\nobjective: {name: mae}\n")
        store = ResultsStore(run / "results.sqlite")
        store.add(score_of("top1", ease < 0.2, find("knn"), Subject(PIXELS, "p", {}, {}, 8), **on))
        for step in (0, 1000, 2000):
            subject = Subject(f"{run}/exports/step_{step:08d}", f"{name}{step}", {}, {"step": step}, 8)
            items = ease < 0.3 + step / 5000 + 0.1 * (name[0] == "m")
            store.add(score_of("top1", items, find("knn"), subject, **on))
        many = [figure(f"figure-{i}", i / 30, 400, find("ridge"), subject, unit="px", **on) for i in range(30)]
        store.add(*many)
        found.append(str(run))
    return found


def test_tables_fit_and_do_not_drown(runs, capsys):
    assert main(["results", *runs]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100
    digest = find("knn").digest[:8]
    assert f"knn {digest} · trained on c0ffeec0ffee · tested on decadedecade" in said
    (row,) = [line for line in said.splitlines() if re.search(r"dino \[1\] +2000 +\S+ %", line)]
    assert re.search(r"70\.00 % +65\.34–74\.28 +400", row)
    assert "mae :star:" in said
    assert "figure-0" in said
    assert "figure-1" not in said
    assert "29 more metrics: --protocol ridge" in said
    assert main(["results", *runs, "--protocol", "ridge"]) == 0
    said = capsys.readouterr().out
    assert "figure-29" in said
    assert "top1" not in said


def test_json_is_one_object(runs, capsys):
    assert main(["results", *runs, "--compare", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["scores"]) == 1 + 2 * (3 + 30)
    assert {s["step"] for s in said["scores"] if s["protocol"] == "knn"} == {None, 0, 1000, 2000}
    knn, ridge = said["comparisons"]
    assert (knn["metric"], knn["other"]["step"]) == ("top1", 2000)
    assert knn["adjusted"] == knn["p"] < 0.05, "one test was made"
    assert ridge["p"] is None


def test_a_comparison_says_how_many_tests_were_made(runs, capsys):
    assert main(["results", *runs, "--compare"]) == 0
    said = capsys.readouterr().out
    assert "mae :star: is better" in " ".join(said.split())
    assert "adjusted for the 1 test made here" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 100


def test_the_plots_are_a_page_that_needs_nothing(runs, tmp_path, capsys):
    page = tmp_path / "plots.html"
    assert main(["results", *runs, "--protocol", "knn", "--plot", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|<script|src=", text)
    (svg,) = [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)]
    lines = [g for g in svg.iter("g") if str(g.get("class")).startswith("run")]
    assert [[p.get("class") for p in g.iter("path")] for g in lines] == [["band", "line"]] * 2
    assert [len(list(g.iter("circle"))) for g in lines] == [3, 3]
    assert "step 2\u202f000: 70.00 %" in "".join(svg.itertext())
    assert "raw pixels" in "".join(svg.itertext())
    assert main(["results", *runs, "--plot", str(tmp_path / "plots.png")]) == 2
    assert "ends in .html" in capsys.readouterr().err


def test_mistakes_are_one_line(runs, tmp_path, capsys):
    for arguments, said in (
        ([runs[0], "--compare"], "one run only"),
        ([*runs, "--protocol", "kn"], "only of knn, ridge"),
        ([str(tmp_path / "nowhere")], "there is no"),
        ([str(Path(runs[0]) / "recipe.yaml")], "cannot be used as a results store"),
    ):
        assert main(["results", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
