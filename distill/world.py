"""Process-group helpers; no-ops on one process.

Ranks come from the environment variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as set by `distill.launch`
and torchrun. The variables of srun and mpirun (SLURM_PROCID, OMPI_COMM_WORLD_RANK) are not read: use them to start torchrun.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Other ranks wait while one evaluates or writes to a slow disk.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size`, `local_rank` of `local_size` on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    # A gloo group for flags and Python objects, which does not synchronize with the device.
    control: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes files, logs and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.largest(int(flag)) > 0

    def largest(self, value: int) -> int:
        """The largest of the values of all ranks, on each of them."""
        if self.size == 1:
            return value
        found = torch.tensor([value])
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.control)
        return int(found.item())

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The value of one rank, by default the main process's, on each of them. It is pickled."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=source, group=self.control)
        return values[0]

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all ranks in their order, on the main process; None elsewhere."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks of a device tensor (in place); no host sync."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """Maximum over ranks of a device tensor (in place); no host sync."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def rows(self, values: Tensor) -> Tensor:
        """[world * B, ...]: the rows [B, ...] of all ranks in rank order, on each of them; B is the same everywhere.

        For a loss of all rows that every rank computes alike. Its gradient at this rank's rows comes back multiplied by
        `size`, since the engine takes the mean of parameter gradients over ranks, where this loss needs their sum."""
        if self.size == 1:
            return values
        gathered: Tensor = _Rows.apply(values, self.rank, self.size)
        return gathered

    def share(self, chunks: Sequence[Any]) -> list[tuple[int, Any]]:
        """This rank's chunks as (number, chunk): every `size`-th one, so chunks and results do not depend on the number of
        processes."""
        return [(number, chunk) for number, chunk in enumerate(chunks) if number % self.size == self.rank]

    def collect(self, parts: dict[int, Tensor]) -> Tensor | None:
        """Rows of all chunks in order, on the main process, from each rank's chunks by number; None elsewhere."""
        gathered = self.gather(parts)
        if gathered is None:
            return None
        merged = {number: rows for part in gathered for number, rows in part.items()}
        return torch.cat([merged[number] for number in sorted(merged)])


class _Rows(torch.autograd.Function):
    """All-gather along the first dimension; backward keeps this rank's part and needs no communication."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.size = rank, size
        gathered = values.new_empty(size * len(values), *values.shape[1:])
        dist.all_gather(list(gathered.chunk(size)), values.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.chunk(ctx.size)[ctx.rank] * ctx.size, None, None


def join(device: torch.device) -> World:
    """Initialize the process group from the environment, once; without WORLD_SIZE, return a world of one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    missing = [
        name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise ValueError(
            f"{missing[0]}: not set, but WORLD_SIZE is {size}; expected a launcher that sets all of them, such as torchrun"
        )
    local = int(os.environ["LOCAL_RANK"])
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return World(dist.get_rank(), size, local, local_size, control)


def leave() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
