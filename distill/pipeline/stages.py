"""Stages that make models and pairs: Train, Load, Generate."""

from __future__ import annotations

import inspect
import json
import os
import resource
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from hydra.utils import get_class, instantiate

from distill.cache.pairs import Header, Pairs
from distill.cache.writer import write_pairs
from distill.data.rng import noise_checksum, stream_key
from distill.data.source import Source
from distill.engine.fit import Fit, train
from distill.engine.logging import Jsonl, Logger
from distill.engine.module import STUDENT, DistillModule
from distill.files import sha256_file, write_json
from distill.models.denoiser import Denoiser
from distill.models.native import (
    DESCRIPTION,
    WEIGHTS,
    build,
    describe,
    load_model,
    read_description,
    save_model,
)
from distill.pipeline.stage import Room, Stage

# Threads that a net can use: (parameters below, threads). Small nets spend their time between operations, not
# in them.
THREAD_TABLE = ((1_000_000, 2), (10_000_000, 4), (100_000_000, 8))


def use_threads(room: Room, parameters: int) -> int:
    """Set torch's thread count for a stage: the option, else what an earlier start of the stage wrote down
    (bit-equal resume needs the same count), else the table."""
    path = room.folder / "execution.json"
    wanted = room.settings.threads
    if wanted is None and path.is_file():
        wanted = int(json.loads(path.read_text())["threads"])
    if wanted is None:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        wanted = min(cores, next((threads for below, threads in THREAD_TABLE if parameters < below), cores))
    write_json(path, {"threads": wanted})
    torch.set_num_threads(wanted)
    return wanted


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the device, or on a CPU the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Train(Stage):
    """Train a student with a method.

    Attributes:
        method: config of a `DistillModule`; its constructor takes `student` and, if it names it, `teacher`.
        data: name of a Generate stage, or the config of a `Source`.
        init: name of the stage whose model the student starts from; None: a fresh net from `net`, `process`,
            `kind`.
        teacher: name of the stage whose model the method asks; None where it needs none.
        steps: optimizer steps of the student. batch_size: samples a step, over all processes.
        optim: settings an update, see `engine.update.Optim`; a schedule without a total falls over `steps`.
        stream: names the stage's random draws.
        path: a model folder to use instead of training (the stage becomes a `Load`).
    """

    LENGTH: ClassVar[tuple[str, ...]] = ("steps",)
    REFERENCES: ClassVar[tuple[str, ...]] = ("init", "teacher", "data")

    method: dict[str, Any]
    data: str | dict[str, Any]
    steps: int
    batch_size: int
    optim: dict[str, dict[str, Any]]
    init: str | None = None
    teacher: str | None = None
    net: dict[str, Any] | None = None
    process: dict[str, Any] | None = None
    kind: str = "velocity"
    accumulate: int = 1
    precision: str = "32-true"
    stream: str = "train"
    path: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.init is None and (self.net is None or self.process is None):
            raise ValueError("init: without a stage to start from, both `net` and `process` are needed")
        self._takes = inspect.signature(get_class(self.method["_target_"])).parameters

    def check(self, stages: Mapping[str, Stage]) -> None:
        """References exist, and the method gets a teacher exactly if it wants one."""
        super().check(stages)
        if ("teacher" in self._takes) != (self.teacher is not None):
            wants = "needs a teacher" if "teacher" in self._takes else "takes no teacher"
            raise ValueError(
                f"teacher: found {self.teacher!r}, but the method {self.method['_target_']} {wants}"
            )
        if isinstance(self.data, str) and not isinstance(stages[self.data], Generate):
            raise ValueError(
                f"data: {self.data!r} is a {type(stages[self.data]).__name__} stage, expected a Generate "
                "stage"
            )

    def fingerprint(self) -> str:
        """The data's fingerprint, where it does not come from a stage."""
        return "" if isinstance(self.data, str) else instantiate(self.data).fingerprint()

    def run(self, room: Room) -> dict[str, Any]:
        """Train to `steps`, continuing from the last checkpoint, and save the student (its average where
        there is one)."""
        source: Source = Pairs(room.inputs["data"]) if isinstance(self.data, str) else instantiate(self.data)
        student, net, num_classes = self._student(room, source)
        threads = use_threads(room, sum(p.numel() for p in student.parameters()))
        networks = {"student": student}
        if self.teacher is not None:
            networks["teacher"] = load_model(room.inputs["teacher"]).denoiser
        method: DistillModule = instantiate(self.method, **networks)
        method.prepare(self._optim(), seed=room.seed, stream=self.stream)
        config = {
            "method": self.method,
            "net": net,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "threads": threads,
        }
        (room.folder / "logs").mkdir(parents=True, exist_ok=True)
        loggers: list[Logger] = [Jsonl(room.folder / "logs")]
        loggers += [instantiate(dict(c), folder=room.folder / "logs", settings=config) for c in room.loggers]
        fit = Fit(
            self.steps,
            self.batch_size,
            self.accumulate,
            self.precision,
            room.settings.device.type.replace("cuda", "gpu"),
            room.settings.checkpoint_every,
            room.settings.log_every,
        )
        with room.display.bar(self.steps) as bar:

            def show(step: int, text: str) -> None:
                if text:
                    bar.set_postfix_str(text, refresh=False)
                bar.update(step - bar.n)

            train(
                method,
                source,
                fit,
                folder=room.folder / "checkpoints",
                config=config,
                loggers=loggers,
                on_progress=show,
            )
            bar.update(self.steps - bar.n)
        result = method.best(STUDENT)
        assert isinstance(result, Denoiser)
        result.coupling = method.coupling
        save_model(room.folder, result, describe(result, net, method.spec(), num_classes))
        return {
            "train_seconds": method.progress.seconds,
            "images": method.progress.images,
            "steps": method.progress.step,
            "parameters": sum(p.numel() for p in student.parameters()),
            "peak_memory_bytes": peak_memory_bytes(room.settings.device),
            "threads": threads,
        }

    def _student(self, room: Room, source: Source) -> tuple[Denoiser, dict[str, Any], int]:
        """The student before training, the config that its net is built from, and its number of classes."""
        if self.init is not None:
            generator = load_model(room.inputs["init"])
            student, net = generator.denoiser, read_description(room.inputs["init"])["net"]
        else:
            assert self.net is not None
            assert self.process is not None
            torch.manual_seed(stream_key(room.seed, self.stream, "init") % 2**63)
            net = self.net
            student = Denoiser(build(net), build(self.process), self.kind, source.sample_shape)
        if student.sample_shape != source.sample_shape:
            raise ValueError(
                f"data: samples of shape {source.sample_shape}, but the student makes {student.sample_shape}"
            )
        return student, net, int(net.get("num_classes", 0))

    def _optim(self) -> dict[str, dict[str, Any]]:
        """Optimizer settings with their objects built; schedules that have a `total` and were given none get
        `steps`."""
        built: dict[str, dict[str, Any]] = {}
        for key, settings in self.optim.items():
            schedule = dict(settings["schedule"])
            if "total" in schedule and schedule["total"] is None:
                schedule["total"] = self.steps
            built[key] = dict(settings) | {
                "optimizer": instantiate(settings["optimizer"], _partial_=True, _convert_="all"),
                "schedule": instantiate(schedule),
            }
        return built


