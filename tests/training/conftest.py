"""A small corpus, a small recipe, and runs of it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

RECIPE = {
    "batch_size": 8,
    "epochs": 2,
    "encoder": {
        "name": "vit_tiny_patch16_224",
        "img_size": 32,
        "drop_path_rate": 0.1,  # so that torch's own generator matters
        "args": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    },
    "objective": {
        "name": "dino",
        "out_dim": 96,
        "hidden_dim": 64,
        "bottleneck_dim": 32,
        "global_crops_size": 32,
        "local_crops_size": 16,
        "local_crops_number": 2,
    },
    "optimizer": {"base_lr": 0.03, "warmup_epochs": 1, "clip": 0.3, "clip_per": "tensor", "weight_decay_end": 0.4},
    "stream": {"window": 2, "workers": 0},
    "training": {"log_every": 1, "checkpoint_every": 3, "precision": "fp32"},
}


def images(folder: Path, n: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for i in range(n):
        kind = folder / f"class{i % 2}"
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).resize((40, 36)).save(kind / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def corpora(tmp_path_factory) -> dict[str, Path]:
    """Two corpora: "one" of 48 images, "two" of 48 others."""
    from selfsight.corpus import build

    base = tmp_path_factory.mktemp("corpora")
    for seed, name in enumerate(("one", "two")):
        build([images(base / f"{name}-images", 48, seed)], base / name, workers=1, chunk_samples=8)
    return {name: base / name for name in ("one", "two")}


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.fixture
def command(corpora, recipe, tmp_path) -> Callable[..., list[str]]:
    """The arguments of `selfsight` that train into tmp_path/NAME."""

    def arguments(name: str = "run", *overrides: str, corpus: str = "one") -> list[str]:
        return ["pretrain", str(recipe), f"corpus={corpora[corpus]}", f"output={tmp_path / name}", *overrides]

    return arguments


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**kept, "OMP_NUM_THREADS": "1"}


def start(arguments: list[str]) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *arguments], env=environment(), stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def spawn() -> Callable[..., subprocess.Popen]:
    """Starts `selfsight` in a process of its own."""
    return lambda arguments: start(["-m", "launch", *arguments])


@pytest.fixture
def torchrun() -> Callable[..., subprocess.Popen]:
    """Starts `torchrun --nproc-per-node RANKS …`."""
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return lambda ranks, arguments: start([*launcher, f"--nproc-per-node={ranks}", *arguments])


@pytest.fixture(scope="session")
def warm() -> Callable[..., dict[str, Any]]:
    """Calls "module:function" with `arguments` in ranks that take no time to start; see warm.py."""
    process = subprocess.Popen(
        [sys.executable, Path(__file__).parent / "warm.py"],
        env={**environment(), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(call: str, arguments: list, **how: Any) -> dict[str, Any]:
        print(json.dumps({"call": call, "arguments": arguments, **how}), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())  # pyright: ignore[reportOptionalMemberAccess]

    yield ask
    process.kill()
    process.communicate()


@pytest.fixture
def selfsight(monkeypatch) -> Callable[[list[str]], int]:
    """The `selfsight` command in this process, one thread as in `spawn`; returns its exit code."""
    from launch.cli import main

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield main
    torch.set_num_threads(threads)


@pytest.fixture
def read() -> Callable[[Path], tuple[list[dict[str, Any]], dict[str, torch.Tensor]]]:
    """What a run has to show: its records without the timings, and the weights of its newest checkpoint."""

    def read(run: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        records = [line for line in lines if "loss" in line]
        timings = ("images_per_second", "data_wait", "peak_memory")
        newest = max((run / "checkpoints").glob("step_*"))
        weights = load_file(newest / "objective.safetensors")
        return [{k: v for k, v in r.items() if k not in timings} for r in records], weights

    return read
