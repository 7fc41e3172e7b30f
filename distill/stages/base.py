"""The base classes of stages, the context that they run in, and the settings of the group `trainer`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import torch

from distill.engine.parallel import SHARD
from distill.engine.stored import FILES as CHECKPOINT_FILES
from distill.models.description import DESCRIPTION
from distill.models.weights import FILE_BYTES, INDEX, PART, WEIGHTS
from distill.stages.display import KINDS, Display
from distill.stages.made import Made
from distill.stages.ownership import RECORDS, patterns
from distill.world import SECONDS, World

WHICH = ("last", "best")
PROFILERS = ("simple", "advanced", "pytorch")
MODEL_FILES = (*patterns(WEIGHTS, INDEX, DESCRIPTION), PART)
TRAINED_FILES = (
    *MODEL_FILES,
    *(f"checkpoints/{name}" for name in CHECKPOINT_FILES),
    *patterns("logs/metrics.jsonl", "logs/wandb_id"),
    *(f"best/{name}" for name in MODEL_FILES),
    *patterns("best.json", "monitor/evaluations.jsonl"),
    r"monitor/(step|diagnostics)_\d{7,}\.png",
    r"logs/trace_\d+-\d+_\d+\.json",
    *(rf"nodes/\d{{3,}}/{name}" for name in MODEL_FILES),
    *patterns("nodes.json", "stored.json"),
)


def check_types(value: Any, where: str = "") -> None:
    """Raise ValueError naming the field of a config dataclass whose value is not of its declared type."""
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
class Window:
    """Steps of the student that torch's profiler records: `steps` of them after the first `start`."""

    start: int
    steps: int = 3

    def __post_init__(self) -> None:
        if self.start < 0 or self.steps < 1:
            raise ValueError(
                f"start, steps: found {self.start}, {self.steps}, expected at least 0 and at least 1"
            )


@dataclass(frozen=True)
class Settings:
    """Options of the group `trainer`: how stages run. They do not enter digests."""

    accelerator: str = "auto"
    devices: int = 1
    shard: str = "none"
    reduce_each: bool = False
    threads: int | None = None
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    log_every: int = 20
    max_nonfinite: int = 10
    max_nonfinite_share: float = 0.05
    activation_checkpointing: bool = False
    fast_dev_run: int | bool = 0
    profiler: str | dict[str, Any] | None = None
    profile: Window | None = None
    workers: int | None = None
    prefetch: int = 2
    timeout: int = SECONDS
    progress: str = "auto"
    file_bytes: int = FILE_BYTES

    def __post_init__(self) -> None:
        check_types(self)
        counts = (
            "devices",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "max_nonfinite",
            "threads",
            "prefetch",
            "timeout",
            "file_bytes",
        )
        for name in counts:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers: expected at least 0 or null, found {self.workers}")
        if self.fast_dev_run < 0:
            raise ValueError(f"fast_dev_run: expected at least 0, found {self.fast_dev_run}")
        if isinstance(self.profiler, str) and self.profiler not in PROFILERS:
            raise ValueError(
                f"profiler: found {self.profiler!r}, expected one of {list(PROFILERS)}, null or a mapping with _target_"
            )
        if not 0 <= self.max_nonfinite_share <= 1:
            raise ValueError(
                f"max_nonfinite_share: expected a share in [0, 1], found {self.max_nonfinite_share}"
            )
        if self.progress not in KINDS:
            raise ValueError(f"progress: found {self.progress!r}, expected one of {list(KINDS)}")
        if self.shard not in SHARD:
            raise ValueError(f"shard: found {self.shard!r}, expected one of {list(SHARD)}")

    @property
    def fitting(self) -> dict[str, Any]:
        """Those that `engine.fit.Fit` takes under their names."""
        names = ("shard", "checkpoint_every", "keep_checkpoints", "log_every", "threads", "max_nonfinite")
        return {
            name: getattr(self, name)
            for name in (*names, "reduce_each", "max_nonfinite_share", "workers", "prefetch")
        }

    @property
    def device(self) -> torch.device:
        """The device type that stages run on. Raises ValueError if it is not available."""
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
    """The arguments of `Stage.run`.

    Attributes:
        name: of the stage. folder: where it writes. inputs: folders of its inputs by role.
        seed: of the run. settings: the group `trainer`. loggers: configs of loggers.
        display: progress bars and messages. run_folder: folder of the run. recipe: its name.
        digest: of the identity. world: process group. identity: see `stages.artifact.identity`.
    """

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
    callbacks: tuple[Mapping[str, Any], ...] = ()

    @property
    def sharded(self) -> bool:
        """Whether networks are sharded over several processes."""
        return self.world.size > 1 and self.settings.shard != "none"

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device = self.settings.device
        return torch.device("cuda", self.world.local_rank) if device.type == "cuda" else device


