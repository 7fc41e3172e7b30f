"""Base class of methods: a LightningModule that runs the updates that a method declares.

It uses manual optimization, because a method may have several optimizers in one iteration, and counts, clips and averages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self, TypeVar, cast

import lightning as L
import torch
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.data.rng import Draws
from distill.data.source import Source
from distill.engine.ema import EmaUpdater
from distill.engine.hooks import StepHooks
from distill.engine.networks import check_apart, check_model, frozen_copy
from distill.engine.nonfinite import NonFinite, bad_step, step_unless
from distill.engine.parallel import full, net_of, place
from distill.engine.params import ParameterSet
from distill.engine.progress import Progress
from distill.engine.running import Running
from distill.engine.update import Average, Diagnostics, Optim, Step, Update
from distill.models.adapters import forget_origin
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.model import Model
from distill.models.result import Result
from distill.typed import check_keys
from distill.world import World

STUDENT = "student"
Frozen = TypeVar("Frozen", bound=nn.Module)


class DistillModule(L.LightningModule):
    """Subclasses build their networks in `__init__` (whose signature is their config schema), say what is
    trained in `updates` and what the student is afterwards in `result`. The trained student is always called
    "student".

    Of its arguments a method changes the weights of the student's net alone: to train a student with other properties, use
    `student.with_(...)`."""

    # Options of the constructor that name model folders. Checkpoints record their weights, not their paths.
    FOLDERS: ClassVar[tuple[str, ...]] = ()
    PAIRS_OF: ClassVar[str | None] = None  # role of the model whose samples pairs must be; None: any
    MODELS: ClassVar[tuple[type[Model], ...]] = (Denoiser,)  # classes of the models that it is given
    # Fields of a batch that the losses always need beside its conditions, see `needs`.
    reads: ClassVar[tuple[str, ...]] = ()
    guidance_range: tuple[float, float] | None = None  # of each pair's own guidance scale, if read
    feature_space: nn.Module | None = None  # in which distributions are compared: it cannot judge
    given: Any  # (arguments, options) of the constructor, described by `engine.made` once training begins

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Store the arguments of the constructor: checkpoints record them."""
        made = super().__new__(cls)
        made.__dict__["given"] = (args, options)
        return made

    def __init__(self, student: Model) -> None:
        super().__init__()
        check_model("student", student, self.MODELS)
        self.automatic_optimization = False
        self.student: Denoiser = student  # type: ignore[assignment]  # or another of `MODELS`
        self.frozen: dict[str, nn.Module] = {}
        self.progress, self.nonfinite = Progress(), NonFinite()
        self._step_caches: dict[str, Running] = {}
        self._running: Running | None = None  # the update that ran last
        self._reduce_each = False
        self._hook, self.world, self.seed, self.stream = StepHooks(), World(), 0, "train"
        self.begun: dict[str, Any] = {}  # what training began with, once it has: see `engine.made`
        self.latest: Mapping[str, Tensor | float] = {}  # what the last iteration logs, on the device
        self.evaluated: Mapping[str, float] | None = None  # by an evaluation of this step, until it is logged

    def __setattr__(self, name: str, value: Any) -> None:
        """A frozen network can be assigned to an attribute without becoming a submodule (and part of checkpoints)."""
        # Lightning stores the name of the running hook, some twenty times a step.
        plain = (value is None or type(value) is str) and name in self.__dict__
        frozen = self.__dict__.get("frozen", {}).values() if isinstance(value, nn.Module) else ()
        if plain or any(value is kept for kept in frozen):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # --- what a method declares

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Fields of a batch that the losses need with these options of the constructor: a source without them is refused."""
        return cls.reads

    def updates(self) -> Sequence[Update]:
        """The updates of one iteration, in the order in which they run."""
        raise NotImplementedError(f"{type(self).__name__} declares no updates")

    def result(self) -> Result:
        """Properties of the student after training, for every model that is saved or sampled."""
        raise NotImplementedError(f"{type(self).__name__} declares no result")

    def averages(self) -> Mapping[str, Average]:
        """Further averages by name, such as a target network; found in `self.ema` once `prepare` has run."""
        return {}

    def diagnostics(self, batch: Batch, draws: Draws) -> Diagnostics:
        """Scalars to log and images to show at an evaluation, from the same samples and draws each time. Called without
        gradients, on every process."""
        return Diagnostics()

    def monitored(self, generator: Generator, source: Any, ids: Tensor, seed: int, stream: str) -> Tensor:
        """The samples `ids` that a monitor measures, on the CPU; by default the student's."""
        return generator.sample_ids(ids, seed=seed, stream=stream)

    def snapshots(self) -> Sequence[int]:
        """Student steps after which the stage saves the student (DisBack's path)."""
        return ()

    def before_training(self, source: Source) -> None:
        """Called before the first iteration of each start, on every process, with the networks on their devices."""

    def after_step(self) -> None:
        """Called after each step of the student, on every process."""

    def nonfinite_place(self) -> str:
        """Where numbers of the last batch were not finite, for the error that ends training; empty: not known."""
        return ""

    def state(self) -> dict[str, Any]:
        """Plain numbers and strings of the method beside its networks; saved in checkpoints."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""

    def keep_frozen(self, role: str, network: Frozen) -> Frozen:
        """Keep a network that is never trained: moved to the device with the others, but neither registered nor saved.
        What is kept is a `frozen_copy`, so that the network that was given stays as it was; what it shares with the student,
        the base of adapters, is the same in both.

        Raises ValueError naming `role` where the network shares weights with the student."""
        check_model(role, network, self.MODELS)
        check_apart(role, network, self.student)
        kept = self.frozen[role] = frozen_copy(network, [self.student])
        return kept

    # --- set up

    def prepare(
        self,
        optim: Mapping[str, Mapping[str, Any] | Optim],
        *,
        seed: int,
        stream: str = "train",
        world: World | None = None,
        sharded: bool = False,
    ) -> None:
        """Set up trained parameters, averages and counters from the updates. `optim` maps the name of each update to an `Optim`
        or its fields. sharded: networks will be distributed over the processes of `world` before anything is written to them,
        so that averages need no memory until then."""
        self.seed, self.stream, self.world = seed, stream, world or World()
        self._forget()
        self.plan = list(self.updates())
        names = [update.name for update in self.plan]
        if len(set(names)) != len(names):
            raise ValueError(f"updates: names must differ, found {names}")
        if not any(STUDENT in update.trains for update in self.plan):
            raise ValueError(f"updates: none of {names} trains the network {STUDENT!r}")
        check_keys(optim, names, "optim")
        if missing := [name for name in names if name not in optim]:
            raise ValueError(
                f"optim: found settings for {sorted(optim)}, this method has the updates {sorted(names)}; "
                f"expected optim.{missing[0]} too"
            )
        self.optim = {key: v if isinstance(v, Optim) else Optim(**v) for key, v in optim.items()}
        self.progress, self.nonfinite, self.begun = Progress(), NonFinite(), {}
        self.trained: dict[str, ParameterSet] = {}
        self.averaged: dict[str, ParameterSet] = {}
        for update in self.plan:
            for role, given in update.trains.items():
                found = ParameterSet.of(given, f"updates: {update.name}: {role}")
                if self.trained.setdefault(role, found) != found:
                    raise ValueError(
                        f"updates: {update.name}: {role}: found other parameters than those of an earlier update; expected "
                        "the same, or another name for them"
                    )
                if self.optim[update.name].averaged and role not in self.averaged:
                    self.averaged[role] = found.copy(sharded)
                if found.whole:
                    forget_origin(net_of(found.network))
        self.networks = {role: parameters.network for role, parameters in self.trained.items()}
        self.further = dict(self.averages())
        for name, average in self.further.items():
            if name in self.networks or average.of not in self.networks:
                raise ValueError(
                    f"averages: {name!r} of {average.of!r}: expected a new name and one of {sorted(self.networks)}"
                )
            self.averaged[name] = self.trained[average.of].copy(sharded)
        self.ema = nn.ModuleDict({name: average.network for name, average in self.averaged.items()})
        self.student_update = next(update for update in self.plan if STUDENT in update.trains)
        if (told := self.result().boundary) != self.student.boundary:
            raise ValueError(
                f"result: boundary: found {told}, but the student is trained with {self.student.boundary}; expected that one"
            )

    def distribute(self, shard: str, device: torch.device, reduce_each: bool = False) -> None:
        """Move all networks to their device and, with several processes, shard them: averages like what they follow, so
        that averaging never communicates. Once, before optimizers are made. `reduce_each`: see `engine.fit.Fit`."""
        self._reduce_each = reduce_each
        self._forget()  # sharding replaces parameters
        trained, frozen = [*self.networks.values(), *self.ema.values()], list(self.frozen.values())
        sets = [*self.trained.values(), *self.averaged.values()]
        receiving = {id(p) for parameters in sets for p in parameters.parameters()}
        place(trained, frozen, self.world, shard, device, receiving)

    def _forget(self) -> None:
        """Drop cached parameters, because they may be replaced."""
        self._step_caches, self._running = {}, None

    def parameters_of(self, update: Update) -> list[nn.Parameter]:
        """All parameters that an update trains, each once: two of its roles may share some."""
        return list(dict.fromkeys(p for role in update.trains for p in self.trained[role].parameters()))

    def _running_of(self, update: Update) -> Running:
        """The cached parts of an update; call it once the networks are on their devices."""
        if (cache := self._step_caches.get(update.name)) is None:
            settings = self.optim[update.name]
            updaters: list[tuple[Callable[[int], float], EmaUpdater]] = []
            if settings.averaged:
                decay = partial(settings.decay_at, images=self._images)
                updaters += [
                    (decay, EmaUpdater(self.averaged[role], self.trained[role])) for role in update.trains
                ]
            updaters += [
                (average.decay, EmaUpdater(self.averaged[name], self.trained[average.of]))
                for name, average in self.further.items()
                if average.of in update.trains
            ]
            trained = [self.trained[role] for role in update.trains]
            # A target is in the mode of the network that it follows.
            targets = [self.averaged[n] for n, average in self.further.items() if average.of in update.trains]
            training = [*trained, *targets] if update.mode == "train" else []
            others = [*self.networks.values(), *(self.ema[name] for name in self.further)]
            cache = Running(self.parameters_of(update), trained, updaters, training, others)
            self._step_caches[update.name] = cache
        return cache

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One optimizer an update, in the order of their names."""
        self.optimizers_by_key = self.new_optimizers()
        self.base_lr = {
            key: [group["lr"] for group in optimizer.param_groups]
            for key, optimizer in self.optimizers_by_key.items()
        }
        return list(self.optimizers_by_key.values())

    def new_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """update -> an optimizer of its networks' parameters as they are now."""
        updates = sorted(self.plan, key=lambda update: update.name)
        return {
            update.name: self.optim[update.name].optimizer(self.parameters_of(update)) for update in updates
        }

    def parameter_names(self) -> dict[int, str]:
        """id(parameter) -> "role.name", the same however the network is sharded."""
        return {
            id(p): f"{role}.{name}"
            for role, parameters in self.trained.items()
            for name, p in parameters.named().items()
        }

    def on_fit_start(self) -> None:
        """Nothing requires a gradient until its update runs."""
        for network in [*self.networks.values(), *self.frozen.values(), *self.ema.values()]:
            network.requires_grad_(False)
        self._running = None
        self._hook.find(self)
        self.nonfinite.to(self.device)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Do not count the time since the last iteration as training time."""
        self._clock = time.perf_counter()

    def transfer_batch_to_device(
        self, batch: list[Batch], device: torch.device, dataloader_idx: int
    ) -> list[Batch]:
        """Move micro batches, which Lightning cannot."""
        return [micro if micro.ids.device == device else micro.to(device) for micro in batch]

    # --- one iteration

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        """Run the updates of this iteration on all micro batches."""
        iteration = self.progress.iteration
        self._images = sum(len(micro) for micro in batch) * self.world.size
        shared: list[dict[str, Any]] = [{} for _ in batch]
        logs: dict[str, Tensor | float] = {}
        for update in self.plan:
            if update.runs_at(iteration):
                logs |= self._run(update, batch, shared, iteration)
        self.progress.iteration += 1
        now = time.perf_counter()
        self.progress.seconds, self._clock = self.progress.seconds + now - self._clock, now
        self.latest = logs

    def _run(
        self, update: Update, batch: list[Batch], shared: list[dict[str, Any]], iteration: int
    ) -> dict[str, Tensor | float]:
        """One optimizer step: losses of all micro batches, clip, step, average. Returns what to log, still on
        the device.

        A step whose loss or gradient is not finite anywhere changes no weight, on any process; it is counted,
        and it keeps its place in schedules and averages."""
        settings, optimizer = self.optim[update.name], self.optimizers_by_key[update.name]
        running = self._running_of(update)
        running.start(self._running)
        self._running, parameters = running, running.parameters
        logs = self._backward(update, batch, shared, iteration)
        self._hook(self, "on_before_optimizer_step", optimizer)
        # One call for all tensors: torch's default on GPUs, and on CPUs the same sums without a Python call a tensor.
        together = True if self.world.size == 1 else None
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = full(torch.nn.utils.get_total_norm(gradients, foreach=together))
        step = update.runs_before(iteration)
        bad = bad_step(self.world, norm, logs[f"{update.name}/loss"])
        self.nonfinite.count(update.name, step, bad)
        if settings.clip is not None:
            logs[f"{update.name}/clipped"] = norm > settings.clip
            # Where nothing is to be clipped, torch would multiply every gradient by 1.
            if norm.device.type != "cpu" or not float(norm) < 0.999 * settings.clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip, norm, foreach=together)
        factor = settings.schedule(step)
        for group, base in zip(optimizer.param_groups, self.base_lr[update.name], strict=True):
            group["lr"] = base * factor
        step_unless(optimizer, bad)
        self._hook(self, "on_before_zero_grad", optimizer)
        for parameter in parameters:
            parameter.grad = None
        for decay, updater in running.updaters:
            updater.update(decay(step))
        if update is self.student_update:
            self.progress.step += 1
            self.progress.images += self._images
            self.after_step()
        logs[f"{update.name}/grad_norm"], logs[f"{update.name}/lr"] = norm, optimizer.param_groups[0]["lr"]
        return logs

    def _backward(
        self, update: Update, batch: list[Batch], shared: list[dict[str, Any]], iteration: int
    ) -> dict[str, Tensor | float]:
        """Accumulate the gradients of all micro batches; returns the means of what the losses log."""
        logs: dict[str, Tensor | float] = {}
        whole, running, stream = len(batch) == 1, self._running_of(update), f"{self.stream}/{update.name}"
        steps = [
            Step(
                iteration,
                Draws(self.seed, stream, iteration, micro.index),
                scratch,
                part=number * self.world.size + self.world.rank,
            )
            for number, (micro, scratch) in enumerate(zip(batch, shared, strict=True))
        ]
        if update.before is not None:
            with steps[0].same_dropout("before"):
                update.before(batch, steps)
        for number, (micro, step) in enumerate(zip(batch, steps, strict=True)):
            if not whole:
                running.sync(self._reduce_each or number == len(batch) - 1)
            with step.same_dropout("loss"):
                loss = update.loss(micro, step)
            total = loss.total if whole else loss.total / len(batch)
            self._hook(self, "on_before_backward", total)
            total.backward()  # Lightning's manual_backward would scale it, for fp16 alone
            self._hook(self, "on_after_backward")
            for name, value in {"loss": loss.total, **loss.logs}.items():
                key = f"{update.name}/{name}"
                logs[key] = value.detach() if whole else logs.get(key, 0.0) + value.detach() / len(batch)
        return logs

    # --- results

    def average(self, name: str) -> Denoiser:
        """An average of a denoiser by its name in `self.ema`."""
        return cast(Denoiser, self.ema[name])

    def as_generator(self) -> Generator:
        """The student with the weights of `best` and the properties of `result`."""
        return self.result().of(self.best())

    def best(self, role: str = STUDENT) -> nn.Module:
        """The network to use after training: the average if there is one, else the trained network."""
        return self.ema[role] if role in self.ema else self.networks[role]
