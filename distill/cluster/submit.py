"""Composes the runs of a command line as `distill.train` would, checks them, and queues their job."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from distill.cluster.options import Cluster
from distill.cluster.script import Run, script
from distill.files import make_folder, write_json, write_text
from distill.recipe import compose, schema
from distill.recipe.arguments import MULTIRUN
from distill.recipe.run import check, check_plan, run_place
from distill.stages.ownership import JOBS, take_run_folder
from distill.typed import parse

TEMPLATE = compose.CONFIGS.parent / "slurm" / "train.sbatch"
OURS = ("cluster", "dry")


@dataclass(frozen=True)
class Asked:
    """The parts of a command line: overrides of the runs, of the cluster, further folders of configs, a sweep, a trial."""

    runs: tuple[str, ...]
    cluster: tuple[str, ...]
    folders: tuple[str, ...] = ()
    sweep: bool = False
    dry: bool = False


def asked(given: Sequence[str]) -> Asked:
    """Sort the arguments of a command line, as `compose.arguments` left them.

    Raises:
        ValueError: for a flag that only `distill.train` has, or a wrong `dry`.
    """
    runs, cluster, folders, sweep, dry = [], [], [], False, False
    rest = list(given)
    while rest:
        argument = rest.pop(0)
        key, _, value = argument.partition("=")
        if argument in MULTIRUN:
            sweep = True
        elif key in ("--config-dir", "-cd"):
            if not value and not rest:
                raise ValueError(f"{key}: expected a folder")
            folders.append(str(Path(value or rest.pop(0)).absolute()))
        elif argument.startswith("-"):
            raise ValueError(f"{argument}: no such flag; expected -m, --config-dir FOLDER, or key=value")
        elif key == "dry":
            dry = parse(bool, {"true": True, "false": False}.get(value.lower(), value), "dry")
        elif key.lstrip("+").partition(".")[0] == "cluster":
            cluster.append(argument)
        else:
            runs.append(argument)
    return Asked(tuple(runs), tuple(cluster), tuple(folders), sweep, dry)


def cluster_of(wanted: Asked) -> Cluster:
    """The composed group `cluster`. Raises ValueError where none is chosen."""
    chosen = [o.partition("=")[2] for o in wanted.cluster if o.startswith("cluster=")]
    if not chosen:
        names = ", ".join(sorted(path.stem for path in (compose.CONFIGS / "cluster").glob("*.yaml")))
        raise ValueError(
            f"cluster: missing; type cluster=NAME with one of {names}, or of your own folder with --config-dir"
        )
    others = [o for o in wanted.cluster if not o.startswith("cluster=")]
    with initialize_config_dir(str(compose.CONFIGS), version_base="1.3"):
        # The group alone: its config stands below its own name.
        cfg = hydra_compose(overrides=[f"+cluster={chosen[-1]}", *_search(wanted), *others])
    found = OmegaConf.to_container(cfg.cluster, resolve=True)
    return parse(Cluster, found, "cluster")


def runs_of(wanted: Asked, processes: int) -> list[Run]:
    """The runs of a command line, each composed and checked like `distill.train` does before its first stage."""
    runs: list[Run] = []
    for overrides in _elements(wanted):
        mode = ["hydra.mode=MULTIRUN"] if wanted.sweep else []
        with initialize_config_dir(str(compose.CONFIGS), version_base="1.3"):
            whole = hydra_compose("config", [*overrides, *_search(wanted), *mode], return_hydra_config=True)
        hydra_config = whole.hydra
        with open_dict(whole):
            del whole["hydra"]
        with schema.typed_places(whole):
            recipe = compose.chosen_recipe(hydra_config.runtime.choices)
            plain = schema.read(whole, overrides)
            given = [*wanted.runs, *(["-m"] if wanted.sweep else [])]
            hydra_config.overrides.task = list(overrides)
            name = compose.run_name(plain["name"], recipe, hydra_config, given)
            _refuse(plain)
            (check_plan if wanted.dry else check)(plain, name=name, processes=processes)
        folder = run_place(plain, name)[0].absolute()
        if folder in [run.folder for run in runs]:
            raise ValueError(
                f"name: two elements of the sweep have the run folder {folder}; sweep other options"
            )
        searched = (part for path in wanted.folders for part in ("--config-dir", path))
        runs.append(Run(name, folder, (*searched, *compose.task_arguments(overrides, name))))
    return runs


def _refuse(plain: dict[str, Any]) -> None:
    """Raise ValueError for options of a run that a job cannot have."""
    if plain["plan"]:
        raise ValueError("plan: found true, but a job must not only print its plan; expected dry=true")
    if (devices := plain["trainer"]["devices"]) != 1:
        raise ValueError(
            f"trainer.devices: found {devices}, but in a job srun starts the processes; expected "
            f"cluster.tasks_per_node={devices}"
        )
    if plain["trainer"]["fast_dev_run"]:
        raise ValueError(
            "trainer.fast_dev_run: found in a job, which would end with nothing made; expected 0"
        )


def _elements(wanted: Asked) -> list[list[str]]:
    """The overrides of each run: of a sweep, one list for each combination of values."""
    if not wanted.sweep:
        return [list(wanted.runs)]
    parsed = OverridesParser.create().parse_overrides(list(wanted.runs))
    batches: list[list[list[str]]] = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [element for batch in batches for element in batch]


def _search(wanted: Asked) -> list[str]:
    """Further folders of configs, as Hydra searches them."""
    paths = ",".join(f"file://{folder}" for folder in wanted.folders)
    return [f"hydra.searchpath=[{paths}]"] if paths else []


def submit(given: Sequence[str]) -> str:
    """Queue the job of a command line; returns what to print. With `dry=true` only its script, and nothing is written."""
    compose.register_recipes()
    wanted = asked(given)
    cluster = cluster_of(wanted)
    runs = runs_of(wanted, cluster.processes)
    first = runs[0].folder
    logs = first / JOBS if len(runs) == 1 else first.parent / ".sweep" / JOBS
    command = " ".join(["python -m distill.submit", *given])
    text = script(TEMPLATE, cluster, runs, logs, command)
    if wanted.dry:
        return text
    for run in runs:
        take_run_folder(run.folder)
    make_folder(logs)
    job = _sbatch(text)
    for number, run in enumerate(runs):
        _record(run, job, number if len(runs) > 1 else None, text, logs, command)
    return "\n".join(
        [f"job {job}: {len(runs)} runs" if len(runs) > 1 else f"job {job}", *_told(job, runs, logs), ""]
    )


def _told(job: str, runs: Sequence[Run], logs: Path) -> Iterable[str]:
    for number, run in enumerate(runs):
        log = logs / (f"{job}.log" if len(runs) == 1 else f"{job}_{number}.log")
        yield f"  {run.folder}  log: {log}"


def _sbatch(text: str) -> str:
    """Queue a script; returns the number of its job."""
    try:
        found = subprocess.run(
            ["sbatch", "--parsable"], input=text, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise FileNotFoundError(
            "sbatch: not found; submit on a machine of the cluster, or print the script with dry=true"
        ) from None
    if found.returncode:
        raise ValueError(f"sbatch: {(found.stderr or found.stdout).strip()}")
    return found.stdout.strip().partition(";")[0]


def _record(run: Run, job: str, element: int | None, text: str, logs: Path, command: str) -> None:
    """What the job was made of, in `jobs/<id>` of the run."""
    number = job if element is None else f"{job}_{element}"
    folder = run.folder / JOBS / number
    write_text(folder / "train.sbatch", text)
    write_text(folder / "packages.txt", "\n".join(packages()) + "\n")
    for name, content in revision().items():
        write_text(folder / name, content)
    facts: dict[str, Any] = {
        "job": number,
        "run": run.name,
        "arguments": list(run.arguments),
        "command": command,
    }
    facts |= {"log": str(logs / f"{number}.log"), "python": sys.version.split()[0], "submitted": time.time()}
    write_json(folder / "job.json", facts)


def packages() -> list[str]:
    """name==version of the installed packages."""
    found = {f"{each.metadata['Name']}=={each.version}" for each in importlib.metadata.distributions()}
    return sorted(found, key=str.lower)


def revision() -> dict[str, str]:
    """file -> text: the git revision of the code and its changes; nothing for code outside a repository."""
    found: dict[str, str] = {}
    with suppress(OSError, subprocess.CalledProcessError):
        for name, arguments in {
            "revision.txt": ("rev-parse", "HEAD"),
            "changes.diff": ("diff", "HEAD"),
        }.items():
            found[name] = subprocess.run(
                ["git", "-C", str(compose.PACKAGE), *arguments], capture_output=True, text=True, check=True
            ).stdout
    return found
