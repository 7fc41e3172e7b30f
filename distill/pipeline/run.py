"""Runs a recipe: plans, refuses what does not fit what is there, skips what is finished, continues what is
not."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from distill.files import read_json, write_json, write_text
from distill.pipeline.display import Display
from distill.pipeline.expand import expand
from distill.pipeline.stage import (
    Room,
    Settings,
    Stage,
    differences,
    digest_of,
    identity,
    read_artifact,
    verify_files,
    write_artifact,
)

LOCK, PLAN, CONFIG = ".lock", "plan.json", "config.yaml"


@dataclass
class Planned:
    """A stage, what it depends on, and how far it is: "finished", "extend", "interrupted", "changed" or
    "new"."""

    name: str
    stage: Stage
    config: dict[str, Any]
    folder: Path
    identity: dict[str, Any]
    state: str = "new"
    changes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Digest of the identity."""
        return digest_of(self.identity)


def build_stages(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Stage]:
    """Make and check every stage before anything runs; errors name the stage and the field."""
    stages: dict[str, Stage] = {}
    for name, config in configs.items():
        try:
            stage: Stage = instantiate(dict(config), _recursive_=False, _convert_="all")
            stage.check(stages)
        except Exception as error:
            cause = error.__cause__ if error.__cause__ is not None else error
            raise ValueError(f"stages.{name}.{cause}") from error
        stages[name] = stage
    return stages


def plan(recipe: Mapping[str, Any], run_folder: Path, seed: int) -> list[Planned]:
    """All stages in order with digests and states."""
    configs = expand(recipe)
    stages = build_stages(configs)
    planned: list[Planned] = []
    digests: dict[str, str] = {}
    for name, stage in stages.items():
        config, folder = dict(configs[name]), run_folder / name
        inputs = {role: digests[target] for role, target in stage.inputs().items()}
        content = identity(config, stage.REFERENCES, inputs, seed, stage.fingerprint())
        entry = Planned(name, stage, config, folder, content)
        digests[name] = entry.digest
        _state(entry)
        planned.append(entry)
    return planned


def _state(entry: Planned) -> None:
    """Compare a stage with what lies in its folder."""
    record = read_artifact(entry.folder)
    begun = entry.folder / "identity.json"
    if record is not None:
        found, finished = record["identity"], True
    elif begun.is_file():
        found, finished = read_json(begun), False
    else:
        return
    changes = tuple(differences(found, entry.identity))
    if not changes:
        entry.state = "finished" if finished else "interrupted"
    elif _only_longer(entry.stage, found, entry.identity):
        entry.state = "extend" if finished else "interrupted"
    else:
        entry.state, entry.changes = "changed", changes


def _only_longer(stage: Stage, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the one difference is that the stage's length grew."""

    def without(content: Mapping[str, Any]) -> dict[str, Any]:
        return dict(content) | {
            "config": {k: v for k, v in content["config"].items() if k not in stage.LENGTH}
        }

    if not stage.LENGTH or differences(without(old), without(new)):
        return False
    return all(new["config"][key] >= old["config"].get(key, 0) for key in stage.LENGTH)


def redo(planned: Sequence[Planned], names: Sequence[str]) -> None:
    """Delete the results of the named stages and of everything that depends on them."""
    known = [entry.name for entry in planned]
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"redo: found {wrong}, expected stages of this recipe: {known}")
    gone = set(names)
    for entry in planned:
        if entry.name in gone or gone & set(entry.stage.inputs().values()):
            gone.add(entry.name)
            shutil.rmtree(entry.folder, ignore_errors=True)
            entry.state, entry.changes = "new", ()


def refuse_changes(planned: Sequence[Planned], run_folder: Path) -> None:
    """Raise if finished or begun work does not fit the config: what changed, and the two ways out."""
    extended = [entry.name for entry in planned if entry.state == "extend"]
    changed = [entry for entry in planned if entry.state == "changed"]
    if not changed:
        return
    first = changed[0]
    reason = f" (because {', '.join(extended)} would be trained further)" if extended else ""
    lines = "\n".join(f"  {line}" for line in first.changes[:20])
    raise ValueError(
        f"stages.{first.name}: {first.folder} was made with other settings{reason}:\n{lines}\n"
        f"Either redo={first.name} (makes it and what depends on it again) "
        f"or another name=... (a new run beside {run_folder})."
    )


