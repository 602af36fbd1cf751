"""The trainings that test_zero.py compares: by the engine, under any ZeRO stage, and by a plain loop without it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selfsight.objectives import Objective, Progress, find
from selfsight.recipe import EncoderConfig, OptimizerConfig, Recipe
from selfsight.training import cluster, optim, schedules
from selfsight.training.cluster import Cluster
from selfsight.training.engine import Engine

BATCH, STEPS, STEPS_PER_EPOCH = 16, 20, 5
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
HEAD = {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8}
CROPS = {"global_crops_size": 16, "local_crops_size": 8, "local_crops_number": 2}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dino": {**HEAD, **CROPS, "head_layers": 2, "norm_last_layer": False, "freeze_last_layer": 1},
    "mae": {"crop_size": 16, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    "simclr": {"crop_size": 16, "hidden_dim": 16, "out_dim": 8, "temperature": 0.5},
}
# AdamW makes steps of rounding noise where the true gradient is zero, of which batch normalisation leaves many.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "dino": {"weight_decay_end": 0.4, "clip": 0.5},
    "mae": {"weight_decay": 0.05},
    "simclr": {"name": "sgd", "weight_decay": 1e-3},
}


class Case(NamedTuple):
    objective: str
    zero: int
    accumulation: int = 1
    offload: bool = False


def cases(world_size: int) -> list[Case]:
    """Every objective under every stage, every stage with one micro-batch and with two, and offload under each, on
    one rank and two."""
    found = []
    for i, name in enumerate(OBJECTIVES):
        found += [Case(name, zero, 1 + (i + zero + world_size // 2) % 2) for zero in range(4)]
        if world_size < 4:
            found.append(Case(name, i + 1, 1 + (i + world_size) % 2, offload=True))
    return found


def recipe_of(case: Case, precision: str = "fp32") -> Recipe:
    recipe = Recipe(batch_size=BATCH, objective={"name": case.objective})
    values: dict[str, Any] = {"base_lr": 1e-3, "warmup_epochs": 1.0}
    recipe.optimizer = OptimizerConfig(**{**values, "scaling": "none", **OPTIMIZERS[case.objective]})
    recipe.training.zero, recipe.training.offload = case.zero, case.offload
    recipe.training.accumulation, recipe.training.precision = case.accumulation, precision
    return recipe


def objective_of(case: Case, joined: Cluster | None = None) -> Objective:
    torch.manual_seed(0)
    kind = find(case.objective)
    recomputed = "full" if joined and case.zero == 3 and case.accumulation == 2 else "none"
    encoder = EncoderConfig("vit_tiny_patch16_224", 16, checkpointing=recomputed, compile=False, args=VIT)
    return kind(kind.Config(**OBJECTIVES[case.objective]), encoder, joined.collective() if joined else None)


def micro_batches(
    objective: Objective, step: int, accumulation: int, ranks: list[int], world: int
) -> list[dict[str, Tensor]]:
    """Of a step's BATCH images, those of each micro-batch that `ranks` of `world` see: rank by rank, as the stream
    deals them out."""
    generator = torch.Generator().manual_seed(step)
    spec, n = objective.views(), BATCH // world // accumulation
    crops = {c.name: torch.randn(c.count, BATCH, 3, c.size, c.size, generator=generator) for c in spec.crops}
    noise = {n.name: torch.rand(BATCH, n.length, generator=generator) for n in spec.noise}
    parts = []
    for a in range(accumulation):
        rows = [(rank * accumulation + a) * n + i for rank in ranks for i in range(n)]
        parts.append({**{k: x[:, rows] for k, x in crops.items()}, **{k: x[rows] for k, x in noise.items()}})
    return parts


def train(case: Case, joined: Cluster) -> dict[str, Any]:
    """Twenty steps by the engine and, with a teacher, one more whose loss is not finite on the last rank."""
    objective = objective_of(case, joined)
    engine = Engine(objective, recipe_of(case), joined)
    norms = []
    for step in range(STEPS):
        batches = micro_batches(objective, step, case.accumulation, [joined.rank], joined.world_size)
        done = engine.step(batches, Progress(step, STEPS_PER_EPOCH, STEPS))
        assert done.taken
        norms.append(done.grad_norm)
    state = engine.whole_state()
    refused = None
    if objective.teacher_pairs():
        batches = micro_batches(objective, STEPS, case.accumulation, [joined.rank], joined.world_size)
        if joined.rank == joined.world_size - 1:
            batches[0]["global"].fill_(torch.nan)
        refused = not engine.step(batches, Progress(STEPS - 1, STEPS_PER_EPOCH, STEPS)).taken
        unmoved = engine.whole_state()
        refused = refused and all(torch.equal(state[k], unmoved[k]) for k in state)
    if case.zero:
        engine.engine.optimizer.destroy()
    return {"state": state, "norms": norms, "refused": refused}


def plain(case: Case, world_size: int) -> dict[str, Any]:
    """The same by torch alone, in one process: one batch a step, or the mean over joint micro-batches."""
    objective, recipe = objective_of(case), recipe_of(case)
    config = recipe.optimizer
    rules = objective.parameter_rules()
    groups = optim.parameter_groups(objective, rules, config)
    if config.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0)
    accumulation = case.accumulation if objective.joint else 1
    norms = []
    for step in range(STEPS):
        progress = Progress(step, STEPS_PER_EPOCH, STEPS)
        lr, decay = schedules.learning_rate(config, BATCH, progress), schedules.weight_decay(config, progress)
        optim.set_schedule(optimizer, rules, progress, lr=lr, weight_decay=decay)
        optimizer.zero_grad()
        for batch in micro_batches(objective, step, accumulation, list(range(world_size)), world_size):
            (objective(batch, progress).loss / accumulation).backward()
        parameters = [p for g in groups for p in g["params"]]
        norms.append(nn.utils.get_total_norm([p.grad for p in parameters]).item())
        if config.clip:
            nn.utils.clip_grad_norm_(parameters, config.clip)
        for group in groups:
            if group["frozen"]:
                for p in group["params"]:
                    p.grad = None
        optimizer.step()
        follow(objective, progress)
        objective.after_step()
    return {"state": objective.state_dict(), "norms": norms}


@torch.no_grad()
def follow(objective: Objective, progress: Progress) -> None:
    m = objective.teacher_momentum(progress)
    for student, teacher in objective.teacher_pairs():
        for s, t in zip(student.parameters(), teacher.parameters(), strict=True):
            t.mul_(m).add_(s, alpha=1 - m)


def differences(case: Case, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference in each tensor, without the keys' third of a qkv bias: its true gradient is zero, and
    AdamW makes steps of what rounding leaves of it."""
    found = {}
    for name, expected in theirs.items():
        apart = (ours[name].float() - expected.float()).abs()
        if name.endswith("qkv.bias"):
            queries, _, values = apart.chunk(3)
            apart = torch.cat([queries, values])
        found[name] = apart.max().item()
    return found


def main(path: str) -> None:
    """On each of several ranks: all cases of that number. Rank 0 writes what `train` returns, by case."""
    everyone = cluster.join()
    torch.set_num_threads(1)
    results = {case: train(case, everyone) for case in cases(everyone.world_size)}
    if everyone.rank == 0:
        torch.save({tuple(case): result for case, result in results.items()}, path)
