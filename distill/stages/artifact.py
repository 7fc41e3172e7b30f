"""Records of stages: their identity and digest, and `artifact.json`, which is written last."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
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
# Entry of an identity: when training was continued with more steps, [{steps: planned before, reached: step}]; else absent.
EXTENDED = "extended"

# Options that do not change the result of a stage and are not part of its digest. (Options of the group `trainer` are not in
# the config of a stage.) The contents of a `path` enter the digest through the fingerprint.
EXECUTION_ONLY = frozenset({"path"})


# Digests contain the first names of stages, so that runs of earlier versions can be continued.
FIRST_NAMES = {
    "distill.stages.train.Train": "distill.pipeline.stages.Train",
    "distill.stages.load.Load": "distill.pipeline.stages.Load",
    "distill.stages.exact.Exact": "distill.pipeline.exact.Exact",
    "distill.stages.generate.Generate": "distill.pipeline.generate.Generate",
    "distill.stages.evaluate.Evaluate": "distill.pipeline.evaluate.Evaluate",
    "distill.stages.export.Export": "distill.pipeline.export.Export",
}

# Options that later versions added, with the values that change nothing: digests leave them out.
ADDED: dict[str, dict[str, Any]] = {
    "distill.stages.train.Train": {"model": None},
    "distill.stages.generate.Generate": {"states": False, "precision": "float32"},
    "distill.stages.evaluate.Evaluate": {"precision": "float32"},
    "distill.stages.export.Export": {
        **{"format": "native", "merged": False, "pipeline": None, "variant": None},
        "export_dtype": None,
    },
    "distill.stages.pretrained.Pretrained": {"solver": None, "grid": None},
}


# Meters that were stages in earlier versions, whose configs had the options of both.
FIRST_METERS = {
    "distill.evaluation.meters.images.ImageMeter": "distill.pipeline.evaluate.Evaluate",
    "distill.evaluation.meters.points.PointMeter": "distill.pipeline.points.EvaluatePoints",
}


def hashed_config(config: Mapping[str, Any], references: tuple[str, ...]) -> dict[str, Any]:
    """Return the part of a stage's config that enters its digest: no options of `EXECUTION_ONLY`, and no references to
    other stages, whose digests are included as `inputs`."""

    left_out = EXECUTION_ONLY | {key for key in references if isinstance(config.get(key), str)}
    added = ADDED.get(config["_target_"], {})
    kept = {
        key: value
        for key, value in config.items()
        if key not in left_out and not (key in added and value == added[key])
    }
    if isinstance(method := kept.get("method"), Mapping):
        kept["method"] = former_names(method)
    kept |= {"_target_": FIRST_NAMES.get(kept["_target_"], kept["_target_"])}
    if isinstance(kept.get("gates"), list):
        kept["gates"] = [gate for gate in kept["gates"] if gate is not None]  # null: removed by the recipe
    meter = kept.get("meter")
    if isinstance(meter, Mapping) and meter.get("_target_") in FIRST_METERS:
        kept |= {**kept.pop("meter"), "_target_": FIRST_METERS[meter["_target_"]]}
    return kept


def identity(
    config: Mapping[str, Any],
    references: tuple[str, ...],
    inputs: Mapping[str, str],
    seed: int,
    fingerprint: str,
) -> dict[str, Any]:
    """Return everything that a stage's result depends on. Its digest is the sha256 of the canonical JSON."""
    return {
        "config": hashed_config(config, references),
        "inputs": dict(inputs),
        "seed": seed,
        "fingerprint": fingerprint,
    }


