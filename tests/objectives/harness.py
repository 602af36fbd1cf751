"""What the conformance test does with any objective: builds a small one, feeds it from its own view spec, trains it.

Run as a program it is one of several ranks, each of which takes its part of the same batch:
    python harness.py RANK WORLD_SIZE RENDEZVOUS_FILE OUTPUT_FILE OBJECTIVE…
"""

import sys
from dataclasses import fields

import torch
from torch import Tensor

from selfsight.collective import Collective, DistributedCollective
from selfsight.objectives import Objective, Progress, find
from selfsight.recipe import EncoderConfig

ENCODER = EncoderConfig(
    "vit_tiny_patch16_224", img_size=32, args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
)
# Whichever of these keys an objective's Config has are set to these values; the others keep their published ones.
SMALL = {
    "out_dim": 32,
    "hidden_dim": 32,
    "bottleneck_dim": 16,
    "global_crops_size": 32,
    "local_crops_size": 16,
    "local_crops_number": 3,
    "crop_size": 32,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "freeze_last_layer": 0,
    # LeJEPA, SwAV, MSN
    "num_slices": 64,
    "nmb_prototypes": 32,
    "queue_length": 8,
    "queue_start_epoch": 0,
    "num_proto": 32,
    "output_dim": 16,
    "rand_size": 32,
    "focal_size": 16,
    "focal_views": 2,
    # I-JEPA, SimMIM, data2vec 2.0
    "pred_emb_dim": 16,
    "pred_depth": 1,
    "pred_num_heads": 2,
    "mask_patch_size": 16,
    "clone_batch": 2,
    "mask_length": 2,
    "average_top_k_layers": 2,
    "decoder_dim": 24,
    "decoder_groups": 4,
    "decoder_layers": 2,
    "gram_start": 0,
    "gram_refresh_every": 2,
    "gram_crops_size": 64,
    "teacher_name": "vit_tiny_patch16_224",
    "teacher_args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
}
START = Progress(step=0, steps_per_epoch=4, total_steps=16)


def small(name: str, collective: Collective | None = None, seed: int = 0) -> Objective:
    torch.manual_seed(seed)
    cls = find(name)
    config = cls.Config(**{f.name: SMALL[f.name] for f in fields(cls.Config) if f.name in SMALL})
    return cls(config, ENCODER, collective)


def make_batch(objective: Objective, size: int, seed: int = 0) -> dict[str, Tensor]:
    """Random views of `size` images, as the loader would deliver them."""
    generator = torch.Generator().manual_seed(seed)
    spec = objective.views()
    crops = {c.name: torch.randn(c.count, size, 3, c.size, c.size, generator=generator) for c in spec.crops}
    return crops | {n.name: torch.rand(size, n.length, generator=generator) for n in spec.noise}


def part(objective: Objective, batch: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    crops = {c.name for c in objective.views().crops}
    return {name: x[:, start:stop] if name in crops else x[start:stop] for name, x in batch.items()}


def gradients(objective: Objective) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def train(objective: Objective, steps: range, lr: float = 0.1) -> list[Tensor]:
    """A few steps as the trainer takes them: gradient step, EMA, statistics."""
    losses = []
    for step in steps:
        progress = Progress(step, START.steps_per_epoch, START.total_steps)
        loss = objective(make_batch(objective, 4, seed=step), progress).loss
        objective.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in objective.parameters():
                if p.grad is not None:
                    p -= lr * p.grad
            m = objective.teacher_momentum(progress)
            for student, teacher in objective.teacher_pairs():
                for s, t in zip(student.parameters(), teacher.parameters(), strict=True):
                    t.mul_(m).add_(s, alpha=1 - m)
        objective.after_step()
        losses.append(loss.detach())
    return losses


def make_exact(objective: Objective, size: int) -> dict[str, Tensor]:
    """A batch in float64, to which the objective is moved: through the batch normalisation of a few samples float32
    leaves rounding that could be mistaken for a bug."""
    objective.double()
    return {name: x.double() for name, x in make_batch(objective, size).items()}


def one_rank(rank: int, world_size: int, rendezvous: str, output: str, names: list[str]) -> None:
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world_size)
    collective = DistributedCollective()
    found = {}
    for name in names:
        objective = small(name, collective)
        batch = make_exact(objective, 6)
        each = 6 // world_size
        loss = objective(part(objective, batch, rank * each, (rank + 1) * each), START).loss
        loss.backward()
        objective.after_step()
        mean = {k: collective.all_reduce_sum(g) / world_size for k, g in gradients(objective).items()}
        found[name] = {"loss": collective.all_reduce_sum(loss) / world_size, "gradients": mean}
        found[name]["state"] = objective.state_dict()
    if rank == 0:
        torch.save(found, output)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    one_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
