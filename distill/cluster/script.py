"""The text of a job's script: a head of its own, and the part of `slurm/train.sbatch` that is the same in every job."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.cluster.options import Cluster
from distill.terminal import line

COMMON = "# ---- the same in every job ----\n"
# Slurm and bash read these in paths of #SBATCH lines in ways of their own.
SAFE = re.compile(r"[A-Za-z0-9_./@+=,:~-]+")


@dataclass(frozen=True)
class Run:
    """One run of a job: its folder, and the arguments of `distill.train`."""

    name: str
    folder: Path
    arguments: tuple[str, ...]


def script(template: Path, cluster: Cluster, runs: Sequence[Run], logs: Path, told: str) -> str:
    """The text of the script of a job, or of an array with one element a run.

    Args:
        template: `slurm/train.sbatch`.
        logs: folder of the job's output.
        told: the command that wrote it.
    """
    common = template.read_text().partition(COMMON)[2]
    array = len(runs) > 1
    where = [
        f"    {number}) run={_word(run.folder)} arguments=({_words(run.arguments)}) ;;"
        for number, run in enumerate(runs)
    ]
    head = [
        "#!/bin/bash",
        f"# {line(told)}",
        *(f"#SBATCH {option}" for option in options(cluster, runs, logs)),
        "",
        f"requeue={cluster.requeue}",
        f"max_restarts={cluster.max_restarts}",
        f"max_idle={cluster.max_idle}",
        *(["case $SLURM_ARRAY_TASK_ID in", *where, "esac"] if array else [f"run={_word(runs[0].folder)}"]),
        *([] if array else [f"arguments=({_words(runs[0].arguments)})"]),
        *(f"export {name}={_word(value)}" for name, value in (cluster.env or {}).items()),
        *cluster.setup,
        f'command=({_words(tasks(cluster))} "${{arguments[@]}}")',
        f"launch=({_words(launcher(cluster))})",
        "script=$0",
        "",
    ]
    return "\n".join([*head, COMMON + common])


def options(cluster: Cluster, runs: Sequence[Run], logs: Path) -> list[str]:
    """The options of sbatch. Raises ValueError for a path that Slurm would read otherwise."""
    for path in (Path.cwd(), logs):
        if SAFE.fullmatch(str(path)) is None:
            raise ValueError(
                f"{path}: found letters that Slurm reads in a way of its own, expected those of {SAFE.pattern} in the folders "
                "of jobs and runs; use another runs_dir="
            )
    array = len(runs) > 1
    given = {
        "job-name": re.sub(
            r"[^A-Za-z0-9_.-]+", "-", runs[0].name if not array else f"{runs[0].name}-and-{len(runs) - 1}"
        ),
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.tasks,
        "cpus-per-task": cluster.cpus_per_task,
        "gpus-per-node": cluster.gpus_per_node or None,
        **{
            name: getattr(cluster, name)
            for name in ("mem", "time", "partition", "account", "qos", "constraint")
        },
        "signal": f"USR1@{cluster.signal_lead}",
        "open-mode": "append",
        "chdir": Path.cwd(),
        "output": logs / ("%A_%a.log" if array else "%j.log"),
    }
    if array:
        given["array"] = f"0-{len(runs) - 1}" + (f"%{cluster.parallel}" if cluster.parallel else "")
    found = [f"--{name}={shlex.quote(str(value))}" for name, value in given.items() if value is not None]
    return [*found, "--requeue" if cluster.requeue == "scontrol" else "--no-requeue", *cluster.extra]


def launcher(cluster: Cluster) -> list[str]:
    """srun, with one task a process of the run, in a container where there is one."""
    words = ["srun", "--kill-on-bad-exit=1", "--label"]
    box = cluster.container
    if box is None:
        return words
    if box.runner == "pyxis":
        mounts = [f"--container-mounts={','.join(box.mounts)}"] if box.mounts else []
        return [*words, f"--container-image={box.image}", *mounts, f"--container-workdir={Path.cwd()}"]
    binds = [word for mount in box.mounts for word in ("--bind", mount)]
    devices = ["--nv"] if cluster.gpus_per_node else []
    return [*words, "apptainer", "exec", *devices, *binds, "--pwd", str(Path.cwd()), box.image]


def tasks(cluster: Cluster) -> list[str]:
    """The command of each task, without the arguments of the run."""
    python = cluster.python or ("python" if cluster.container else sys.executable)
    return [python, "-m", "distill.train"]


def _word(value: object) -> str:
    text = str(value)
    if "'" in text and re.search(r'["$`\\!]', text) is None:
        return f'"{text}"'  # easier to read than single quotes within single quotes
    return shlex.quote(text)


def _words(values: Sequence[object]) -> str:
    return " ".join(map(_word, values))
