"""LARS against MAE's."""

import pytest
import torch

from selfsight.training.lars import LARS


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("case", ["wd", "nowd"])
def test_trajectory_is_the_official_one(golden, case, flat):
    """Also where a tensor comes flattened, as ZeRO hands it over, and its group says whether to adapt."""
    numbers = golden.load("mae_lars")
    inputs, h = numbers.inputs(case), numbers.hyper(case)
    names = [n.removeprefix("param.") for n in inputs if n.startswith("param.")]
    parameters = {n: inputs[f"param.{n}"].clone() for n in names}
    ranks = {n: p.ndim for n, p in parameters.items()}
    if flat:
        groups = [{"params": [p.flatten()], "adapt": ranks[n] > 1} for n, p in parameters.items()]
        parameters = {n: g["params"][0] for n, g in zip(names, groups, strict=True)}
    else:
        groups = list(parameters.values())
    optimizer = LARS(
        groups,
        h["lr"],
        weight_decay=h["weight_decay"],
        momentum=h["momentum"],
        trust_coefficient=h["trust_coefficient"],
    )
    steps: dict[str, list[torch.Tensor]] = {n: [] for n in names}
    for i in range(len(inputs["grad.w"])):
        for n, p in parameters.items():
            p.grad = inputs[f"grad.{n}"][i].reshape(p.shape)
        optimizer.step()
        for n, p in parameters.items():
            steps[n].append(p.clone().reshape(inputs[f"param.{n}"].shape))
    for n in names:
        numbers.check(case, n, torch.stack(steps[n]))
