"""What the README shows is run: its objective is trained from its recipe, and its weights load as it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import cli
from selfsight import objectives
from selfsight.corpus import build

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN = "quickstart/procedural-0/dino-0"
BLOCKS = re.findall(r"^```(?:python|yaml)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^    (?:\$ |PYTHONPATH=\. |.+ -m )(?:selfsight|launch) (.+)$", README, flags=re.MULTILINE)


def block(start: str) -> str:
    (found,) = [b for b in BLOCKS if b.startswith(start)]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which the README's objective was trained for two steps, as `RUN`."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"images/{i}.png")
    Image.open(folder / "images/0.png").save(folder / "photo.jpg")
    build([folder / "images"], folder / "corpus", workers=1)
    (folder / "my_methods").mkdir()
    (folder / "my_methods/simsiam.py").write_text(block("# my_methods/simsiam.py"))
    (folder / "simsiam.yaml").write_text(block("# simsiam.yaml"))
    arguments = f"pretrain simsiam.yaml corpus=corpus output={RUN} batch_size=10 epochs=1 stream.workers=0 "
    subprocess.run(
        [sys.executable, "-m", "launch", *arguments.split(), "optimizer.warmup_epochs=0"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_takes_what_the_readme_types(command):
    assert callable(cli.parse(command.split()).run)


def test_the_objective_of_the_readme_trains(folder):
    assert (folder / RUN / "exports/step_00000002/model.safetensors").is_file()


def test_the_objective_of_the_readme_conforms(folder):
    """All that is asked of the objectives in the package, by the command that the README names."""
    (command,) = re.findall(r"`pytest (tests/objectives/\S+ --objective \S+)`", README)
    arguments = [sys.executable, "-m", "pytest", *command.split(), "-q", "-p", "no:cacheprovider"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    ran = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    assert int(re.findall(r"(\d+) passed", ran.stdout)[0]) >= 10


@pytest.mark.parametrize("name", objectives.available())
def test_every_objective_has_its_place(name):
    """In the docs, with its equations; among the tests; and among the recipes, with the published one."""
    docs = (ROOT / "docs/objectives.md").read_text(encoding="utf-8")
    assert f"| [`{name}`](#{name}) |" in docs
    entry = docs.split(f"\n### {name}\n")[1].split("\n#")[0]
    assert re.search(r"^    \S+.* = ", entry, flags=re.MULTILINE)
    assert (ROOT / f"tests/objectives/test_{name}.py").is_file()
    recipes = {path.stem.rsplit("_", 1)[-1] for path in (ROOT / "configs" / name).glob("*.yaml")}
    assert {"imagenet", "cifar10"} <= recipes


def test_the_weights_load_as_the_readme_says(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(block("import selfsight"), names)
    assert names["tokens"].cls.shape == (1, 96)
    assert names["tokens"].patches.shape == (1, 16, 96)


def test_timm_loads_them_as_the_readme_says(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(re.sub(r"step_\d{8}", "step_00000002", block("import timm")), names)
    assert names["model"].num_features == 96
