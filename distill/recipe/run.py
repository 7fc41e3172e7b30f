"""Runs a recipe: makes the plan, raises if recorded work does not match it, skips finished stages, continues others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import InstantiationException

from distill.files import await_file, make_folder, read_json, remove, stamp, sync, write_json, write_text
from distill.interrupt import Interrupted, deferred
from distill.interrupt import check as check_signals
from distill.names import check_name
from distill.recipe.plan import Planned, check_split, describe_plan, plan, redo, refuse_changes
from distill.recipe.stopped import Stops, await_note
from distill.stages.artifact import (
    INPUT_FILES,
    SCHEMA,
    input_digests,
    read_artifact,
    verify_files,
    write_artifact,
)
from distill.stages.base import Settings, StageContext
from distill.stages.display import Display
from distill.stages.lock import Held, lock
from distill.stages.ownership import (
    ARTIFACT,
    CONFIG,
    IDENTITY,
    OF_A_RUN,
    PLAN,
    PUBLISHED,
    REDO,
    WEBPAGE,
    check_run_folder,
    empty,
    patterns,
    read_object,
    sweep,
)
from distill.stages.webpage import write_webpage
from distill.terminal import printable
from distill.typed import parse
from distill.world import World, join


def run(recipe: Mapping[str, Any], *, name: str, recipe_name: str) -> Path:
    """Run or continue a composed recipe in `runs_dir/name`.

    All processes call this function and run every stage; only the main process writes.

    Args:
        recipe: the composed config as plain containers (`schema.read`).
        name: of the run.
        recipe_name: recorded in plan.json.

    Returns:
        The run folder.
    """
    run_folder, seed = run_place(recipe, name)
    settings = parse(Settings, recipe["trainer"], "trainer")
    check_run_folder(run_folder)
    if recipe.get("plan"):
        planned = plan(recipe, run_folder, seed)
        redo(planned, recipe.get("redo"))
        sharded = settings.shard != "none" and isinstance(settings.devices, int)
        processes = settings.devices if sharded else 1
        print(describe_plan(planned, run_folder, processes, settings.reduce_each))
        print(refusal(planned, run_folder, settings), end="")
        return run_folder
    world = join(settings.device, settings.timeout)
    with lock(run_folder) if world.main else nullcontext() as held:
        with deferred():  # so that a stop is always noted
            planned, stops = _begin(recipe, recipe_name, run_folder, seed, world)
        try:
            check_signals()
            _run_stages(planned, recipe, recipe_name, seed, settings, world, held)
        except Interrupted as stop:
            if stops is not None:
                stops.note(stop)
            else:
                await_note(run_folder)
            raise
        if world.main:
            write_webpage(run_folder)
            remove(run_folder / REDO)
    return run_folder


def _begin(
    recipe: Mapping[str, Any], recipe_name: str, run_folder: Path, seed: int, world: World
) -> tuple[list[Planned], Stops | None]:
    """Make the plan, refuse what does not fit, and clean the folder. Returns the plan and, on the main process, `Stops`."""
    world.barrier()
    planned = plan(recipe, run_folder, seed, world)  # under the lock: no other run changes the folder
    waiting = world.decided(lambda: pending(run_folder, planned, recipe.get("redo")))
    again = [] if waiting else redo(planned, recipe.get("redo"))
    refuse_changes(planned, run_folder)
    check_split(planned, world.size)
    world.barrier()  # all processes have the plan before files change
    if not world.main:
        return planned, None
    clean(run_folder, planned, again)
    if again:
        write_json(run_folder / REDO, redo_key(planned, recipe.get("redo")))
    stages = {entry.name: entry.config for entry in planned}
    write_json(run_folder / PLAN, {"recipe": recipe_name, "seed": seed, "stages": stages})
    return planned, Stops(run_folder, planned)


def _run_stages(
    planned: Sequence[Planned],
    recipe: Mapping[str, Any],
    recipe_name: str,
    seed: int,
    settings: Settings,
    world: World,
    held: Held | None,
) -> None:
    """Run the stages in order."""
    folders = {entry.name: entry.folder for entry in planned}
    for number, entry in enumerate(planned, 1):
        context = StageContext(
            name=entry.name,
            folder=entry.folder,
            inputs={role: folders[target] for role, target in entry.stage.inputs().items()},
            seed=seed,
            settings=settings,
            loggers=tuple(recipe.get("loggers") or ()),
            callbacks=tuple(recipe.get("callbacks") or ()),
            display=Display(entry.name, number, len(planned), not world.main, settings.progress),
            run_folder=entry.folder.parent,
            recipe=recipe_name,
            digest=entry.digest,
            world=world,
            identity=entry.identity,
        )
        _advance(entry, context, held)


def refusal(planned: Sequence[Planned], run_folder: Path, settings: Settings) -> str:
    """Return the error that this command raises without `plan=true`; empty if it runs."""
    try:
        refuse_changes(planned, run_folder)
        check_split(planned, settings.devices if isinstance(settings.devices, int) else 1)
    except ValueError as error:
        return printable(f"\nWithout plan=true this command fails:\n{error}\n")
    return ""


def redo_key(planned: Sequence[Planned], named: Any) -> dict[str, Any]:
    """Return what identifies a redo: its argument and the digests of all stages."""
    return {"redo": named, "digests": {entry.name: entry.digest for entry in planned}}


def pending(run_folder: Path, planned: Sequence[Planned], named: Any) -> bool:
    """Return whether the same redo was interrupted; then this command continues it."""
    return bool(named) and read_object(run_folder / REDO) == redo_key(planned, named)


def run_place(recipe: Mapping[str, Any], name: str) -> tuple[Path, int]:
    """Return (run folder, seed) of a composed recipe."""
    seed, runs_dir = recipe["seed"], recipe["runs_dir"]
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed: found {seed!r}, expected an integer")
    if not isinstance(runs_dir, str):
        raise ValueError(f"runs_dir: found {runs_dir!r}, expected a folder")
    return Path(runs_dir) / check_name(name, "name", reserved=OF_A_RUN), seed


def check(recipe: Mapping[str, Any], *, name: str, processes: int) -> None:
    """Raise the errors that `run` raises before its first stage. Writes nothing but the run folder's mark and lock."""
    run_folder = check_plan(recipe, name=name, processes=processes)
    with lock(run_folder):  # raises if another process holds it
        pass