@contextmanager
def lock(run_folder: Path) -> Iterator[None]:
    """One process a run folder. The kernel releases the lock with the process, however that ends; the file
    tells who holds it."""
    run_folder.mkdir(parents=True, exist_ok=True)
    path = run_folder / LOCK
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            owner = json.loads(handle.read() or "{}")
            age = time.time() - owner.get("since", time.time())
            raise RuntimeError(
                f"{path}: this run is held by process {owner.get('pid')} on {owner.get('host')} "
                f"for {age:.0f} s; "
                "wait for it, stop it, or use another name=..."
            ) from None
        handle.truncate(0)
        handle.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}))
        handle.flush()
        yield


def describe_plan(planned: Sequence[Planned], run_folder: Path) -> str:
    """The table that `plan=true` prints."""
    width = max(len(entry.name) for entry in planned)
    lines = [f"{run_folder}: {len(planned)} stages"]
    for number, entry in enumerate(planned, 1):
        size = ", ".join(
            f"{key} {entry.config[key]}"
            for key in ("steps", "batch_size", "count")
            if isinstance(entry.config.get(key), int)
        )
        inputs = ", ".join(f"{role}={name}" for role, name in entry.stage.inputs().items())
        kind = type(entry.stage).__name__
        lines.append(
            f"  {number}. {entry.name:<{width}}  {entry.state:<11}  {kind:<8}  {size}  {inputs}".rstrip()
        )
        lines += [f"       {line}" for line in entry.changes[:5]]
    return "\n".join(lines)


def run(recipe: Mapping[str, Any], *, name: str, recipe_name: str) -> Path:
    """Run (or continue) a composed recipe in `runs_dir/name`; returns the run folder."""
    run_folder, seed = Path(recipe["runs_dir"]) / name, int(recipe["seed"])
    settings = Settings(**recipe["trainer"])
    loggers = tuple(recipe.get("loggers") or ())
    planned = plan(recipe, run_folder, seed)
    wanted = [recipe["redo"]] if isinstance(recipe.get("redo"), str) else list(recipe.get("redo") or [])
    if recipe.get("plan"):
        print(describe_plan(planned, run_folder))
        return run_folder
    with lock(run_folder):
        redo(planned, wanted)
        refuse_changes(planned, run_folder)
        write_json(
            run_folder / PLAN,
            {"recipe": recipe_name, "seed": seed, "stages": {e.name: e.config for e in planned}},
        )
        folders = {entry.name: entry.folder for entry in planned}
        for number, entry in enumerate(planned, 1):
            display = Display(entry.name, number, len(planned))
            if entry.state == "finished":
                record = read_artifact(entry.folder)
                assert record is not None
                verify_files(entry.folder, record)
                display.line("finished before, skipped")
                continue
            entry.folder.mkdir(parents=True, exist_ok=True)
            (entry.folder / "artifact.json").unlink(missing_ok=True)
            write_text(entry.folder / CONFIG, yaml.safe_dump(entry.config, sort_keys=False))
            write_json(entry.folder / "identity.json", entry.identity)
            inputs = {role: folders[target] for role, target in entry.stage.inputs().items()}
            room = Room(
                entry.name,
                entry.folder,
                inputs,
                seed,
                settings,
                loggers,
                display,
                run_folder,
                recipe_name,
                entry.digest,
            )
            facts = _run_stage(entry, room)
            write_artifact(entry.folder, entry.identity, facts)
    return run_folder


def _run_stage(entry: Planned, room: Room) -> dict[str, Any]:
    """Run a stage; an error from building one of its parts is shown as that part's, with the stage's name."""
    try:
        return entry.stage.run(room)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise ValueError(f"stages.{entry.name}: {cause}") from error


def summary(run_folder: Path) -> str:
    """Where everything lies, for the end of a run."""
    places = {
        "report.md": "table of all models, gates, protocol",
        "metrics.json": "the same numbers for programs",
        "grid.png": "teacher and students from the same noise",
        "export": "the student: distill.load() or distill.sample",
    }
    lines = [
        f"  {run_folder / name}  {what}" for name, what in places.items() if (run_folder / name).exists()
    ]
    return "\n".join([f"{run_folder}: done.", *lines])
