"""Stages and artifacts: what a stage is given, what it leaves behind, and the digest by which both are known
again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

import distill
from distill.files import canonical_json, read_json, sha256_file, sha256_text, write_json
from distill.pipeline.display import Display

SCHEMA = 1
ARTIFACT = "artifact.json"

# Options that change how a stage runs and not what it makes: they never enter a digest. What lies at a `path` enters by its
# fingerprint, whatever the path is called.
EXECUTION_ONLY = frozenset(
    {
        "devices",
        "workers",
        "threads",
        "logger",
        "compile",
        "checkpoint_every",
        "log_every",
        "accelerator",
        "path",
    }
)


@dataclass(frozen=True)
class Settings:
    """How stages run: options that do not change what they make (group `trainer`)."""

    accelerator: str = "auto"
    devices: int = 1
    threads: int | None = None
    checkpoint_every: int = 200
    log_every: int = 20

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        if self.accelerator not in ("auto", "cpu", "gpu"):
            raise ValueError(
                f"trainer.accelerator: found {self.accelerator!r}, expected 'auto', 'cpu' or 'gpu'"
            )
        wanted = torch.cuda.is_available() if self.accelerator == "auto" else self.accelerator == "gpu"
        return torch.device("cuda") if wanted else torch.device("cpu")


@dataclass(frozen=True)
class Room:
    """What a stage is given when it runs: a folder of its own, the folders of its inputs by role, the run's
    seed."""

    name: str
    folder: Path
    inputs: Mapping[str, Path]
    seed: int
    settings: Settings
    loggers: tuple[Mapping[str, Any], ...]
    display: Display
    run_folder: Path
    recipe: str
    digest: str


@dataclass
class Stage(ABC):
    """One step of a recipe. Its dataclass fields are its config schema; nested configs stay plain
    containers."""

    # Fields by which a finished stage may be extended.
    LENGTH: ClassVar[tuple[str, ...]] = ()
    # Fields whose value is the name of another stage (or a list of such names).
    REFERENCES: ClassVar[tuple[str, ...]] = ()

    def inputs(self) -> dict[str, str]:
        """role -> name of the stage whose artifact it needs."""
        return {role: value for role in self.REFERENCES if isinstance(value := getattr(self, role), str)}

    def fingerprint(self) -> str:
        """Digest of what the stage reads from outside the run; empty where it reads nothing."""
        return ""

    def check(self, stages: Mapping[str, Stage]) -> None:
        """Refuse what cannot work, before anything runs. `stages` are those before this one."""
        for role, name in self.inputs().items():
            if name not in stages:
                raise ValueError(
                    f"{role}: found {name!r}, expected a stage before this one: one of {list(stages)}"
                )

    @abstractmethod
    def run(self, room: Room) -> dict[str, Any]:
        """Make the artifact in `room.folder`, continuing what is there; returns facts to record
        (JSON-able)."""


def hashed_config(config: Mapping[str, Any], references: tuple[str, ...]) -> dict[str, Any]:
    """The part of a stage's config that enters its digest: no execution-only option and no reference to
    another stage (their digests stand for them)."""

    def strip(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: strip(v) for k, v in value.items() if k not in EXECUTION_ONLY}
        return [strip(v) for v in value] if isinstance(value, list | tuple) else value

    return {
        k: strip(v)
        for k, v in config.items()
        if k not in EXECUTION_ONLY and not (k in references and isinstance(v, str))
    }


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


def digest_of(content: Mapping[str, Any]) -> str:
    """sha256 of canonical JSON."""
    return sha256_text(canonical_json(content))


def write_artifact(
    folder: Path,
    content: Mapping[str, Any],
    facts: Mapping[str, Any],
    skip: tuple[str, ...] = ("checkpoints", "logs"),
) -> None:
    """Record that the stage is finished: its identity, its facts and a sha256 for every file of it. Written
    last."""
    files = {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ARTIFACT and path.relative_to(folder).parts[0] not in skip
    }
    record = {
        "schema": SCHEMA,
        "digest": digest_of(content),
        "identity": dict(content),
        "facts": dict(facts),
        "files": files,
        "code": {"distill": distill.__version__, "torch": str(torch.__version__)},
    }
    write_json(folder / ARTIFACT, record)


def read_artifact(folder: Path) -> dict[str, Any] | None:
    """The record of a finished stage, or None where there is none yet. A newer schema is refused."""
    path = folder / ARTIFACT
    if not path.is_file():
        return None
    record = read_json(path)
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema: found {record.get('schema')!r}, this version reads {SCHEMA}")
    return record


def verify_files(folder: Path, record: Mapping[str, Any]) -> None:
    """Compare every file of an artifact with its sha256; the error names the file."""
    for name, expected in record["files"].items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; {folder / ARTIFACT} expects it")
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
