"""Nodes: models that a training stage saves during training (DisBack's degradation path), listed by a manifest that is written
last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.files import read_json, sha256_file, write_json
from distill.models.description import DESCRIPTION, Description
from distill.models.native import model_files, without_adapter
from distill.models.weights import weights_digest, weights_path
from distill.stages.ownership import ARTIFACT, read_object
from distill.stages.renamed import MOVED, former_names
from distill.typed import parse

SCHEMA = 1
FOLDER, MANIFEST, STORED = "nodes", "nodes.json", "stored.json"
# Keys of a model description that all nodes share with the first model of the path.
MEANING = ("net", "process", "kind", "sample_shape", "conditions")


@dataclass(frozen=True)
class Node:
    """An entry of the manifest: its position on the path from 1, the optimizer step, and the sha256 of its weights."""

    number: int
    step: int
    sha256: str


@dataclass(frozen=True)
class StoredPath:
    """The manifest: the sha256 of the weights at the start of the path, and its nodes."""

    schema: int
    start: str
    nodes: list[Node]

    def __post_init__(self) -> None:
        if (found := [node.number for node in self.nodes]) != list(range(1, len(found) + 1)):
            raise ValueError(f"nodes: found the numbers {found}, expected 1 .. {len(found)} in this order")


def _manifest(path: Path) -> StoredPath:
    value = read_json(path)
    found = value.get("schema") if isinstance(value, dict) else type(value).__name__
    if found != SCHEMA or isinstance(found, bool):
        raise ValueError(f"{path}: schema: found {found!r}, this version reads {SCHEMA}")
    return parse(StoredPath, value, f"{path}: ")


def node_folder(stage: Path, number: int) -> Path:
    """The folder of node `number` (from 1) of a stage."""
    return stage / FOLDER / f"{number:03d}"


def node_saver(
    stage: Path, steps: Sequence[int], save: Callable[[Path], None], main: bool = True
) -> Callable[[int], None]:
    """A function to call after each of `steps`: it saves the student under the number of the step, and the `main` process
    records the sha256 of the files in `stored.json`. After a kill, the run writes the same bytes again."""
    numbers = {step: number for number, step in enumerate(steps, 1)}

    def keep(step: int) -> None:
        folder = node_folder(stage, numbers[step])
        save(folder)
        if main:
            files = {path.name: sha256_file(path) for path in model_files(folder)}
            write_json(stage / STORED, read_object(stage / STORED) | {str(numbers[step]): files})

    return keep


def check_stored(stage: Path, steps: Sequence[int]) -> None:
    """Check that the node files have not changed since they were saved: an interrupted stage reuses them.

    Raises ValueError naming the file that is missing or changed."""
    stored = read_object(stage / STORED)
    for number, step in enumerate(steps, 1):
        files = stored.get(str(number))
        folder = node_folder(stage, number)
        names = [*files] if isinstance(files, dict) else []
        for name in names if DESCRIPTION in names else (weights_path(folder).name, DESCRIPTION):
            file = folder / name
            known = files.get(name) if isinstance(files, dict) else None
            if known is None or not file.is_file() or sha256_file(file) != known:
                raise ValueError(
                    f"{file}: is not the file that was saved after step {step}; redo={stage.name} records from the start"
                )


def write_manifest(stage: Path, steps: Sequence[int], start: Path) -> None:
    """Write the manifest of a finished stage: its nodes, and the weights (of the model folder `start`) at the start of the
    path."""
    nodes = [
        {"number": number, "step": step, "sha256": weights_digest(weights_path(node_folder(stage, number)))}
        for number, step in enumerate(steps, 1)
    ]
    write_json(
        stage / MANIFEST, {"schema": SCHEMA, "start": weights_digest(weights_path(start)), "nodes": nodes}
    )


def read_nodes(stage: Path, start: Path) -> list[Path]:
    """Model folders of a path in order: `start` and every node.

    Raises FileNotFoundError or ValueError if there is no manifest, a node is missing, changed or another kind of model, or the
    path starts at other weights than those in `start`."""
    path = stage / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing; expected a finished stage that saves nodes (method `degrade`)"
        )
    manifest = _manifest(path)
    teacher = Description.read(start).model
    if manifest.start != (found := weights_digest(weights_path(start))):
        raise ValueError(
            f"{path}: start: found weights {manifest.start[:12]}, expected the teacher's {found[:12]}"
        )
    folders = [start]
    for node in manifest.nodes:
        folder = node_folder(stage, node.number)
        if not (weights := weights_path(folder)).is_file():
            raise FileNotFoundError(f"{weights}: missing; {path} lists it as node {node.number}")
        if (found := weights_digest(weights)) != node.sha256:
            raise ValueError(f"{weights}: sha256: found {found[:12]}, {path} expects {node.sha256[:12]}")
        told = Description.read(folder).model
        told = told | {"net": without_adapter(told.get("net"))}  # a node may be an adapter of the teacher
        for key in MEANING:
            if told.get(key) != teacher.get(key):
                raise ValueError(
                    f"{folder / DESCRIPTION}: {key}: found {told.get(key)!r}, expected the teacher's {teacher.get(key)!r}"
                )
        folders.append(folder)
    return folders


def check_path(stage: Path, init: Path | None, method: Mapping[str, Any]) -> None:
    """Check that a path was recorded on samples of the model `init` and with the `method`'s levels: its last node, which
    initializes the fake score, has been trained on them.

    Raises ValueError naming what differs."""
    recorded = read_json(stage / ARTIFACT)["identity"]
    check_recorded(str(stage), recorded["config"]["method"], method)
    student = None if init is None else read_json(init / ARTIFACT)["digest"]
    if recorded["inputs"].get("generator") != student:
        raise ValueError(
            f"init: {stage} was recorded for another student; set `init` to its `networks.generator`"
        )


def check_recorded(where: str, recorded: Mapping[str, Any], method: Mapping[str, Any]) -> None:
    """Check that nodes were recorded with the `method`'s levels.

    Raises ValueError naming the option."""
    theirs, ours = former_names(recorded), former_names(method)
    for key in ("levels", "unit_noise"):
        if theirs.get(key) != ours.get(key):
            raise ValueError(
                f"method.{MOVED[key]}: found {ours.get(key)!r}, but the nodes of {where} are recorded with "
                f"{theirs.get(key)!r}; expected the same"
            )