def check_plan(recipe: Mapping[str, Any], *, name: str, processes: int) -> Path:
    """`check` without the lock, so that nothing is written; returns the run folder."""
    parse(Settings, recipe["trainer"], "trainer")
    run_folder, seed = run_place(recipe, name)
    check_run_folder(run_folder)
    planned = plan(recipe, run_folder, seed)
    if not pending(run_folder, planned, recipe.get("redo")):
        redo(planned, recipe.get("redo"))
    refuse_changes(planned, run_folder)
    check_split(planned, processes)
    return run_folder


def clean(run_folder: Path, planned: Sequence[Planned], again: Sequence[Planned]) -> None:
    """Delete files of the stages in `again`, copies at the top of the run folder, and temporary files of killed processes."""
    for entry in again:
        empty(entry.folder, entry.files)
    for name in (*PUBLISHED, WEBPAGE) if again else ():
        remove(run_folder / name)
    sweep(run_folder, patterns(*OF_A_RUN))
    for entry in planned:
        sweep(entry.folder, entry.files)


def _advance(entry: Planned, context: StageContext, held: Held | None) -> None:
    """Check and skip a finished stage; run any other stage and write its record. `held`: the lock, on the main process."""
    world = context.world
    if entry.state == "finished":
        if world.main:
            _check_finished(entry, context)
            entry.stage.publish(context)
        context.display.line("already finished, skipped")
        return
    watched: AbstractContextManager[None] = nullcontext()
    if world.main:
        made_of = input_digests(context.inputs)
        if entry.state != "new":
            record = read_artifact(entry.folder) or read_json(entry.folder / IDENTITY)
            _check_inputs(entry, record.get(INPUT_FILES), made_of)
        make_folder(entry.folder)
        if entry.state == "new":
            empty(entry.folder, entry.files)  # left by a stage that was changed or interrupted
        remove(entry.folder / ARTIFACT)
        sync(entry.folder)
        write_json(entry.folder / IDENTITY, entry.identity | {INPUT_FILES: made_of})
        write_text(entry.folder / CONFIG, yaml.safe_dump(entry.config, sort_keys=False))
        assert held is not None
        watched = held.also(entry.folder / IDENTITY)
    world.barrier()
    with watched:
        facts = _run_stage(entry, context)
        world.barrier()
        if world.main:
            _record(entry, facts, made_of)
            entry.stage.publish(context)
    if world.size > 1:  # the next stage reads it on every process
        record = entry.folder / ARTIFACT
        await_file(record, world.decided(lambda: stamp(record)))


def _record(entry: Planned, facts: Mapping[str, Any], made_of: Mapping[str, str]) -> None:
    """Write the record of a finished stage."""
    stage = entry.stage
    needed = stage.needed(entry.identity["config"])
    write_artifact(entry.folder, entry.identity, facts, stage.made(), needed, made_of)


def _check_finished(entry: Planned, context: StageContext) -> None:
    """Raise if files of a finished stage, or its inputs, have changed. Records of schema 1 are rewritten as schema 2."""
    record = read_artifact(entry.folder, type(entry.stage))
    assert record is not None
    try:
        verify_files(entry.folder, record)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"stages.{entry.name}: {error}; redo={entry.name} makes it and the stages that depend on it again"
        ) from error
    made_of = input_digests(context.inputs)
    _check_inputs(entry, record.get(INPUT_FILES), made_of)
    if record["schema"] != SCHEMA:
        _record(entry, record["facts"], made_of)


def _check_inputs(entry: Planned, recorded: Mapping[str, str] | None, found: Mapping[str, str]) -> None:
    """Raise ValueError unless the recorded digests of a stage's inputs equal those of the current files."""
    for role, digest in found.items():
        if recorded is not None and recorded.get(role) != digest:
            raise ValueError(
                f"stages.{entry.name}: {entry.folder} was made from other files of {role!r} than stage "
                f"{entry.stage.inputs()[role]!r} has now; redo={entry.name} makes it and the stages that depend on it again"
            )


def _run_stage(entry: Planned, context: StageContext) -> dict[str, Any]:
    """Run a stage. Errors are raised with the name of the stage; errors of Hydra are replaced by their cause."""
    try:
        return entry.stage.run(context)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise ValueError(f"stages.{entry.name}: {cause}") from error
    except (ValueError, OSError, RuntimeError, ImportError, FloatingPointError) as error:
        raise ValueError(f"stages.{entry.name}: {error}") from error


def summary(run_folder: Path) -> str:
    """Return the message at the end of a run: the paths of its results and the quality gates that were missed."""
    places = {
        "report.html": "samples, table, gates, curves and costs: open it in a browser",
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
