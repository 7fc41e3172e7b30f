"""The plan of a run: all stages with their digests and states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class

from distill.engine.memory import Memory
from distill.files import read_json
from distill.recipe.expand import expand
from distill.recipe.references import stage_class, stage_fields
from distill.stages.artifact import (
    EXTENDED,
    FIRST_METERS,
    FIRST_NAMES,
    INPUT_FILES,
    Identity,
    NewerSchema,
    differences,
    digest_of,
    files_digest,
    identity,
    lasting_identity,
    read_artifact,
)
from distill.stages.base import Stage
from distill.stages.made import Made
from distill.stages.ownership import (
    EMPTIED,
    IDENTITY,
    check_names,
    check_stage_folder,
    recorded_identity,
)
from distill.stages.renamed import moved_option, with_name_of_now
from distill.stages.targets import check_targets
from distill.terminal import printable
from distill.typed import parse, within
from distill.world import World


@dataclass
class Planned:
    """A stage of the plan.

    Attributes:
        name: of the stage. stage: its object. config: its config. folder: where it writes.
        identity: everything that its result depends on (`stages.artifact.identity`).
        state: "new", "interrupted", "finished", "extend" (finished with fewer steps) or "changed" (the folder has work of
            another identity).
        changes: differences to the recorded identity, as "key: old -> new".
        broken: why the recorded work cannot be used, if the reason is not a changed config.
        made: digest of the stage's files, if it is finished.
        memory: of its networks, for stages that predict it.
    """

    name: str
    stage: Stage
    config: dict[str, Any]
    folder: Path
    identity: dict[str, Any]
    state: str = "new"
    changes: tuple[str, ...] = ()
    broken: str = ""
    made: str | None = None
    memory: Memory | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Patterns of the files of this stage, and of the stage recorded in its folder."""
        config = recorded_identity(self.folder).get("config")
        target = str(config.get("_target_")) if isinstance(config, Mapping) else ""
        before: Any = None
        now = {first: name for name, first in FIRST_NAMES.items()}.get(target, target)
        now = "distill.stages.evaluate.Evaluate" if target in FIRST_METERS.values() else now
        if now.startswith("distill.stages."):  # a file must not import other code
            with suppress(ImportError, ValueError):
                before = get_class(now)
        made = before.made() if isinstance(before, type) and issubclass(before, Stage) else ()
        return tuple(dict.fromkeys([*self.stage.made(), *made]))

    @property
    def digest(self) -> str:
        """The digest of the identity."""
        return digest_of(self.identity)


def build_stages(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Stage]:
    """Build and check every stage before any runs. Raises ValueError naming the stage and the field."""
    stages: dict[str, Stage] = {}
    for name, config in configs.items():
        where = f"stages.{name}"
        kind = stage_class(config, where)
        fields = {key: value for key, value in config.items() if key != "_target_"}
        later = ("method", "optim")  # `stage.check` has better messages for these
        try:
            for key, value in fields.items():
                options = stage_fields(config)
                if key not in options and (moved := moved_option(key, options)) is not None:
                    raise ValueError(f"{where}.{key}: is now {where}.{moved}")
                if key not in later:
                    check_targets(value, f"{where}.{key}")
            stage = parse(kind, fields, where)
        except (InstantiationException, KeyError, OSError, ImportError) as error:
            raise ValueError(f"{where}.{error.__cause__ or error}") from error
        try:
            stage.check(stages)
            check_targets(config.get("method"), "method")
        except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
            raise ValueError(within(where, error)) from error
        stages[name] = stage
    return stages


def dry_run(stages: Mapping[str, Stage]) -> dict[str, Made]:
    """Dry-run every stage on the outputs that the stages before it will have, to report errors before training; returns what
    each makes.

    Raises ValueError naming the stage and the field."""
    made: dict[str, Made] = {}
    for name, stage in stages.items():
        try:
            with torch.random.fork_rng(devices=[]):  # initialising networks must not change the random state
                made[name] = stage.dry_run(made)
        except InstantiationException as error:
            raise ValueError(f"stages.{name}: {error.__cause__ or error}") from error
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            raise ValueError(within(f"stages.{name}", error, ": ")) from error
    return made


