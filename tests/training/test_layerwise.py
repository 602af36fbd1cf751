"""LARS and LAMB on tensors that lie on two ranks, at every ZeRO stage, against one process."""

import json
from typing import Any

import pytest
import torch

from selfsight.training import cluster

# Each rank takes its half of the batch; rank 0 prints what became of the weights, by stage and optimiser.
SCRIPT = """
import json, sys
import torch
from selfsight.objectives import Progress, find
from selfsight.recipe import EncoderConfig, OptimizerConfig, Recipe
from selfsight.training import cluster, sharding
from selfsight.training.engine import Engine

def train(here, name, zero, steps=5):
    torch.manual_seed(0)
    kind = find("mae")
    args = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    config = kind.Config(decoder_embed_dim=20, decoder_depth=1, decoder_num_heads=1, crop_size=32)
    objective = kind(config, EncoderConfig("vit_tiny_patch16_224", 32, args=args))
    recipe = Recipe(batch_size=4, epochs=1)
    lr = {"lars": 300.0, "lamb": 0.5}[name]
    recipe.optimizer = OptimizerConfig(name=name, base_lr=lr, warmup_epochs=0.0, weight_decay=0.1, clip=1.0)
    recipe.training.zero, recipe.training.precision = zero, "fp32"
    engine = Engine(objective, recipe, here)
    generator = torch.Generator().manual_seed(1)
    result = None
    for step in range(steps):
        crops, noise = torch.randn(1, 4, 3, 32, 32, generator=generator), torch.rand(4, 16, generator=generator)
        mine = slice(here.rank * 4 // here.world_size, (here.rank + 1) * 4 // here.world_size)
        batch = {"crop": crops[:, mine], "noise": noise[mine]}
        batch = {k: x.to(here.device) for k, x in batch.items()}
        result = engine.step([batch], Progress(step, 5, 5), measure=True)
    return engine.whole_state(), result and [result.grad_signal, result.grad_noise]

if __name__ == "__main__":
    here = cluster.join()
    found = {f"{name}{zero}": train(here, name, zero) for name in ("lars", "lamb") for zero in range(4)}
    if here.rank == 0:
        torch.save({k: state for k, (state, _) in found.items()}, sys.argv[1])
        print(json.dumps({k: spread for k, (_, spread) in found.items()}))
"""


def test_two_ranks_are_one_at_every_stage(torchrun, tmp_path):
    script, weights = tmp_path / "train.py", tmp_path / "weights.pt"
    script.write_text(SCRIPT)
    child = torchrun(2, [str(script), str(weights)])
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    spreads, found = json.loads(out), torch.load(weights, weights_only=True)
    scope: dict[str, Any] = {"__name__": "train"}
    exec(SCRIPT, scope)
    for name in ("lars", "lamb"):
        start, alone = scope["train"](cluster.join(), name, 0, steps=0)[0], scope["train"](cluster.join(), name, 0)[0]
        assert (alone["decoder_pred.weight"] - start["decoder_pred.weight"]).abs().max() > 1e-3
        for zero in range(4):
            for n, w in alone.items():
                if not n.endswith("qkv.bias"):  # as Adam, LAMB makes steps of the rounding noise in a key's bias
                    torch.testing.assert_close(
                        found[f"{name}{zero}"][n], w, rtol=0, atol=1e-6, msg=f"{name} {zero} {n}"
                    )
            # The noise of the gradient, of which each rank saw its own part before ZeRO added them up.
            assert spreads[f"{name}{zero}"] == pytest.approx(spreads[f"{name}0"], rel=1e-3)
