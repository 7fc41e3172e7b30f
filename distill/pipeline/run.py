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
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import InstantiationException

from distill.files import TEMPORARY_SUFFIX, read_json, write_json, write_text
from distill.pipeline.display import Display
from distill.pipeline.evaluate import PUBLISHED
from distill.pipeline.plan import IDENTITY, Planned, check_split, describe_plan, plan, redo, refuse_changes
from distill.pipeline.stage import (
    ARTIFACT,
    Room,
    Settings,
    read_artifact,
    verify_files,
    write_artifact,
)
from distill.world import join

LOCK, PLAN, CONFIG, REDO = ".lock", "plan.json", "config.yaml", "redo.json"


@contextmanager
def lock(run_folder: Path) -> Iterator[None]:
    """One process a run folder. The kernel releases the lock with the process, however that ends; the file
    tells who holds it."""
    run_folder.mkdir(parents=True, exist_ok=True)
    path = run_folder / LOCK
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
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


def run(recipe: Mapping[str, Any], *, name: str, recipe_name: str) -> Path:
    """Run (or continue) a composed recipe in `runs_dir/name`; returns the run folder. Several processes call it
    together: all run every stage, the main one writes."""
    run_folder, seed = run_place(recipe, name)
    settings = Settings(**recipe["trainer"])
    if recipe.get("plan"):
        planned = plan(recipe, run_folder, seed)
        redo(planned, recipe.get("redo"))
        print(describe_plan(planned, run_folder))
        return run_folder
    world = join(settings.device)
    with lock(run_folder) if world.main else nullcontext():
        world.barrier()
        planned = plan(recipe, run_folder, seed)  # under the lock: nobody changes what it looks at
        again = [] if pending(run_folder, planned, recipe.get("redo")) else redo(planned, recipe.get("redo"))
        refuse_changes(planned, run_folder)
        check_split(planned, world.size)
        world.barrier()  # all have looked before anything changes
        if world.main:
            clean(run_folder, again)
            if again:
                write_json(run_folder / REDO, redo_key(planned, recipe.get("redo")))
            stages = {entry.name: entry.config for entry in planned}
            write_json(run_folder / PLAN, {"recipe": recipe_name, "seed": seed, "stages": stages})
        folders = {entry.name: entry.folder for entry in planned}
        for number, entry in enumerate(planned, 1):
            room = Room(
                name=entry.name,
                folder=entry.folder,
                inputs={role: folders[target] for role, target in entry.stage.inputs().items()},
                seed=seed,
                settings=settings,
                loggers=tuple(recipe.get("loggers") or ()),
                display=Display(entry.name, number, len(planned), silent=not world.main),
                run_folder=run_folder,
                recipe=recipe_name,
                digest=entry.digest,
                world=world,
            )
            _advance(entry, room)
        if world.main:
            (run_folder / REDO).unlink(missing_ok=True)
    return run_folder


def redo_key(planned: Sequence[Planned], named: Any) -> dict[str, Any]:
    """What a redo is known by: its stages and what they are to become."""
    return {"redo": named, "digests": {entry.name: entry.digest for entry in planned}}


def pending(run_folder: Path, planned: Sequence[Planned], named: Any) -> bool:
    """Whether this very redo was begun and interrupted: then the same command continues it."""
    path = run_folder / REDO
    return bool(named) and path.is_file() and read_json(path) == redo_key(planned, named)


def run_place(recipe: Mapping[str, Any], name: str) -> tuple[Path, int]:
    """(run folder, seed) of a composed recipe."""
    seed, runs_dir = recipe["seed"], recipe["runs_dir"]
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed: found {seed!r}, expected an integer")
    if not isinstance(runs_dir, str):
        raise ValueError(f"runs_dir: found {runs_dir!r}, expected a folder")
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(f"name: found {name!r}, expected the name of one folder below runs_dir")
    return Path(runs_dir) / name, seed


def check(recipe: Mapping[str, Any], *, name: str, processes: int) -> None:
    """Raise what `run` would raise before its first stage; changes nothing."""
    Settings(**recipe["trainer"])
    run_folder, seed = run_place(recipe, name)
    planned = plan(recipe, run_folder, seed)
    if not pending(run_folder, planned, recipe.get("redo")):
        redo(planned, recipe.get("redo"))
    refuse_changes(planned, run_folder)
    check_split(planned, processes)
    with lock(run_folder):  # held by nobody else
        pass


def clean(run_folder: Path, stages: Sequence[Path]) -> None:
    """Empty the stages that are made again, with what they published, and sweep what killed writers left behind."""
    for folder in stages:
        empty(folder)
    for name in PUBLISHED if stages else ():
        (run_folder / name).unlink(missing_ok=True)
    for left in run_folder.rglob(f".*{TEMPORARY_SUFFIX}"):
        left.unlink(missing_ok=True)


def empty(folder: Path) -> None:
    """Delete everything in a stage folder, wherever it lies. An error stops the run: what stays would be taken for new."""
    for child in folder.iterdir() if folder.is_dir() else ():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _advance(entry: Planned, room: Room) -> None:
    """Skip a finished stage after checking its files; run any other and record it."""
    world = room.world
    if entry.state == "finished":
        record = read_artifact(entry.folder)
        assert record is not None
        if world.main:
            verify_files(entry.folder, record)
            entry.stage.publish(room)
        room.display.line("finished before, skipped")
        return
    if world.main:
        entry.folder.mkdir(parents=True, exist_ok=True)
        if entry.state == "new":
            empty(entry.folder)  # whatever lies there belongs to no stage that is known
        (entry.folder / ARTIFACT).unlink(missing_ok=True)
        write_text(entry.folder / CONFIG, yaml.safe_dump(entry.config, sort_keys=False))
        write_json(entry.folder / IDENTITY, entry.identity)
    world.barrier()
    facts = _run_stage(entry, room)
    world.barrier()
    if world.main:
        write_artifact(entry.folder, entry.identity, facts)
        entry.stage.publish(room)
    world.barrier()  # the next stage reads it on every process


def _run_stage(entry: Planned, room: Room) -> dict[str, Any]:
    """Run a stage; an error from building one of its parts is shown as that part's, with the stage's name."""
    try:
        return entry.stage.run(room)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise ValueError(f"stages.{entry.name}: {cause}") from error
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        raise ValueError(f"stages.{entry.name}: {error}") from error


def summary(run_folder: Path) -> str:
    """Where everything lies and which gates were missed, for the end of a run."""
    places = {
        "report.md": "table of all models, gates, protocol",
        "metrics.json": "the same numbers for programs",
        "grid.png": "teacher and students from the same noise",
        "export": "the student: distill.load() or distill.sample",
    }
    lines = [
        f"  {run_folder / name}  {what}" for name, what in places.items() if (run_folder / name).exists()
    ]
    metrics = run_folder / "metrics.json"
    gates = read_json(metrics)["gates"] if metrics.is_file() else []
    missed = [gate["name"] for gate in gates if not gate["passed"]]
    if gates:
        lines.append(f"  {len(gates) - len(missed)} of {len(gates)} quality gates passed")
    lines += [f"  MISSED: {name}" for name in missed]
    return "\n".join([f"{run_folder}: done.", *lines])