def plan(recipe: Mapping[str, Any], run_folder: Path, seed: int, world: World | None = None) -> list[Planned]:
    """Return the plan of a run: all stages in order with digests and states. Of several processes the main one looks at the
    run folder, since a network file system may show it differently on another machine."""
    world = world or World()
    configs = expand(recipe)
    check_names(list(configs))
    for name, config in configs.items():
        path = config.get("path")
        if path is not None and Path(path).resolve().is_relative_to(run_folder.resolve()):
            raise ValueError(
                f"stages.{name}.path: {path} is in this run's folder, which the run overwrites; expected a path in another run"
            )
    if any(value is not None for value in (recipe.get("profile") or {}).values()):
        build_stages(expand({**recipe, "profile": None}))  # also check the values that the profile limits
    stages = build_stages(configs)
    made = dry_run(stages)
    planned: list[Planned] = []
    digests: dict[str, str] = {}
    for name, stage in stages.items():
        config, folder = dict(configs[name]), run_folder / name
        inputs = {role: digests[target] for role, target in stage.inputs().items()}
        try:
            hashed = {key: value for key, value in config.items() if key not in stage.BY_CONTENT}
            content = identity(hashed, stage.REFERENCES, inputs, seed, stage.fingerprint())
        except InstantiationException as error:
            raise ValueError(f"stages.{name}: {error.__cause__ or error}") from error
        except (ValueError, OSError) as error:
            raise ValueError(within(f"stages.{name}", error, ": ")) from error
        entry = Planned(name, stage, config, folder, content, memory=made[name].memory)
        vars(entry).update(world.decided(partial(_found, entry, planned)))
        digests[name] = entry.digest
        planned.append(entry)
    return planned


def _found(entry: Planned, before: Sequence[Planned]) -> dict[str, Any]:
    """The fields of a stage that the records in its folder decide."""
    _state(entry, {other.name: other for other in before})
    return {name: getattr(entry, name) for name in ("identity", "state", "changes", "broken", "made")}


def _state(entry: Planned, before: Mapping[str, Planned]) -> None:
    """Set the state of a stage from the records in its folder. `before`: the earlier stages by name."""
    check_stage_folder(entry.folder, entry.stage.made())
    begun = entry.folder / IDENTITY
    try:
        record = read_artifact(entry.folder, type(entry.stage))
        found = record["identity"] if record is not None else read_json(begun) if begun.is_file() else {}
        if found and EMPTIED not in found:
            parse(Identity, found, f"{begun}: ")
    except NewerSchema:
        raise
    except ValueError as error:
        entry.state, entry.broken = "changed", str(error)
        return
    if record is not None:
        inputs, finished = record.get(INPUT_FILES), True
        entry.made = files_digest(record)
    elif found and EMPTIED not in found and entry.stage.begun(entry.folder):
        inputs, finished = found.pop(INPUT_FILES, None), False
        if inputs is None:
            entry.state = "changed"
            entry.broken = f"{begun}: {INPUT_FILES}: missing, expected the digests of the stage's inputs: the file was changed"
            return
    else:
        return
    swapped = tuple(
        f"inputs.{role}: {inputs.get(role)} -> {other}"
        for role, target in entry.stage.inputs().items()
        # None: the input is made in this run, and compared then
        if inputs is not None and (other := before[target].made) not in (None, inputs.get(role))
    )
    _compare(entry, found, "finished" if finished else "interrupted", swapped)


def _named(entry: Planned, changes: Sequence[str]) -> tuple[str, ...]:
    """Differences of identities with the names that the method's options have now."""
    return tuple(with_name_of_now(line, entry.config.get("method") or {}) for line in changes)


def _compare(entry: Planned, found: Mapping[str, Any], same: str, swapped: tuple[str, ...]) -> None:
    """Set the state of a stage from the recorded identity `found`.

    A stage that was trained further keeps the entry `extended` in its identity: its weights differ from those of a stage
    trained to the same length at once.

    Args:
        entry: changed in place.
        found: the recorded identity.
        same: the state if `found` equals the current identity.
        swapped: inputs whose files have changed.
    """
    stage, kept = entry.stage, {EXTENDED: found[EXTENDED]} if EXTENDED in found else {}
    if not differences(found, entry.identity | kept):
        entry.state, entry.changes = "changed" if swapped else same, swapped
        entry.identity = entry.identity | kept
        return
    old, new = found["config"].get(stage.LENGTH), entry.identity["config"].get(stage.LENGTH)
    if swapped or not (isinstance(old, int) and isinstance(new, int) and new > old):
        wanted = entry.identity if old == new else entry.identity | kept
        entry.state, entry.changes = "changed", _named(entry, differences(found, wanted))
        return
    if changes := differences(lasting_identity(stage, found), lasting_identity(stage, entry.identity)):
        raw = differences(_plain(found), entry.identity)
        lines = [line if line in raw else f"{line} ({_STRETCHED})" for line in changes]
        entry.state, entry.changes = "changed", _named(entry, lines)
        return
    if not stage.begun(entry.folder):
        raise FileNotFoundError(
            f"stages.{entry.name}: {entry.folder} cannot be trained further: its last checkpoint is missing; "
            f"redo={entry.name} trains it from the start"
        )
    try:
        seams = stage.seams(entry.folder, found)
    except ValueError as error:
        raise ValueError(
            f"stages.{entry.name}: cannot be trained further: {error}; redo={entry.name} trains it from the start"
        ) from error
    entry.state = "extend" if same == "finished" else same
    entry.changes = (f"{stage.LENGTH}: {old} -> {new}, trained further from {seams[-1]['reached']}",)
    entry.identity = entry.identity | {EXTENDED: seams}


