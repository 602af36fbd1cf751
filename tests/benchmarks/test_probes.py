"""Every contestant of benchmarks/probes.py does its work, on sizes that take no time."""

import torch

from benchmarks import probes
from selfsight.recipe import EncoderConfig

CPU = torch.device("cpu")
TINY = EncoderConfig("vit_tiny_patch16_224", 32, args={"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3})


def test_all_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "WIDTH", 16)
    rows = probes.neighbours(200, 10, 16, CPU, repeats=1)
    rows += probes.heads(600, CPU, repeats=1)
    rows += [probes.whole_grid(600, 100, CPU)]
    rows += probes.extraction(TINY, 16, tmp_path, CPU, repeats=1)
    assert all(row.value and row.value > 0 for row in rows if not row.note)
    assert [row.name.partition(": ")[2] for row in rows if row.ratio] == [
        "scikit-learn", "faiss", "52 at once", "extraction",
    ]  # fmt: skip
