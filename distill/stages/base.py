"""The base class of stages: what a stage is given and what it leaves behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import torch

from distill.engine.parallel import SHARD
from distill.stages.display import Display
from distill.stages.made import Made
from distill.stages.ownership import RECORDS, patterns
from distill.world import World

WHICH = ("last", "best")
MODEL_FILES = patterns("model.safetensors", "model.json")
TRAINED_FILES = (
    *MODEL_FILES,
    *patterns("checkpoints/last.ckpt", "logs/metrics.jsonl", "logs/wandb_id"),
    *(f"best/{name}" for name in MODEL_FILES),
    *patterns("best.json", "monitor/evaluations.jsonl"),
    r"monitor/(step|diagnostics)_\d{7,}\.png",
    *(rf"nodes/\d{{3,}}/{name}" for name in MODEL_FILES),
    *patterns("nodes.json", "stored.json"),
)


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
        check_types(self)
        for name in ("devices", "checkpoint_every", "log_every", "max_nonfinite", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if not 0 <= self.max_nonfinite_share <= 1:
            raise ValueError(
                f"max_nonfinite_share: expected a share in [0, 1], found {self.max_nonfinite_share}"
            )
        if self.shard not in SHARD:
            raise ValueError(f"shard: found {self.shard!r}, expected one of {list(SHARD)}")

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
class StageContext:
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
    identity: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device = self.settings.device
        return torch.device("cuda", self.world.local_rank) if device.type == "cuda" else device


@dataclass
class Stage(ABC):
    """One step of a recipe. Its dataclass fields are its config schema; nested configs stay plain
    containers."""

    # The field by which a stage may be made longer, if there is one.
    LENGTH: ClassVar[str] = ""
    # Fields whose value is the name of another stage.
    REFERENCES: ClassVar[tuple[str, ...]] = ()
    # Files that the stage makes, relative to its folder, as regular expressions of whole names (`/` divides folders). Only
    # these are recorded when it is finished, and deleted when it is made again.
    FILES: ClassVar[tuple[str, ...]] = ()
    # Those without which it is not finished.
    NEEDED: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def made(cls) -> tuple[str, ...]:
        """Patterns of everything in the stage's folder that is not the user's."""
        return (*patterns(*RECORDS), *cls.FILES)

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

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """Build everything that `run` will build, on what the stages `before` this one will leave behind, and raise what
        `run` would raise for it; changes nothing and trains nothing. Returns what this stage will leave behind."""
        return Made()

    def begun(self, folder: Path) -> bool:
        """Whether an interrupted run of the stage left work in `folder` that would be continued."""
        return False

    def lasting(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The part of its hashed config that stays when the stage is made longer. What a method stretches over the length
        is part of it, with the value that it takes from there."""
        return {key: value for key, value in config.items() if key != self.LENGTH}

    def seams(self, folder: Path, content: Mapping[str, Any]) -> list[dict[str, int]]:
        """Where the stage in `folder`, begun with the identity `content`, has been made longer once it is made longer
        now; for stages with a `LENGTH`. Raises where it cannot be."""
        raise NotImplementedError(f"{type(self).__name__} cannot be made longer")

    def publish(self, context: StageContext) -> None:
        """Put copies of a finished stage's files where people look for them."""
        return

    @abstractmethod
    def run(self, context: StageContext) -> dict[str, Any]:
        """Make the artifact in `context.folder`, continuing what is there; returns facts to record
        (JSON-able)."""


@dataclass
class ModelStage(Stage):
    """A stage that leaves a model folder (`models.native`): others start from it, ask it, measure it, export it."""

    FILES: ClassVar[tuple[str, ...]] = MODEL_FILES
    NEEDED: ClassVar[tuple[str, ...]] = ("model.safetensors", "model.json")

    @property
    def keeps_best(self) -> bool:
        """Whether it also leaves the best model of its training."""
        return False


def check_which(which: str, name: str, stages: Mapping[str, Stage]) -> None:
    """Raise ValueError for a `which` that is neither "last" nor "best", or asks for the best model of a stage that keeps
    none."""
    if which not in WHICH:
        raise ValueError(f"which: found {which!r}, expected one of {list(WHICH)}")
    stage = stages[name]
    if which == "best" and not (isinstance(stage, ModelStage) and stage.keeps_best):
        raise ValueError(
            f"which: found 'best', but {name!r} has no `monitor` that keeps one; expected 'last'"
        )
