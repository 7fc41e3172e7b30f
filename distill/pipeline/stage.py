"""Stages and artifacts: what a stage is given, what it leaves behind, and the digest by which both are known
again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import torch

import distill
from distill.engine.parallel import SHARD
from distill.files import canonical_json, read_json, sha256_file, sha256_text, write_json
from distill.pipeline.display import Display
from distill.world import World

SCHEMA = 1
ARTIFACT = "artifact.json"

# Options of a stage that change how it runs and not what it makes: they never enter a digest. (Those of the
# group `trainer` are no part of a stage's config at all.) What lies at a `path` enters by its fingerprint,
# whatever the path is called.
EXECUTION_ONLY = frozenset({"path"})


def check_types(value: Any, where: str = "") -> None:
    """Refuse a config dataclass whose fields have other types than it declares; the error names the field."""
    for name, declared in get_type_hints(type(value)).items():
        if get_origin(declared) is ClassVar or name.startswith("_"):
            continue
        options = get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
        kinds = tuple(get_origin(option) or option for option in options)
        found = getattr(value, name)
        accepted = (*kinds, int) if float in kinds else (*kinds, list) if tuple in kinds else kinds
        if not isinstance(found, accepted) or (isinstance(found, bool) and bool not in kinds):
            expected = " or ".join("null" if kind is NoneType else kind.__name__ for kind in kinds)
            raise ValueError(f"{where}{name}: found {found!r}, expected {expected}")


@dataclass(frozen=True)
class Settings:
    """How stages run: options that do not change what they make (group `trainer`)."""

    accelerator: str = "auto"
    devices: int = 1
    shard: str = "none"
    threads: int | None = None
    checkpoint_every: int = 200
    log_every: int = 20
    max_nonfinite: int = 10
    max_nonfinite_share: float = 0.05

    def __post_init__(self) -> None:
        check_types(self, "trainer.")
        for name in ("devices", "checkpoint_every", "log_every", "max_nonfinite", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"trainer.{name}: expected at least 1, found {getattr(self, name)}")
        if not 0 <= self.max_nonfinite_share <= 1:
            raise ValueError(
                f"trainer.max_nonfinite_share: expected a share in [0, 1], found {self.max_nonfinite_share}"
            )
        if self.shard not in SHARD:
            raise ValueError(f"trainer.shard: found {self.shard!r}, expected one of {list(SHARD)}")

    @property
    def device(self) -> torch.device:
        """The kind of device that stages run on."""
        if self.accelerator not in ("auto", "cpu", "gpu"):
            raise ValueError(
                f"trainer.accelerator: found {self.accelerator!r}, expected 'auto', 'cpu' or 'gpu'"
            )
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise ValueError(
                "trainer.accelerator: found 'gpu', but this machine has no CUDA device; expected 'cpu'"
            )
        wanted = torch.cuda.is_available() and self.accelerator != "cpu"
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
    world: World = field(default_factory=World)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device = self.settings.device
        return torch.device("cuda", self.world.local_rank) if device.type == "cuda" else device


@dataclass
class Stage(ABC):
    """One step of a recipe. Its dataclass fields are its config schema; nested configs stay plain
    containers."""

    # Fields by which a finished stage may be extended.
    LENGTH: ClassVar[tuple[str, ...]] = ()
    # Fields whose value is the name of another stage.
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

    def begun(self, folder: Path) -> bool:
        """Whether an interrupted run of the stage left work in `folder` that would be continued."""
        return False

    def publish(self, room: Room) -> None:
        """Put copies of a finished stage's files where people look for them."""
        return

    @abstractmethod
    def run(self, room: Room) -> dict[str, Any]:
        """Make the artifact in `room.folder`, continuing what is there; returns facts to record
        (JSON-able)."""


@dataclass
class ModelStage(Stage):
    """A stage that leaves a model folder (`models.native`): others start from it, ask it, measure it, export it."""


def hashed_config(config: Mapping[str, Any], references: tuple[str, ...]) -> dict[str, Any]:
    """The part of a stage's config that enters its digest: no execution-only option and no reference to
    another stage (their digests stand for them)."""

    left_out = EXECUTION_ONLY | {key for key in references if isinstance(config.get(key), str)}
    return {key: value for key, value in config.items() if key not in left_out}


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
    found = record.get("schema") if isinstance(record, dict) else type(record).__name__
    if found != SCHEMA:
        raise ValueError(f"{path}: schema: found {found!r}, this version reads {SCHEMA}")
    if missing := [key for key in ("digest", "identity", "facts", "files") if key not in record]:
        raise ValueError(f"{path}: {missing[0]}: missing")
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