class FastDevRun(Exception):
    """A training stage was tried with `trainer.fast_dev_run`; the run ends there, since nothing was made."""


@dataclass
class Stage(ABC):
    """A stage of a recipe. Its dataclass fields are its config schema; nested configs stay plain containers.

    Attributes:
        LENGTH: the field that may be increased to continue a finished stage, such as `steps`; empty if there is none.
        REFERENCES: fields whose value is the name of another stage.
        BY_CONTENT: fields that are no part of the digest; the fingerprint has the content that they name.
        FILES: files that the stage makes, relative to its folder: regular expressions that match each path component.
            Only these are recorded when the stage finishes, and deleted when it is made again.
        NEEDED: files that must exist when it finishes; of those in "A|B" one.
    """

    LENGTH: ClassVar[str] = ""
    REFERENCES: ClassVar[tuple[str, ...]] = ()
    BY_CONTENT: ClassVar[tuple[str, ...]] = ()
    FILES: ClassVar[tuple[str, ...]] = ()
    NEEDED: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def made(cls) -> tuple[str, ...]:
        """Return the patterns of all files that the stage and the run write to its folder."""
        return (*patterns(*RECORDS), *cls.FILES)

    @classmethod
    def needed(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the files that a stage of this config must have made when it finishes."""
        return cls.NEEDED

    def inputs(self) -> dict[str, str]:
        """Return role -> name of the input stage."""
        return {role: value for role in self.REFERENCES if isinstance(value := getattr(self, role), str)}

    def fingerprint(self) -> str:
        """Return a digest of the data that the stage reads from outside the run; empty if it reads none."""
        return ""

    def check(self, stages: Mapping[str, Stage]) -> None:
        """Raise ValueError for options that cannot work. `stages`: the earlier stages by name."""
        for role, name in self.inputs().items():
            if name not in stages:
                raise ValueError(
                    f"{role}: found {name!r}, expected a stage before this one: one of {list(stages)}"
                )

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """Build everything that `run` builds and raise the errors that it would raise. Trains and writes nothing.

        Args:
            before: the outputs of the earlier stages by name.

        Returns:
            The output that this stage will have.
        """
        return Made()

    def begun(self, folder: Path) -> bool:
        """Return whether `folder` contains work of an interrupted run that `run` would continue."""
        return False

    def lasting(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of the hashed config that must not change when `LENGTH` is increased.

        Options that a method computes from the length are included with their computed values."""
        return {key: value for key, value in config.items() if key != self.LENGTH}

    def seams(self, folder: Path, content: Mapping[str, Any]) -> list[dict[str, int]]:
        """Return the entry `extended` of the stage's identity if it is continued with a larger `LENGTH`.

        Args:
            folder: of the stage.
            content: its recorded identity.

        Raises:
            ValueError: if the stage cannot be continued.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be trained further")

    def publish(self, context: StageContext) -> None:
        """Copy files of the finished stage to the top of the run folder."""
        return

    @abstractmethod
    def run(self, context: StageContext) -> dict[str, Any]:
        """Make the files of the stage in `context.folder`, or continue an interrupted run.

        Returns:
            Facts for the record of the stage, as JSON containers.
        """


@dataclass
class ModelStage(Stage):
    """A stage whose output is a model folder (`models.native`)."""

    FILES: ClassVar[tuple[str, ...]] = MODEL_FILES
    NEEDED: ClassVar[tuple[str, ...]] = (f"{WEIGHTS}|{INDEX}", DESCRIPTION)

    @property
    def keeps_best(self) -> bool:
        """Whether it also saves the best model of its training."""
        return False


def check_which(which: str, name: str, stages: Mapping[str, Stage]) -> None:
    """Raise ValueError unless `which` is "last", or "best" for a stage that saves its best model."""
    if which not in WHICH:
        raise ValueError(f"which: found {which!r}, expected one of {list(WHICH)}")
    stage = stages[name]
    if which == "best" and not (isinstance(stage, ModelStage) and stage.keeps_best):
        raise ValueError(
            f"which: found 'best', but {name!r} has no `monitor` to choose the best model; expected 'last'"
        )
