"""Bytes on one GPU under each ZeRO stage: pure arithmetic on the sizes of the weights and the trace of a step.

In: how many bytes the student and the teacher have, and what a micro-batch holds (`trace`). Out: who takes how much.
Everything that stays from step to step is fp32; bf16 halves activations only. Rajbhandari et al. 2020, "ZeRO",
arXiv:1910.02054; DeepSpeed's buffers are those of its source, with the sizes that `sharding` gives them.
"""

from dataclasses import dataclass, fields

from selfsight.training.costs.trace import Trace
from selfsight.training.sharding import BUCKET_NUMBERS

STAGES = (0, 1, 2, 3)
BUCKET = 4 * BUCKET_NUMBERS  # gradients are sent from a buffer of so many bytes, or of all of them if they are fewer
LIVE = 4 * 1_000_000_000  # its stage3_max_live_parameters: no more is gathered at a time
MOMENTS = {"adamw": 2, "lamb": 2, "lars": 1, "sgd": 1}  # numbers that an optimiser keeps for each weight


@dataclass(frozen=True)
class Weights:
    """Bytes in fp32."""

    trained: int  # student and heads
    frozen: int  # teachers, and tables that are not trained
    buffers: int  # centres and queues, the same on every GPU
    moments: int  # of the optimiser, in all


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the worst moment of a step."""

    weights: float
    teacher: float
    optimizer: float  # moments, and from stage 1 on its own copy of this GPU's share of the weights
    gradients: float
    buckets: float  # DeepSpeed's, for sending gradients and, in stage 3, for gathered weights
    activations: float  # and views

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


def per_gpu(
    stage: int,
    ranks: int,
    weights: Weights,
    step: Trace,
    *,
    accumulation: int = 1,
    offload: bool = False,
    touched_only: bool = False,
) -> Memory:
    """`step` is of one micro-batch. `offload`: from stage 1 on the host has the optimiser's state, its copy of the
    weights and the gradients that it uses. `touched_only`: a buffer takes what is used of it, as on a CPU, and not all
    of its bytes, as on a GPU."""
    own = 0.0 if offload and stage else weights.trained / ranks  # what the optimiser works on
    moments = 0.0 if offload and stage else weights.moments / (ranks if stage else 1)
    bucket = min(weights.trained, BUCKET)
    kept = own if stage > 1 else weights.trained  # of the gradients of earlier micro-batches
    whole_gradients = stage == 0 or touched_only
    views = step.views * accumulation  # of all micro-batches: they come together
    # (gradients, buckets, activations) in the backward pass, whose beginning has most activations and whose end has all
    # gradients, and after it, when gradients are averaged.
    backward = (
        kept if accumulation > 1 or stage == 3 else 0.0,
        bucket if stage and not touched_only else 0.0,
        step.peak(1 if whole_gradients and accumulation == 1 else 0) - step.views + views,
    )
    sent = bucket if stage or ranks > 1 else 0  # stage 0 sends copies of what there is
    averaging = (own if stage else weights.trained, sent, views)
    gradients, buckets, activations = max(backward, averaging, key=sum)
    return Memory(
        weights=weights.trained / (ranks if stage == 3 else 1),
        teacher=weights.frozen / (ranks if stage == 3 else 1) + weights.buffers,
        optimizer=moments + (own if stage else 0.0),
        gradients=gradients,
        buckets=buckets + (min(weights.trained + weights.frozen, LIVE) if stage == 3 else 0.0),
        activations=activations,
    )
