"""Several processes that train one SAE together, started by ``torchrun``: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from featureinterp.errors import InputError

T = TypeVar("T")
PATIENCE = timedelta(days=2)
"""How long processes wait for one that extracts or evaluates for all."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's number and how many there are. Alone, every function gives back what it was given."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over processes, without a gradient."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def any(self, value: torch.Tensor) -> torch.Tensor:
        """Bool: true where it is in any process."""
        return value if self.world == 1 else self._reduced(value.to(torch.uint8), dist.ReduceOp.MAX).bool()

    def min(self, value: torch.Tensor) -> torch.Tensor:
        """The smallest over processes."""
        return self._reduced(value, dist.ReduceOp.MIN)

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """What all processes have, one behind the other; of one shape in each."""
        if self.world == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    def objects(self, value: T) -> list[T]:
        """What every process has, in their order."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Waits for all."""
        if self.world > 1:
            dist.barrier()

    def _reduced(self, value: torch.Tensor, how: dist.ReduceOp.RedOpType) -> torch.Tensor:
        value = value.detach()
        if self.world == 1:
            return value
        out = value.clone()
        dist.all_reduce(out, how)
        return out


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The processes that ``torchrun`` started, or this one alone. Raises ``InputError`` when its environment
    is only half there.
    """
    world = _number("WORLD_SIZE")
    if world is None or world == 1:
        yield Ranks()
        return
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"WORLD_SIZE is {world}, but RANK or MASTER_ADDR is missing: start with 'torchrun "
            "--nproc-per-node N -m featureinterp train ...'"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process among those of its machine; another device as it is."""
    local = _number("LOCAL_RANK")
    return torch.device("cuda", local) if device.type == "cuda" and local is not None else device


def _number(variable: str) -> int | None:
    """What ``torchrun`` says in an environment variable; None where it says nothing."""
    found = os.environ.get(variable)
    if found is not None and not (found.isascii() and found.isdecimal() and len(found) < 10):
        mend = "start with torchrun, or unset it"
        raise InputError(f"the environment variable {variable} is {found[:40]!r}: {mend}")
    return None if found is None else int(found)
