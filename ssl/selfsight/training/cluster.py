"""Which process this is, on which device, and the process group it belongs to; torchrun, deepspeed, srun or none.

One process alone needs no address and no port. The group lives as long as the process, so that several runs can
follow each other in one interpreter.
"""

import atexit
import logging
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist

from selfsight.collective import Collective, DistributedCollective
from selfsight.errors import UserError
from selfsight.machine import core_numbers, machine_id

T = TypeVar("T")


class AgreedError(UserError):
    """A mistake of the user that is raised on every rank, so that it is enough if rank 0 says it."""


@dataclass(frozen=True)
class Cluster:
    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    ranks_here: int = 1  # on this machine
    sharing: int = 1  # of those, how many may run on the same cores: srun gives each some of its own, torchrun does not
    group: dist.ProcessGroup | None = None  # whose collectives are called; None is the one that training speaks through

    def collective(self) -> Collective:
        return DistributedCollective() if self.world_size > 1 else Collective()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """`x` summed over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def gather_rows(self, x: torch.Tensor) -> torch.Tensor:
        """(n, D) of every rank as one (world·n, D), in rank order."""
        if self.world_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def gather_objects(self, x: T) -> list[T]:
        """`x` of every rank, in rank order."""
        everyone = [x] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyone, x, group=self.group)
        return everyone

    def memory(self) -> int | None:
        """Bytes of the smallest GPU among those of the ranks, None without GPUs. All ranks call it."""
        if self.device.type != "cuda":
            return None
        return min(self.gather_objects(torch.cuda.mem_get_info(self.device)[1]))

    def aside(self) -> "Cluster":
        """The same ranks with a group of their own, over the network of the hosts, so that a thread may agree on
        something while training goes on. All ranks call it."""
        return replace(self, group=dist.new_group(backend="gloo")) if self.world_size > 1 else self

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work()` returns on rank 0, on every rank; a mistake of the user is raised on all of them."""
        if self.world_size == 1:
            return work()
        outcome: list = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except (UserError, OSError) as e:
                outcome[1] = str(e)
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise AgreedError(outcome[1])
        return outcome[0]

    def together(self, work: Callable[[], T]) -> T:
        """What `work()` returns on this rank, when all have done it; a mistake that one meets is raised on all of them,
        that of the lowest rank."""
        if self.world_size == 1:
            return work()
        result, mistake = None, None
        try:
            result = work()
        except (UserError, OSError) as e:
            mistake = str(e)
        for found in self.gather_objects(mistake):
            if found is not None:
                raise AgreedError(found)
        return result  # type: ignore[return-value]


def ranks(environment: dict[str, str]) -> dict[str, str]:
    """The variables of torch.distributed, from torchrun's or deepspeed's own or from srun's; empty for one process."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        wanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        return {k: environment[k] for k in wanted if k in environment}
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return {}
    nodes = ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]]
    address = environment.get("MASTER_ADDR") or subprocess.check_output(nodes, text=True).split()[0]
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": address,
        "MASTER_PORT": environment.get("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 10000)),
    }


def join() -> Cluster:
    """Joins the process group, quietly, and picks the device. Raises UserError when the group cannot be joined."""
    cuda = torch.cuda.is_available()
    found = ranks(dict(os.environ))
    rank, world_size = int(found.get("RANK", 0)), int(found.get("WORLD_SIZE", 1))
    local_rank = int(found.get("LOCAL_RANK", 0))
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{local_rank + 1} or more processes on a machine with {torch.cuda.device_count()} GPUs: "
                "start one process per GPU"
            )
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on this one
    _quiet_deepspeed("cuda" if cuda else "cpu")
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
        else:
            os.environ.update(found)
            try:
                dist.init_process_group(backend)
            except (ValueError, RuntimeError) as e:  # a variable that is missing; a host or port that does not answer
                raise UserError(
                    f"rank {rank} of {world_size} cannot join the others ({' '.join(str(e).split())[:200]}): "
                    "start all of them with torchrun or srun, or unset RANK and WORLD_SIZE to train on one process"
                ) from e
        atexit.register(_leave)
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False)
    return Cluster(rank, local_rank, world_size, device, *_neighbours(rank, world_size))


def _neighbours(rank: int, world_size: int) -> tuple[int, int]:
    places: list = [(machine_id(), core_numbers())] * world_size
    if world_size > 1:
        dist.all_gather_object(places, places[rank])
    return neighbours(places, rank)


def neighbours(places: list[tuple[str, list[int]]], rank: int) -> tuple[int, int]:
    """(ranks on the machine of `rank`, those of them that share a core with it) from each rank's machine and cores."""
    machine, own = places[rank]
    here = [cores for other, cores in places if other == machine]
    return len(here), sum(not set(own).isdisjoint(cores) for cores in here)


def _quiet_deepspeed(accelerator: str) -> None:
    """Spares the log DeepSpeed's notices and, on CPU, a compiler run of 40 s for an optional shared-memory backend."""
    os.environ.setdefault("DS_ACCELERATOR", accelerator)
    cpp = logging.getLogger("torch.utils.cpp_extension")
    level = cpp.level
    cpp.setLevel(logging.ERROR)  # "No CUDA runtime is found"
    import deepspeed
    from deepspeed.utils import logger

    cpp.setLevel(level)
    logger.setLevel(logging.ERROR)  # "an untested optimizer" is ours, tested here
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)  # private, hence the care
    if accelerator == "cpu" and isinstance(compatible, dict):
        compatible["deepspeed_shm_comm"] = False


def _leave() -> None:
    """gloo's threads free their last work while Python finalises, which aborts the process in some runs: give them time
    (DeepSpeed 0.19 on CPU: 4–12 % of two-rank runs without the pause, none of 40 with it)."""
    if dist.is_initialized():
        several = dist.get_world_size() > 1
        dist.destroy_process_group()
        if several:
            time.sleep(0.5)
