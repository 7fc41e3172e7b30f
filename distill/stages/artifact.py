"""Records of stages: the identity and digest by which a result is known again, and `artifact.json`, written last."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import distill
from distill.files import canonical_json, copy, read_json, sha256_file, sha256_text, write_json
from distill.stages.base import Stage
from distill.stages.ownership import ARTIFACT, RECORDS, files_of
from distill.stages.renamed import former_names
from distill.typed import parse

SCHEMA = 2  # 1: without `sha256` and `input_files`
INPUT_FILES = "input_files"
# Entry of an identity: where training was made longer, [{steps: planned until then, reached: step}]. Absent where it was not.
EXTENDED = "extended"

# Options of a stage that change how it runs and not what it makes: they never enter a digest. (Those of the
# group `trainer` are no part of a stage's config at all.) What lies at a `path` enters by its fingerprint,
# whatever the path is called.
EXECUTION_ONLY = frozenset({"path"})


# Digests know stages by the names that they had first, whatever file they lie in: runs of before go on.
FIRST_NAMES = {
    "distill.stages.train.Train": "distill.pipeline.stages.Train",
    "distill.stages.load.Load": "distill.pipeline.stages.Load",
    "distill.stages.exact.Exact": "distill.pipeline.exact.Exact",
    "distill.stages.generate.Generate": "distill.pipeline.generate.Generate",
    "distill.stages.evaluate.Evaluate": "distill.pipeline.evaluate.Evaluate",
    "distill.stages.points.EvaluatePoints": "distill.pipeline.points.EvaluatePoints",
    "distill.stages.export.Export": "distill.pipeline.export.Export",
}


def hashed_config(config: Mapping[str, Any], references: tuple[str, ...]) -> dict[str, Any]:
    """The part of a stage's config that enters its digest: no execution-only option and no reference to
    another stage (their digests stand for them)."""

    left_out = EXECUTION_ONLY | {key for key in references if isinstance(config.get(key), str)}
    kept = {key: value for key, value in config.items() if key not in left_out}
    if isinstance(method := kept.get("method"), Mapping):
        kept["method"] = former_names(method)
    return kept | {"_target_": FIRST_NAMES.get(kept["_target_"], kept["_target_"])}


def identity(
    config: Mapping[str, Any],
    references: tuple[str, ...],
    inputs: Mapping[str, str],
    seed: int,
    fingerprint: str,
) -> dict[str, Any]:
    """Everything that a stage's result depends on; its canonical JSON is what the digest is the sha256 of."""
    return {
        "config": hashed_config(config, references),
        "inputs": dict(inputs),
        "seed": seed,
        "fingerprint": fingerprint,
    }