@dataclass
class Load(Stage):
    """A model that exists already: the artifact of another run's training stage, or an export.

    Attributes:
        path: a model folder (model.safetensors and model.json).
    """

    path: str

    def fingerprint(self) -> str:
        """sha256 of the weights and of their description: where they lie does not matter, what they are
        does."""
        read_description(Path(self.path))
        return sha256_file(Path(self.path) / WEIGHTS) + sha256_file(Path(self.path) / DESCRIPTION)

    def run(self, room: Room) -> dict[str, Any]:
        """Check the model and link it (copy it across file systems) into the run."""
        source = Path(self.path)
        load_model(source)
        for name in (WEIGHTS, DESCRIPTION):
            target = room.folder / name
            target.unlink(missing_ok=True)
            try:
                os.link(
                    source / name, target
                )  # finished files are replaced and never rewritten, so sharing them is safe
            except OSError:
                shutil.copyfile(source / name, target)
        return {"train_seconds": None, "peak_memory_bytes": None}


@dataclass
class Generate(Stage):
    """Pairs of noise and teacher sample.

    Attributes:
        teacher: name of the stage whose model makes them.
        count: pairs. sampler: {solver, steps} of the transport. guidance_scale: g in u + g (c - u).
        stream: names the noise; two stages with the same stream and seed start from the same noise.
    """

    REFERENCES: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: str
    count: int
    sampler: dict[str, Any] = field(default_factory=lambda: {"solver": "euler", "steps": 25})
    guidance_scale: float = 1.0
    stream: str = "pairs"
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch_size < 1:
            raise ValueError(f"count, batch_size: expected at least 1, found {self.count}, {self.batch_size}")
        if set(self.sampler) != {"solver", "steps"} or self.sampler["steps"] < 1:
            raise ValueError(f"sampler: expected a solver and steps >= 1, found {self.sampler}")

    def run(self, room: Room) -> dict[str, Any]:
        """Write the cache, continuing with the first shard that is missing, then read it back once."""
        teacher = load_model(room.inputs["teacher"])
        if teacher.denoiser.coupling == "endpoint":
            raise ValueError(
                f"teacher: {self.teacher!r} is a one-step student, valid at t_max alone; pairs need an ODE"
            )
        use_threads(room, sum(p.numel() for p in teacher.denoiser.parameters()))
        shape = teacher.denoiser.sample_shape
        header = Header(
            sample_shape=shape,
            count=self.count,
            seed=room.seed,
            stream=self.stream,
            noise_checksum=noise_checksum(room.seed, self.stream, shape),
            teacher=sha256_file(room.inputs["teacher"] / WEIGHTS),
            solver=self.sampler["solver"],
            steps=self.sampler["steps"],
            guidance_scale=float(self.guidance_scale),
            num_classes=teacher.num_classes,
        )
        with room.display.bar(self.count, unit="pair") as bar:
            write_pairs(
                room.folder,
                teacher.denoiser,
                header,
                batch_size=self.batch_size,
                device=room.settings.device,
                on_samples=bar.update,
            )
        Pairs(room.folder)
        return {"count": self.count, "nfe_per_pair": self.sampler["steps"]}
