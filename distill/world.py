"""Process-group helpers; no-ops on one process.

Ranks come from the environment variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as set by `distill.launch`
and torchrun. Where they are not set, `adopt_srun` sets them from those of srun. The variables of mpirun
(OMPI_COMM_WORLD_RANK) are not read: use it to start torchrun.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")
# Errors that are made from a message alone, unlike some of their subclasses; the first that fits.
PLAIN: tuple[type[Exception], ...] = (FileNotFoundError, OSError, ValueError, FloatingPointError)

# For flags and objects: other ranks wait while one evaluates or writes to a slow disk.
TIMEOUT = timedelta(hours=2)
# For tensors, by default (`trainer.timeout`): after so many seconds without an answer the other node is taken for dead.
SECONDS = 600


@dataclass(frozen=True)
class World:
    """This process's place: `rank` of `size`, on this machine one of `local_size`, with the device number `local_rank`."""

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

    def largest_later(self, value: int) -> Callable[[], int]:
        """`largest` without waiting: what it returns gives the result, and waits for it then."""
        if self.size == 1:
            return lambda: value
        found = torch.tensor([value])
        work = dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.control, async_op=True)

        def result() -> int:
            work.wait()
            return int(found.item())

        return result

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The value of one rank, by default the main process's, on each of them. It is pickled."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=source, group=self.control)
        return values[0]

    def decided(self, decide: Callable[[], Value]) -> Value:
        """What `decide` returns on the main process, on each of them; its error is raised on each of them, elsewhere as the
        plain class that it is a kind of. For decisions from the disk, which a network file system may show differently on
        different machines."""
        if self.size == 1:
            return decide()
        value, error = _tried(decide) if self.main else (None, None)
        value, plain, text = self.broadcast((value, _plain(error), str(error)))
        _raise([(plain, text)], error)
        return cast(Value, value)

    def together(self, do: Callable[[], Value]) -> list[Value]:
        """What `do` returns on each rank, in their order, on each of them. The error of one rank is raised on all of them, as
        by `decided`."""
        if self.size == 1:
            return [do()]
        value, error = _tried(do)
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, (value, _plain(error), str(error)), group=self.control)
        _raise([answer[1:] for answer in answers], error)
        return [answer[0] for answer in answers]

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


def _tried(do: Callable[[], Value]) -> tuple[Value | None, Exception | None]:
    try:
        return do(), None
    except Exception as error:  # of any kind, or the others would wait for an answer
        return None, error


def _plain(error: Exception | None) -> type[Exception] | None:
    return None if error is None else next((k for k in PLAIN if isinstance(error, k)), RuntimeError)


def _raise(told: Sequence[tuple[type[Exception] | None, str]], own: Exception | None) -> None:
    """Raise this rank's error, or the first of the others'."""
    if own is not None:
        raise own
    for plain, text in told:
        if plain is not None:
            raise plain(text)


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


# What srun tells each task, and what torchrun would call it.
SRUN = {"SLURM_PROCID": "RANK", "SLURM_STEP_NUM_TASKS": "WORLD_SIZE", "SLURM_LOCALID": "LOCAL_RANK"}


def adopt_srun(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of torchrun from those of srun, for a task of a step with several tasks. WORLD_SIZE and MASTER_PORT, if
    they are set, stay: WORLD_SIZE=1 makes each task a run of its own.

    The master is the first machine of the step; its port is a function of the numbers of job and step.

    Raises:
        ValueError: if a variable of srun is missing or cannot be read.
    """
    if "WORLD_SIZE" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    needed = (*SRUN, "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_JOB_ID")
    if missing := [name for name in needed if name not in environment]:
        raise ValueError(
            f"{missing[0]}: not set, but SLURM_STEP_NUM_TASKS is {environment['SLURM_STEP_NUM_TASKS']}; expected the variables "
            "that srun gives to its tasks"
        )
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    environment.update({ours: environment[theirs] for theirs, ours in SRUN.items()})
    tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    environment["LOCAL_WORLD_SIZE"] = str(tasks[int(environment["SLURM_NODEID"])])
    environment.setdefault("MASTER_ADDR", first_node(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(20_000 + (16 * job + step) % 12_000))


def first_node(nodes: str) -> str:
    """The first machine of a list as Slurm writes it: "n[07-09,12],m1" -> "n07"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST: found {nodes!r}, expected names of machines")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def tasks_per_node(text: str) -> list[int]:
    """Tasks of each machine from Slurm's short form: "4(x2),1" -> [4, 4, 1]."""
    found: list[int] = []
    for part in text.split(","):
        if (one := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)) is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE: found {text!r}, expected a form such as 4(x2),1")
        found += [int(one[1])] * int(one[2] or 1)
    return found


def join(device: torch.device, seconds: int = SECONDS) -> World:
    """Initialize the process group from the environment, once; without WORLD_SIZE, return a world of one.

    seconds: after which a collective of tensors fails because a process does not answer."""
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
    if device.type == "cuda":
        local = device_number(local, torch.cuda.device_count())
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(local)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    if (told := os.environ.get("LOCAL_WORLD_SIZE")) is not None:
        return World(dist.get_rank(), size, local, int(told), control)
    # A launcher that does not say it: sharding within a machine needs to know.
    hosts: list[Any] = [None] * size
    dist.all_gather_object(hosts, socket.gethostname(), group=control)
    return World(dist.get_rank(), size, local, hosts.count(socket.gethostname()), control)


def device_number(local: int, visible: int) -> int:
    """The CUDA device of the process `local` of this machine: the only one where it sees one (`--gpus-per-task=1`).

    Raises ValueError if it sees several, but fewer than processes."""
    if visible == 1:
        return 0
    if local >= visible:
        raise ValueError(
            f"LOCAL_RANK: found {local}, but this process sees {visible} CUDA devices; expected one process a device"
        )
    return local


def leave() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
