"""The schema of the group `cluster`: what a job asks Slurm for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

# Slurm may send the warning this much earlier than asked for (its manual: within 60 s).
EARLY = 60
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
LINE = re.compile(r"[\x20-\x7e\u00a0-\uffff]*")


@dataclass(frozen=True)
class Container:
    """An image that the tasks run in.

    Attributes:
        image: as the runner takes it. mounts: "outside:inside". runner: "pyxis" (options of srun) or "apptainer".
    """

    image: str
    mounts: tuple[str, ...] = ()
    runner: Literal["pyxis", "apptainer"] = "pyxis"


@dataclass(frozen=True)
class Cluster:
    """What a job asks for. None: the option is not given to Slurm.

    Attributes:
        nodes: machines. tasks_per_node: processes on each; null: one a GPU, or one without GPUs.
        signal_lead: seconds before the end of its time, or its preemption, at which the job is warned: it saves and is queued
            again.
        requeue: how: "scontrol" (`scontrol requeue`, the job keeps its number), "sbatch" (another job after this one, where
            requeueing is forbidden) or "none".
        max_restarts: of one job. max_idle: restarts in a row without a new checkpoint, shard or finished stage.
        python: the interpreter; null: that of this command, or `python` in a container.
        setup: lines of bash before the run. env: variables. extra: further options of sbatch, such as "--exclusive".
        parallel: elements of an array that run at once; null: as many as Slurm gives.
    """

    nodes: int = 1
    tasks_per_node: int | None = None
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    mem: str | int | None = None
    time: str | int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    signal_lead: int = 300
    requeue: Literal["scontrol", "sbatch", "none"] = "scontrol"
    max_restarts: int = 100
    max_idle: int = 2
    parallel: int | None = None
    python: str | None = None
    setup: tuple[str, ...] = ()
    container: Container | None = None
    env: dict[str, str] | None = None
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        least = {
            "nodes": 1,
            "tasks_per_node": 1,
            "cpus_per_task": 1,
            "parallel": 1,
            "signal_lead": 1,
            "max_idle": 1,
        }
        for name, bound in (least | {"gpus_per_node": 0, "max_restarts": 0}).items():
            if (value := getattr(self, name)) is not None and value < bound:
                raise ValueError(f"{name}: found {value}, expected at least {bound}")
        if self.gpus_per_node and self.tasks not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node: found {self.tasks_per_node} with gpus_per_node: {self.gpus_per_node}; expected one task a GPU"
            )
        if self.time is not None and (limit := seconds(str(self.time))) <= self.signal_lead + EARLY:
            raise ValueError(
                f"signal_lead: found {self.signal_lead} s with time: {self.time}; expected less than {limit - EARLY} s, since "
                f"the warning may come {EARLY} s early"
            )
        for name in ("mem", "partition", "account", "qos", "constraint", "python"):
            _one_line(name, str(getattr(self, name) or ""))
        for option in self.extra:
            if not option.startswith("-"):
                raise ValueError(f"extra: found {option!r}, expected options of sbatch such as '--exclusive'")
            _one_line("extra", option)
        for line in self.setup:
            _one_line("setup", line)
        for name, text in (self.env or {}).items():
            if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
                raise ValueError(f"env: found {name!r}, expected a name of letters, digits and _")
            _one_line(f"env.{name}", text)

    @property
    def tasks(self) -> int:
        """Processes on each machine."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def processes(self) -> int:
        """Processes of the run."""
        return self.nodes * self.tasks


def seconds(time: str) -> int:
    """Seconds of a limit as Slurm takes it: "M", "M:S", "H:M:S", "D-H", "D-H:M", "D-H:M:S"."""
    if (found := TIME.fullmatch(time)) is None:
        raise ValueError(
            f"time: found {time!r}, expected a limit such as 30 (minutes), 12:00:00 or 2-00:00:00"
        )
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None:
        return 86_400 * days + 3600 * (first or 0) + 60 * (second or 0) + (third or 0)
    if third is not None:
        return 3600 * (first or 0) + 60 * (second or 0) + third
    return 60 * (first or 0) + (second or 0)


def _one_line(name: str, text: str) -> None:
    if LINE.fullmatch(text) is None:
        raise ValueError(f"{name}: found {text!r}, expected one line without control characters")