def lasting_identity(stage: Stage, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an identity that must not change when the stage is trained further."""
    kept = {key: value for key, value in content.items() if key != EXTENDED}
    return kept | {"config": stage.lasting(content["config"])}


def digest_of(content: Mapping[str, Any]) -> str:
    """Return the sha256 of the canonical JSON, in hex."""
    return sha256_text(canonical_json(content))


@dataclass(frozen=True)
class Identity:
    """The schema of identity.json: see `identity`; `input_files` as in `Record`; for `extended` see `EXTENDED`."""

    config: dict[str, Any]
    inputs: dict[str, str]
    seed: int
    fingerprint: str
    input_files: dict[str, str] | None = None
    extended: list[dict[str, int]] | None = None


@dataclass(frozen=True)
class Record:
    """The schema of artifact.json, the record of a finished stage.

    Attributes:
        schema: version of the schema.
        digest: of the identity. identity: see `identity`. facts: returned by `Stage.run`.
        files: sha256 of every file that the stage made, by its path in the stage's folder.
        input_files: digests (`files_digest`) of the files of its inputs at the time, by role.
        code: versions. sha256: of the canonical JSON of all other entries.
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
    """Return a digest of the files of a finished stage, except its records."""
    return digest_of({name: sha for name, sha in record["files"].items() if name not in RECORDS})


def input_digests(inputs: Mapping[str, Path]) -> dict[str, str]:
    """Return `files_digest` of the finished stages in `inputs` (role -> folder), by role."""
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
    """Write the record of a finished stage.

    Args:
        folder: of the stage.
        content: its identity.
        facts: returned by `Stage.run`.
        made: patterns of its files.
        needed: files that must exist; of those in "A|B" one.
        input_files: see `Record`.
        skip: subfolders that are not recorded.

    Raises:
        FileNotFoundError: names the missing file of `needed`.
    """
    names = [n for n in files_of(folder, made) if n != ARTIFACT and n.partition("/")[0] not in skip]
    if (missing := _lacking(needed, names)) is not None:
        raise FileNotFoundError(f"{folder / missing}: missing at the end of its stage")
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
    """Return the record of a finished stage, or None if there is none.

    Raises:
        NewerSchema: if it was written by a newer version.
        ValueError: if it was changed, or, with `stage`, if its files do not match that class.
    """
    path = folder / ARTIFACT
    if not path.is_file():
        return None
    record = read_json(path)
    found = record.get("schema") if isinstance(record, dict) else type(record).__name__
    if found not in (1, SCHEMA):
        raise NewerSchema(f"{path}: schema: found {found!r}, this version reads {SCHEMA}")
    parse(Record, record, f"{path}: ")
    if record["digest"] != digest_of(record["identity"]):
        raise ValueError(f"{path}: digest: does not match the identity: changed after it was made")
    rest = {key: value for key, value in record.items() if key != "sha256"}
    if found == SCHEMA and record.get("sha256") != digest_of(rest):
        raise ValueError(f"{path}: sha256: does not match the rest of the file: changed after it was made")
    if found == 1 and {"sha256", "input_files"} & set(record):
        raise ValueError(
            f"{path}: schema: found 1 with entries of schema {SCHEMA}: changed after it was made"
        )
    if stage is not None:
        if found == 1:  # schema 1 recorded every file in the folder
            record["files"] = {n: sha for n, sha in record["files"].items() if _fits(n, stage.made())}
        if unknown := [name for name in record["files"] if not _fits(name, stage.made())]:
            raise ValueError(
                f"{path}: files: found {unknown[0]!r}, which a {stage.__name__} stage does not make"
            )
        missing = _lacking(stage.needed(record["identity"]["config"]), record["files"])
        if missing is not None:
            raise ValueError(f"{path}: files: {missing}: missing; expected the sha256 of this file")
    return record


class NewerSchema(ValueError):
    """A record was written by a newer version."""


def _lacking(needed: Iterable[str], names: Collection[str]) -> str | None:
    """The first of the files that are needed ("A|B": one of both) and not there."""
    choices = [entry.split("|") for entry in needed]
    return next((each[0] for each in choices if not any(name in names for name in each)), None)


def _fits(name: str, made: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in made)


def verify_files(folder: Path, record: Mapping[str, Any]) -> None:
    """Compare every file of a finished stage with its sha256; symbolic and hard links are replaced by copies.

    Raises:
        FileNotFoundError: names a missing file.
        ValueError: names a changed file.
    """
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
    """Return a line `path: old -> new` for each difference of two plain containers."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines: list[str] = []
        for key in sorted({*old, *new}, key=str):
            where = f"{path}.{key}" if path else str(key)
            lines += differences(old.get(key, "(absent)"), new.get(key, "(absent)"), where)
        return lines
    return [] if old == new else [f"{path}: {old} -> {new}"]
