"""The Train stage: a method, run by the engine on data or pairs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from hydra.utils import instantiate

from distill.cache.pairs import Pairs
from distill.data.rng import stream_key
from distill.data.source import Source
from distill.engine import checkpoint
from distill.engine.fit import PRECISIONS, Fit, train
from distill.engine.loggers import close, summarize
from distill.engine.memory import predicted
from distill.engine.module import DistillModule
from distill.engine.networks import recompute_activations
from distill.engine.parallel import full_state, whole, width
from distill.engine.stored import Refused
from distill.models.build import build_net, build_process
from distill.models.conditions import of_source
from distill.models.generator import Generator
from distill.models.model import Model
from distill.models.native import load_models, save_model
from distill.stages.adapt import Adapt, adapted, files_digest
from distill.stages.artifact import digest_of, lasting_identity
from distill.stages.attached import attachments
from distill.stages.base import TRAINED_FILES, FastDevRun, ModelStage, Stage, StageContext, check_types
from distill.stages.encode import Encode, replaced_of, source_of
from distill.stages.encode_images import EncodeImages
from distill.stages.extension import seams_after, seams_of
from distill.stages.generate import Generate
from distill.stages.made import (
    Made,
    PairsMade,
    check_reads,
    check_student,
    copied,
    device_of,
    fresh_model,
    of_pairs,
    try_build,
)
from distill.stages.monitor import Monitor, options_of, warn_of_judge
from distill.stages.nodes import (
    check_path,
    check_recorded,
    check_stored,
    node_saver,
    read_nodes,
    write_manifest,
)
from distill.stages.optim import build_optim, check_optim
from distill.stages.same_model import check_decoder, check_fingerprint, check_pairs_of
from distill.stages.targets import check_method, resolve
from distill.stages.threads import PeakMemory, use_threads
from distill.stages.tokenize import Tokenize
from distill.stages.trial import parts_digest
from distill.typed import parse

CHECKPOINTS = "checkpoints"
ROLES, MAKE_DATA = ("student", "teacher"), (Generate, Encode, EncodeImages, Tokenize)


@dataclass
class Train(ModelStage):
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
        monitor: evaluation during training, see `stages.monitor.Options`; None for none. The best model so far is
            kept in `best/`.
        networks: further frozen models by the name under which the method's constructor takes them, and the stages that
            made them.
        model: class and options of a fresh model that is no denoiser, {_target_: distill.models.tokens.TokenTeacher}; it has
            its own `process` and `kind`.
        nodes: name of a stage that stored nodes on its way (method `degrade`), for a method that takes them.
        adapt: changes to the model of `init`, see `adapted`: {kind: v, net: {guidance_embedding: 64}}.
    """

    LENGTH: ClassVar[str] = "steps"
    REFERENCES: ClassVar[tuple[str, ...]] = ("init", "teacher", "data", "nodes")
    FILES: ClassVar[tuple[str, ...]] = TRAINED_FILES

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
    monitor: dict[str, Any] | None = None
    adapt: dict[str, Any] | None = None
    networks: dict[str, str] | None = None
    nodes: str | None = None
    model: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: found {self.precision!r}, expected one of {list(PRECISIONS)}")
        if self.adapt is not None:
            if self.init is None:
                raise ValueError(f"adapt: found {self.adapt}, but no `init`; expected a model to change")
            parse(Adapt, self.adapt, "adapt")
        self._monitor = options_of(self.monitor)
        if self.model is not None and (self.init is not None or self.process is not None or self.net is None):
            raise ValueError("model: found a fresh model, expected `net`, and no `init` and `process`")
        if self.init is None and (self.net is None or (self.process is None and self.model is None)):
            raise ValueError("init: without a stage to start from, both `net` and `process` are needed")
        if self.init is None and self.process is not None:
            build_process(self.process).check_kind(self.kind)
        check_optim(self.optim, self.steps)
        self._takes = inspect.signature(resolve(self.method, "method")).parameters

    @property
    def keeps_best(self) -> bool:
        """A monitor keeps the best model."""
        return self._monitor is not None and self._monitor.metric is not None

    @property
    def _adapts(self) -> bool:
        """Whether the student is an adapter."""
        return (self.adapt or {}).get("lora") is not None

    def inputs(self) -> dict[str, str]:
        """The references, and the further networks by their role."""
        return super().inputs() | dict(self.networks or {})

    def check(self, stages: Mapping[str, Stage]) -> None:
        """References exist, and the method gets exactly the models that it wants."""
        super().check(stages)
        further = dict(self.networks or {})
        if unknown := sorted(
            set(further) - set(self._takes) | set(further) & {"init", "data", "nodes", *ROLES}
        ):
            raise ValueError(
                f"networks: found {unknown}, which the method {self.method['_target_']} does not take as further networks"
            )
        for role, name in {"init": self.init, "teacher": self.teacher, **further}.items():
            if name is not None and not isinstance(stages[name], ModelStage):
                raise ValueError(f"{role}: {name!r} makes no model; expected a stage with a model")
        check_method(self.method, self._takes, {*ROLES, "nodes", *further})
        check_pairs_of(self, stages)
        if self.nodes is not None and "nodes" not in self._takes:
            raise ValueError(
                f"nodes: found {self.nodes!r}, but the method {self.method['_target_']} takes none"
            )
        if self.nodes is not None and self.teacher is None:
            raise ValueError("nodes: found without a `teacher`, where their way begins")
        if self.nodes is not None:
            recorder = stages[self.nodes]
            if not isinstance(recorder, Train):
                raise ValueError(
                    f"nodes: {self.nodes!r} does not train; expected a stage with the method `degrade`"
                )
            check_recorded(self.nodes, recorder.method, self.method)
            if (samples := (recorder.networks or {}).get("generator")) != self.init:
                raise ValueError(
                    f"init: found {self.init!r}, but the nodes of {self.nodes!r} are recorded on samples of {samples!r}; "
                    "expected the same"
                )
        if ("teacher" in self._takes) != (self.teacher is not None):
            wants = "needs a teacher" if "teacher" in self._takes else "takes no teacher"
            raise ValueError(
                f"teacher: found {self.teacher!r}, but the method {self.method['_target_']} {wants}"
            )
        if isinstance(self.data, str) and not isinstance(stages[self.data], MAKE_DATA):
            found = type(stages[self.data]).__name__
            raise ValueError(f"data: {self.data!r} is a {found} stage, expected a Generate stage")

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """Build the student and the method on what the stages before will make, and try the monitor's measurement."""
        pairs = before[self.data].pairs if isinstance(self.data, str) else None
        source: Source | PairsMade = pairs if pairs is not None else instantiate(self.data)
        given = {role: before[name].model for role, name in self._models().items()}
        models = copied(given, adapters=self._adapts)
        if self.nodes is not None and not before[self.nodes].nodes:
            raise ValueError(
                f"nodes: {self.nodes!r} stores no nodes; expected a stage with the method `degrade`"
            )
        start = self._start(models, 0, source, try_build)
        check_decoder(start.denoiser, source, trained=False)
        method = self._method(start.denoiser, models, ())
        check_reads(method, self.method, source, self.data, before)
        method.prepare(build_optim(self.optim, self.steps), seed=0, stream=self.stream)
        generator = method.as_generator()
        spec = generator.spec
        if pairs is not None and self.teacher is None:
            spec = of_pairs(spec, generator.denoiser, pairs)
        if (monitor := self._monitor) is not None and monitor.metric is not None:
            labels = generator.conditions.ask(count=monitor.count).get("label")
            try:
                (meter := monitor.meter()).trial(generator.shape, labels)
            except ValueError as error:
                raise ValueError(f"monitor.{error}") from error
            warn_of_judge(method.feature_space, meter.features)
        model, nodes = Generator(generator.denoiser, spec), tuple(method.snapshots())
        return Made(model=model, nodes=nodes, trained=True, memory=predicted(method, self.accumulate))

    def fingerprint(self) -> str:
        """The data's fingerprint, where it does not come from a stage, and what a monitor, a LoRA file and the method read."""
        parts = ["" if isinstance(self.data, str) else instantiate(self.data).fingerprint()]
        parts += [] if self._monitor is None else [self._monitor.fingerprint()]
        return " ".join([*parts, files_digest(self.adapt), parts_digest(self.method)]).strip()

    def begun(self, folder: Path) -> bool:
        """A checkpoint is there."""
        return bool(checkpoint.names_in(folder / CHECKPOINTS))

    def lasting(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """All but `steps`, which only a schedule without a total may follow."""
        return super().lasting(config) | {"method": self._method_options(config["method"], config["steps"])}

    def _method_options(self, method: Mapping[str, Any], steps: int) -> dict[str, Any]:
        """The method's config; its `total_steps`, where it is null, is the stage's."""
        if "total_steps" not in self._takes or method.get("total_steps") is not None:
            return dict(method)
        return {**method, "total_steps": steps}

    def seams(self, folder: Path, content: Mapping[str, Any]) -> list[dict[str, int]]:
        """Those of the checkpoint, and the step that it is at."""
        return seams_after(folder / CHECKPOINTS, content, self._compared(content))

    def _compared(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """What checkpoints hold of the stage's identity."""
        return {"stage": digest_of(lasting_identity(self, content))} if content else {}

    def run(self, context: StageContext) -> dict[str, Any]:
        """Train to `steps`, continuing from the last checkpoint, and save the student (its average where there is one)."""
        memory, source = PeakMemory(context.device), source_of(self.data, context.inputs)
        folders = {role: context.inputs[role] for role in self._models()}
        world, sharded = context.world, context.sharded
        models = load_models(folders, adapters=self._adapts, mapped=sharded)
        start = self._start(models, context.seed, source)
        student = start.denoiser
        check_decoder(student, source, trained=True)
        threads = use_threads(context, sum(p.numel() for p in student.parameters()))
        nodes: Sequence[Path] = ()
        if self.nodes is not None:
            nodes = read_nodes(context.inputs["nodes"], context.inputs["teacher"])
            check_path(context.inputs["nodes"], context.inputs.get("init"), self.method)
        method = self._method(student, models, nodes)
        check_fingerprint(method.PAIRS_OF, source, folders)
        optim = build_optim(self.optim, self.steps)
        method.prepare(optim, seed=context.seed, stream=self.stream, world=world, sharded=sharded)
        if context.settings.activation_checkpointing:
            recompute_activations(method.frozen | method.networks)
        trainer = context.settings
        foreseen = predicted(method, self.accumulate).total(width(world, trainer.shard), trainer.reduce_each)

        def save(folder: Path) -> None:
            """The student as it is now, as a model folder. Collective."""
            made = method.as_generator()
            if isinstance(source, Pairs) and self.teacher is None:  # else the data are not what is learned
                made = Generator(made.denoiser, of_pairs(made.spec, made.denoiser, source.header))
            if world.main:  # gathers the tensors in the same order
                save_model(folder, made.denoiser, made.spec, file_bytes=trainer.file_bytes, whole=whole)
            else:
                full_state(made.denoiser.net, keep=False)

        monitor = None if self._monitor is None else Monitor(self._monitor, context, save, source)
        settings = {"method": self.method, "net": student.net_config(), "steps": self.steps}
        settings |= {"batch_size": self.batch_size, "threads": threads}
        keep = node_saver(context.folder, method.snapshots(), save, world.main)

        def facts() -> dict[str, Any]:
            return {
                "train_seconds": method.progress.seconds,
                "images": method.progress.images,
                "steps": method.progress.step,
                "skipped": {name: pair[0] for name, pair in method.nonfinite.to_dict().items()},
                "parameters": sum(p.numel() for p in student.parameters()),
                "peak_memory_bytes": memory.bytes(),
                "threads": torch.get_num_threads(),  # of a stage that was continued, those of its checkpoint
                "processes": context.world.size,
                "predicted_bytes": foreseen,
                "best": monitor.facts() if monitor is not None else {},
                **replaced_of(source, context.world),
            }

        self._fit(context, method, source, settings, monitor, keep, facts)
        save(context.folder)
        if method.snapshots() and context.world.main:
            check_stored(context.folder, method.snapshots())
            write_manifest(context.folder, method.snapshots(), context.inputs["init"])
        return facts()

    def _fit(
        self,
        context: StageContext,
        method: DistillModule,
        source: Source,
        settings: dict[str, Any],
        monitor: Monitor | None,
        snapshot: Callable[[int], None],
        facts: Callable[[], dict[str, Any]],
    ) -> None:
        """Train with the loggers, which get the facts at the end, callbacks and profiler of the run, and a bar."""
        attached = attachments(context, settings)
        fit = Fit(
            self.steps,
            self.batch_size,
            self.accumulate,
            self.precision,
            device=context.device.type,
            fast_dev_run=int(context.settings.fast_dev_run),
            **context.settings.fitting,
        )
        with context.display.bar(self.steps, images=self.batch_size) as bar:

            def show(step: int, text: str) -> None:
                if text:
                    bar.note(text)
                bar.reach(step)

            try:
                train(
                    method,
                    source,
                    fit,
                    folder=context.folder / CHECKPOINTS,
                    config=self._compared(context.identity),
                    seams=seams_of(context.identity) if context.identity else None,
                    **attached,
                    on_progress=show,
                    evaluation=monitor,
                    snapshot=snapshot,
                )
                summarize(attached["loggers"], facts())
            except Refused as error:
                raise ValueError(f"{error}; redo={context.name} trains from the start") from error
            finally:  # also where the run is stopped
                close(attached["loggers"])
            if fit.fast_dev_run:
                raise FastDevRun(
                    f"stages.{context.name}: trainer.fast_dev_run={fit.fast_dev_run}: ran that many iterations; nothing was "
                    "saved, and later stages did not run"
                )
            bar.reach(self.steps)

    def _models(self) -> dict[str, str]:
        """role -> stage, of the models that the method gets."""
        named = {"init": self.init, "teacher": self.teacher, **(self.networks or {})}
        return {role: name for role, name in named.items() if name is not None}

    def _start(
        self, models: Mapping[str, Generator], seed: int, source: Source | PairsMade, make: Any = build_net
    ) -> Generator:
        """The student before training: that of `init`, perhaps adapted, or a fresh one whose net `make` builds."""
        if (init := models.get("init")) is None or self.adapt is not None:
            torch.manual_seed(stream_key(seed, self.stream, "init") % 2**63)
        if init is None:
            assert self.net is not None
            init = fresh_model(
                self.net, self.process, self.kind, source, models.get("teacher"), make, self.model
            )
        elif self.adapt is not None:
            with device_of(init.denoiser.net):
                init = Generator(adapted(init.denoiser, self.adapt), init.spec)
        check_student(init.denoiser, source.sample_shape, of_source(source))
        return init

    def _method(
        self, student: Model, models: Mapping[str, Generator], nodes: Sequence[Path]
    ) -> DistillModule:
        """The method on its networks."""
        given: dict[str, Any] = {role: model.denoiser for role, model in models.items() if role != "init"}
        if "nodes" in self._takes:
            given["nodes"] = [str(folder) for folder in nodes]
        options = self._method_options(self.method, self.steps)
        method: DistillModule = instantiate(options, student=student, **given, _convert_="all")
        if (last := max(method.snapshots(), default=0)) > self.steps:
            raise ValueError(
                f"method: stores a node after step {last}, but the stage has steps: {self.steps}"
            )
        return method
