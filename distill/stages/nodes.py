"""Nodes: models that a training stage stores on its way (DisBack's degradation path), known by a manifest written last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.files import read_json, sha256_file, write_json
from distill.models.description import DESCRIPTION, WEIGHTS, Description
from distill.stages.ownership import ARTIFACT, read_object
from distill.stages.renamed import MOVED, former_names
from distill.typed import parse

SCHEMA = 1
FOLDER, MANIFEST, STORED = "nodes", "nodes.json", "stored.json"
# What a node's weights mean: without all of it in common with the start, they are another model's.
MEANING = ("net", "process", "kind", "sample_shape", "conditions")


@dataclass(frozen=True)
class Node:
    """An entry of the manifest: its place on the way from 1, the optimizer step, and its weights' sha256."""

    number: int
    step: int
    sha256: str


@dataclass(frozen=True)
class Way:
    """The manifest: the sha256 of the weights that the way began with, and its nodes."""

    schema: int
    start: str
    nodes: list[Node]

    def __post_init__(self) -> None:
        if (found := [node.number for node in self.nodes]) != list(range(1, len(found) + 1)):
            raise ValueError(f"nodes: found the numbers {found}, expected 1 .. {len(found)} in turn")


def _manifest(path: Path) -> Way:
    value = read_json(path)
    found = value.get("schema") if isinstance(value, dict) else type(value).__name__
    if found != SCHEMA or isinstance(found, bool):
        raise ValueError(f"{path}: schema: found {found!r}, this version reads {SCHEMA}")
    return parse(Way, value, f"{path}: ")


def node_folder(stage: Path, number: int) -> Path:
    """Where node `number` (from 1) of a stage lies."""
    return stage / FOLDER / f"{number:03d}"


def node_saver(
    stage: Path, steps: Sequence[int], save: Callable[[Path], None], main: bool = True
) -> Callable[[int], None]:
    """What to call after each of `steps`: stores the student as it is, under its number, and (the `main` process) notes its
    files in `stored.json`. A kill before the next checkpoint writes the same bytes again."""
    numbers = {step: number for number, step in enumerate(steps, 1)}

    def keep(step: int) -> None:
        folder = node_folder(stage, numbers[step])
        save(folder)
        if main:
            files = {name: sha256_file(folder / name) for name in (WEIGHTS, DESCRIPTION)}
            write_json(stage / STORED, read_object(stage / STORED) | {str(numbers[step]): files})

    return keep


def check_stored(stage: Path, steps: Sequence[int]) -> None:
    """Raise ValueError unless every node is what was stored when training passed it: a stage that was interrupted goes on with
    those that it finds."""
    stored = read_object(stage / STORED)
    for number, step in enumerate(steps, 1):
        files = stored.get(str(number))
        for name in (WEIGHTS, DESCRIPTION):
            file = node_folder(stage, number) / name
            known = files.get(name) if isinstance(files, dict) else None
            if known is None or not file.is_file() or sha256_file(file) != known:
                raise ValueError(
                    f"{file}: is not the file that was stored after step {step}; redo={stage.name} records from the start"
                )


def write_manifest(stage: Path, steps: Sequence[int], start: Path) -> None:
    """Note the nodes of a finished stage and which weights (of the model folder `start`) the way began with."""
    nodes = [
        {"number": number, "step": step, "sha256": sha256_file(node_folder(stage, number) / WEIGHTS)}
        for number, step in enumerate(steps, 1)
    ]
    write_json(stage / MANIFEST, {"schema": SCHEMA, "start": sha256_file(start / WEIGHTS), "nodes": nodes})


def read_nodes(stage: Path, start: Path) -> list[Path]:
    """Model folders of a way, in its order: `start` and every stored node.

    Raises FileNotFoundError or ValueError where there is no manifest, a node is missing, changed or another kind of model,
    or the way began with other weights than those in `start`."""
    path = stage / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing; expected a stage that stores nodes (method `degrade`), finished"
        )
    manifest = _manifest(path)
    teacher = Description.read(start).model
    if manifest.start != (found := sha256_file(start / WEIGHTS)):
        raise ValueError(
            f"{path}: start: the way began with weights {manifest.start[:12]}, the teacher's are {found[:12]}"
        )
    folders = [start]
    for node in manifest.nodes:
        folder = node_folder(stage, node.number)
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"{folder / WEIGHTS}: missing; {path} names it as node {node.number}")
        if (found := sha256_file(folder / WEIGHTS)) != node.sha256:
            raise ValueError(
                f"{folder / WEIGHTS}: sha256: found {found[:12]}, {path} expects {node.sha256[:12]}"
            )
        told = Description.read(folder).model
        for key in MEANING:
            if told.get(key) != teacher.get(key):
                raise ValueError(
                    f"{folder / DESCRIPTION}: {key}: found {told.get(key)!r}, expected the teacher's {teacher.get(key)!r}"
                )
        folders.append(folder)
    return folders


def check_way(stage: Path, init: Path | None, method: Mapping[str, Any]) -> None:
    """Refuse a way that was recorded for the samples of another student than the model `init`, or of one that starts at other
    levels than the `method`'s: its end, where the fake score begins, would not fit them.

    Raises ValueError naming what differs."""
    recorded = read_json(stage / ARTIFACT)["identity"]
    check_recorded(str(stage), recorded["config"]["method"], method)
    student = None if init is None else read_json(init / ARTIFACT)["digest"]
    if recorded["inputs"].get("generator") != student:
        raise ValueError(
            f"init: the way in {stage} was recorded on samples of another model; expected the one that its stage names as "
            "networks.generator"
        )


def check_recorded(where: str, recorded: Mapping[str, Any], method: Mapping[str, Any]) -> None:
    """Refuse nodes that were recorded by a method with other levels: their end, where the fake score begins, would not fit.

    Raises ValueError naming the option."""
    theirs, ours = former_names(recorded), former_names(method)
    for key in ("levels", "unit_noise"):
        if theirs.get(key) != ours.get(key):
            raise ValueError(
                f"method.{MOVED[key]}: found {ours.get(key)!r}, but the nodes of {where} are recorded with "
                f"{theirs.get(key)!r}; expected the same"
            )
