"""What a run will cost, before it starts: memory, arithmetic and time, from its recipe and figures of the hardware."""

from selfsight.training.costs.hardware import GPUS, Gpu, find_gpu
from selfsight.training.costs.memory import Memory, Weights, per_gpu
from selfsight.training.costs.plan import Plan, plan
from selfsight.training.costs.trace import Trace, trace

__all__ = ["GPUS", "Gpu", "Memory", "Plan", "Trace", "Weights", "find_gpu", "per_gpu", "plan", "trace"]