def lasting_identity(stage: Stage, content: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an identity that stays when the stage is made longer."""
    kept = {key: value for key, value in content.items() if key != EXTENDED}
    return kept | {"config": stage.lasting(content["config"])}


def digest_of(content: Mapping[str, Any]) -> str:
    """sha256 of canonical JSON."""
    return sha256_text(canonical_json(content))


@dataclass(frozen=True)
class Identity:
    """identity.json of a stage that was begun: see `identity`. `input_files` as in `Record`, `extended` see `EXTENDED`."""

    config: dict[str, Any]
    inputs: dict[str, str]
    seed: int
    fingerprint: str
    input_files: dict[str, str] | None = None
    extended: list[dict[str, int]] | None = None


@dataclass(frozen=True)
class Record:
    """artifact.json: that a stage is finished, what it is and what it made.

    Attributes:
        digest: of the identity. identity: see `identity`. facts: what the stage tells of itself.
        files: sha256 of every file that it made, by its path in the stage's folder.
        input_files: by role, the digest (`files_digest`) of what its inputs had made when it was made.
        code: versions. sha256: of the canonical JSON of all of this but itself.
    """

    schema: int
    digest: str
    identity: Identity
    facts: dict[str, Any]
    files: dict[str, str]
    code: dict[str, str] = field(default_factory=dict)
    input_files: dict[str, str] | None = None
    sha256: str | None = None


def files_digest(record: Mapping[str, Any]) -> str:
    """Digest of the files that a finished stage made, its records left out: what the stages after it were made from."""
    return digest_of({name: sha for name, sha in record["files"].items() if name not in RECORDS})


def input_digests(inputs: Mapping[str, Path]) -> dict[str, str]:
    """`files_digest` of the finished stages in some folders, by role."""
    records = {role: read_artifact(folder) for role, folder in inputs.items()}
    return {role: files_digest(record) for role, record in records.items() if record is not None}


def write_artifact(
    folder: Path,
    content: Mapping[str, Any],
    facts: Mapping[str, Any],
    made: tuple[str, ...],
    needed: tuple[str, ...] = (),
    input_files: Mapping[str, str] | None = None,
    skip: tuple[str, ...] = ("checkpoints", "logs"),
) -> None:
    """Record that the stage is finished: its identity, its facts and a sha256 for every file that it made (patterns `made`).
    Written last. Raises FileNotFoundError where a file that the stage must leave (`needed`) is not there."""
    names = [n for n in files_of(folder, made) if n != ARTIFACT and n.partition("/")[0] not in skip]
    if missing := [name for name in needed if name not in names]:
        raise FileNotFoundError(f"{folder / missing[0]}: missing at the end of the stage that makes it")
    record = {
        "schema": SCHEMA,
        "digest": digest_of(content),
        "identity": dict(content),
        "facts": dict(facts),
        "files": {name: sha256_file(folder / name) for name in names},
        "input_files": dict(input_files or {}),
        "code": {"distill": distill.__version__, "torch": str(torch.__version__)},
    }
    write_json(folder / ARTIFACT, record | {"sha256": digest_of(record)})


def read_artifact(folder: Path, stage: type[Stage] | None = None) -> dict[str, Any] | None:
    """The record of a finished stage, or None where there is none yet. Raises ValueError where it is of a newer schema, was
    changed, or names no file that a `stage` of its kind must have made."""
    path = folder / ARTIFACT
    if not path.is_file():
        return None
    record = read_json(path)
    found = record.get("schema") if isinstance(record, dict) else type(record).__name__
    if found not in (1, SCHEMA):
        raise NewerSchema(f"{path}: schema: found {found!r}, this version reads {SCHEMA}")
    parse(Record, record, f"{path}: ")
    if record["digest"] != digest_of(record["identity"]):
        raise ValueError(f"{path}: digest: does not fit its identity: changed after it was made")
    rest = {key: value for key, value in record.items() if key != "sha256"}
    if found == SCHEMA and record.get("sha256") != digest_of(rest):
        raise ValueError(f"{path}: sha256: does not fit the rest of the file: changed after it was made")
    if found == 1 and {"sha256", "input_files"} & set(record):
        raise ValueError(
            f"{path}: schema: found 1 with entries of schema {SCHEMA}: changed after it was made"
        )
    if stage is not None:
        if found == 1:  # then it named whatever lay in the folder
            record["files"] = {n: sha for n, sha in record["files"].items() if _fits(n, stage.made())}
        if unknown := [name for name in record["files"] if not _fits(name, stage.made())]:
            raise ValueError(
                f"{path}: files: found {unknown[0]!r}, which a {stage.__name__} stage does not make"
            )
        if missing := [name for name in stage.NEEDED if name not in record["files"]]:
            raise ValueError(f"{path}: files: {missing[0]}: missing, so there is nothing to go on from")
    return record


class NewerSchema(ValueError):
    """A record that another version wrote."""


def _fits(name: str, made: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in made)


def verify_files(folder: Path, record: Mapping[str, Any]) -> None:
    """Compare every file of an artifact with its sha256; the error names the file. One that shares its storage with another
    name (a link) becomes a copy of its own, so that nobody writes into it from there."""
    for name, expected in record["files"].items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; {folder / ARTIFACT} expects it")
        if path.is_symlink() or path.stat().st_nlink > 1:
            copy(path, path)
        if (found := sha256_file(path)) != expected:
            raise ValueError(
                f"{path}: sha256: found {found[:12]}, {ARTIFACT} expects {expected[:12]}: changed after it "
                "was made"
            )


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Readable lines `path: old -> new` for everything that two plain containers do not share."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines: list[str] = []
        for key in sorted({*old, *new}, key=str):
            where = f"{path}.{key}" if path else str(key)
            lines += differences(old.get(key, "(absent)"), new.get(key, "(absent)"), where)
        return lines
    return [] if old == new else [f"{path}: {old} -> {new}"]