_STRETCHED = (
    "computed from the stage's steps: set this option to its old value to train further, or redo the stage"
)


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without the entry `extended`."""
    return {key: value for key, value in content.items() if key != EXTENDED}


def redo(planned: Sequence[Planned], named: str | Sequence[str] | None) -> list[Planned]:
    """Set the named stages and all stages that depend on them to "new"; returns these stages."""
    if not (
        named is None
        or isinstance(named, str)
        or (isinstance(named, Sequence) and all(isinstance(n, str) for n in named))
    ):
        raise ValueError(f"redo: found {named!r}, expected a stage or a list of stages")
    names = [named] if isinstance(named, str) else list(named or ())
    known = [entry.name for entry in planned]
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"redo: found {wrong}, expected stages of this recipe: {known}")
    gone = set(names)
    digests: dict[str, str] = {}
    for entry in planned:
        if entry.name in gone or gone & set(entry.stage.inputs().values()):
            gone.add(entry.name)
            entry.state, entry.changes, entry.broken = "new", (), ""
            inputs = {role: digests[target] for role, target in entry.stage.inputs().items()}
            # Trained at once, from the new inputs.
            entry.identity = _plain(entry.identity) | {"inputs": inputs}
        digests[entry.name] = entry.digest
    return [entry for entry in planned if entry.name in gone]


class Changed(ValueError):
    """Recorded work does not match the config."""


def readable(change: str) -> str:
    """Return a change of an identity as a message; digests of inputs and data are replaced by words."""
    where = change.partition(": ")[0]
    if where.startswith("inputs."):
        return f"{where.removeprefix('inputs.')}: has changed since this stage was made"
    return (
        "data: have changed since this stage was made"
        if where == "fingerprint"
        else change.removeprefix("config.")
    )


def check_split(planned: Sequence[Planned], processes: int) -> None:
    """Raise ValueError if the batch of a stage cannot be split evenly over the processes."""
    for entry in planned:
        batch, parts = entry.config.get("batch_size"), processes * entry.config.get("accumulate", 1)
        if "accumulate" in entry.config and entry.state != "finished" and batch % parts:
            raise ValueError(
                f"stages.{entry.name}.batch_size: found {batch}, which cannot be split into accumulate="
                f"{entry.config['accumulate']} micro batches on {processes} processes; expected a multiple of {parts}"
            )


def refuse_changes(planned: Sequence[Planned], run_folder: Path) -> None:
    """Raise `Changed` if recorded work does not match the config; the message lists the changes and what to type."""
    extended = [entry.name for entry in planned if entry.state == "extend"]
    changed = [entry for entry in planned if entry.state == "changed"]
    if not changed:
        return
    first = changed[0]
    if first.broken:
        raise Changed(
            f"stages.{first.name}: {first.broken}\nUse redo={first.name} to make it and the stages that depend on it again, "
            f"or another name=... for a new run beside {run_folder}."
        )
    reason = f" (because {', '.join(extended)} would be trained further)" if extended else ""
    lines = "\n".join(f"  {readable(line)}" for line in first.changes[:20])
    raise Changed(
        f"stages.{first.name}: {first.folder} was made with other settings{reason}:\n{lines}\n"
        f"Use redo={first.name} to make it and the stages that depend on it again, "
        f"or another name=... for a new run beside {run_folder}."
    )


def describe_plan(
    planned: Sequence[Planned], run_folder: Path, processes: int = 1, reduce_each: bool = False
) -> str:
    """Return the table that `plan=true` prints. `processes`: those that networks are sharded over; `reduce_each`: see
    `engine.fit.Fit`."""
    width = max(len(entry.name) for entry in planned)
    kinds = max(len(type(entry.stage).__name__) for entry in planned)
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
            f"  {number}. {entry.name:<{width}}  {entry.state:<11}  {kind:<{kinds}}  {size}  {inputs}".rstrip()
        )
        lines += [f"       {readable(line)}" for line in entry.changes[:5]]
        lines += [f"       {entry.broken}"] if entry.broken else []
        if entry.memory:
            lines += [f"       {line}" for line in entry.memory.describe(processes, reduce_each)]
    return printable("\n".join(lines))
