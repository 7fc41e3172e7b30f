"""Trains a method under `lightning.Trainer`, with callbacks, loggers and a profiler of Lightning's.

Lightning runs the loop, moves batches, sets the precision and calls the hooks of the user's callbacks (those within a step:
`engine.hooks`). Four things stay ours. Draws have no state: they are functions of (seed, stream, step, sample), so they need
no saved generators and do not depend on the number of processes. Resuming is bit-equal: a checkpoint of ours holds what is
trained, every optimizer, the counters and the callbacks' states, is checked for changes, and a start from it seeks in the data
instead of reading up to it; Lightning's restarts an epoch. Several optimizers step in one iteration, with clipping, averages
and skipped non-finite steps each: hence manual optimization, and `global_step` set by `LoggingCallback`. Sharding works on
parts of a module that may be shared between networks, where `ModelParallelStrategy` takes a module whole; to Lightning each
process is therefore a world of its own, with its rank set; only what a callback asks of all processes (`_OneProcess`) reaches
the others.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import lightning.pytorch.utilities.rank_zero as rank_zero
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.distributed import _all_gather_ddp_if_available, _sync_ddp_if_available
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from distill.data.arguments import integer
from distill.data.source import Source, StepLoader
from distill.engine import checkpoint
from distill.engine.callbacks import CheckpointCallback, Evaluation, EvaluationCallback, LoggingCallback
from distill.engine.hooks import check_callback_hooks
from distill.engine.loggers import replay
from distill.engine.made import made_of
from distill.engine.module import DistillModule
from distill.engine.networks import modes_kept
from distill.engine.record import Record, Seam, continued
from distill.engine.stored import Refused, Stored, tidy
from distill.interrupt import Interrupted, deferred, requested, taken
from distill.world import World

# What a first-time user would read as an error and cannot act on.
for _name in (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "lightning.pytorch",
):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
warnings.filterwarnings(
    "ignore", message=".*in eval mode at the start of training.*"
)  # the averages are meant to be
warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
warnings.filterwarnings("ignore", message=".*`training_step` returned `None`.*")


PRECISIONS = ("32-true", "bf16-mixed")


@dataclass(frozen=True)
class Fit:
    """How long and how to train.

    Attributes:
        steps: optimizer steps of the student, in all.
        batch_size: samples of the global batch. accumulate: micro batches that it is cut into.
        precision: "32-true" or "bf16-mixed".
        shard: how several processes hold the networks; see `engine.parallel`.
        reduce_each: whether several processes reduce the gradients of each micro batch, and so hold them sharded; else those of
            all micro batches at once, for which each holds them whole.
        checkpoint_every, log_every: student steps between checkpoints and between log entries.
        keep_checkpoints: of the newest checkpoints; earlier ones are deleted.
        threads: torch's threads; None: those of the checkpoint that training goes on from (with another count sums differ in
            their last bits), else as torch is set. `train` leaves torch at that count.
        max_nonfinite: stop when this many steps of an update in a row had to be skipped.
        max_nonfinite_share: stop when more than this share of a thousand steps of an update had to be skipped.
        fast_dev_run: train this many iterations as a trial (Lightning's option of that name): from the start, with the
            user's callbacks, without loggers; nothing is read or saved. 0: train.
        workers, prefetch: processes that fetch batches, and how many iterations ahead each; see `StepLoader`. Batches are the
            same for any number.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    precision: str = "32-true"
    device: str = "cpu"
    shard: str = "none"
    reduce_each: bool = False
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    log_every: int = 20
    threads: int | None = None
    max_nonfinite: int = 10
    max_nonfinite_share: float = 0.05
    fast_dev_run: int = 0
    workers: int | None = None
    prefetch: int = 2

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: found {self.precision!r}, expected one of {list(PRECISIONS)}")
        integer("keep_checkpoints", self.keep_checkpoints, at_least=1)
        if self.threads is not None:
            integer("threads", self.threads, at_least=1)


@dataclass(frozen=True)
class Attached:
    """What is attached to a training: see `train`."""

    loggers: Sequence[Logger] = ()
    callbacks: Sequence[Callback] = ()
    profiler: Profiler | None = None
    on_progress: Callable[[int, str], None] = lambda step, text: None
    evaluation: Evaluation | None = None
    snapshot: Callable[[int], None] = lambda step: None


def train(
    method: DistillModule,
    source: Source,
    fit: Fit,
    *,
    folder: Path,
    config: dict[str, Any] | None = None,
    seams: Sequence[Seam] | None = None,
    **attached: Any,
) -> None:
    """Train a prepared method to `fit.steps` student steps, from the checkpoint in `folder` where there is one.

    attached: `loggers`, `callbacks`, `profiler`: Lightning's, or your own subclasses. `evaluation` measures the student
    whenever it is due, and at the end; `snapshot(step)` is called after each of the method's `snapshots`;
    `on_progress(step, text)` after each step, with a text after each entry that was logged.

    A checkpoint knows its method with all options, optimizers, seed, stream, data, batch size and precision:
    one of another training is refused. `config` (plain containers) is compared with them. A training may be made longer;
    `seams` says where it was, if the caller knows.

    Afterwards the newest checkpoint in `folder` holds the end of training. Raises ValueError where the batch cannot be split or
    a callback asks to stop early, `Refused` (a ValueError) for a checkpoint that training cannot go on from, FloatingPointError
    after too many non-finite steps. SIGINT and SIGTERM stop after the iteration that is running, with a checkpoint saved:
    `Interrupted` inside `interrupt.watch`, else KeyboardInterrupt or what SIGTERM does in this program."""
    # What is computed does not depend on an autocast around the call.
    with taken(), torch.autocast(fit.device, enabled=False):
        if fit.threads is not None:
            torch.set_num_threads(fit.threads)
        begun = _Begun() if fit.fast_dev_run else _begin(method, source, fit, folder, config or {}, seams)
        _train(method, source, fit, folder, begun, Attached(**attached))


@dataclass
class _Begun:
    """What training goes on from. The checkpoint is taken out of it: a second name would keep it in memory throughout.

    Attributes:
        found: the checkpoint; None at the start. record: what checkpoints record; None: nothing is saved.
        broken: what is wrong with newer checkpoints.
    """

    found: Stored | None = None
    record: Record | None = None
    broken: Sequence[str] = ()

    def take(self) -> Stored | None:
        """The checkpoint, once."""
        found, self.found = self.found, None
        return found


def _train(
    method: DistillModule,
    source: Source,
    fit: Fit,
    folder: Path,
    begun: _Begun,
    attached: Attached,
) -> None:
    """Train from where a checkpoint was, or from the start."""
    world, begin, record = method.world, method.progress.iteration, begun.record
    for callback in attached.callbacks:
        check_callback_hooks(callback, "callbacks")
    if begun.broken and world.main:
        warnings.warn(f"{'; '.join(begun.broken)}: deleted, and an earlier one continued", stacklevel=3)
    if begun.found is not None:
        attached.on_progress(method.progress.step, f"continues from step {method.progress.step}")
    if record is not None:
        for part in (*attached.loggers, attached.evaluation):
            if callable(resume := getattr(part, "resume", None)):
                resume(method.progress.step)
        replay(attached.loggers)
    device = torch.device(fit.device, world.local_rank) if fit.device == "cuda" else torch.device(fit.device)
    method.distribute(fit.shard, device, fit.reduce_each)
    if begun.found is not None:
        checkpoint.restore(begun.found, method)
    stop = method.student_update.iterations_for(fit.steps)
    if begin >= stop:
        return
    method.before_training(source)
    loader = StepLoader(
        source,
        fit.batch_size,
        method.seed,
        stream=method.stream,
        start=begin,
        stop=stop,
        accumulate=fit.accumulate,
        rank=world.rank,
        world=world.size,
        workers=fit.workers,
        prefetch=fit.prefetch,
        pin=device.type == "cuda",
    )
    callbacks, saving = _callbacks(method, fit, folder, begun.take(), record, attached)
    with deferred(), modes_kept(method.networks.values()):
        _run(_trainer(fit, device, world, callbacks, attached, folder), method, loader)
        saving.save(method)
    if signum := world.largest(requested() or 0):  # it came after the last iteration
        raise Interrupted(signum)
    if record is not None and method.progress.iteration < stop:
        raise ValueError(
            f"callbacks: one of them ended training at step {method.progress.step} of {fit.steps}; expected the whole "
            f"length. {saving.last} holds that step: lower `steps` to it, or leave the callback out and train on"
        )


def _callbacks(
    method: DistillModule,
    fit: Fit,
    folder: Path,
    found: Stored | None,
    record: Record | None,
    attached: Attached,
) -> tuple[list[Callback], CheckpointCallback]:
    """Ours and the user's in their order, and the one that saves."""
    saving = CheckpointCallback(
        folder,
        record,
        attached.callbacks,
        found,
        every=fit.checkpoint_every,
        keep=fit.keep_checkpoints,
        steps=fit.steps,
        log_every=fit.log_every,
        max_nonfinite=fit.max_nonfinite,
        max_nonfinite_share=fit.max_nonfinite_share,
    )
    ours: list[Callback] = [LoggingCallback(fit.log_every, fit.steps, attached.on_progress)]
    if record is not None and (attached.evaluation is not None or method.snapshots()):
        done = method.progress
        ours.insert(
            0, EvaluationCallback(attached.evaluation, attached.snapshot, fit.steps, done.images, done.step)
        )
    return [*ours, *attached.callbacks, saving], saving


def _begin(
    method: DistillModule,
    source: Source,
    fit: Fit,
    folder: Path,
    config: dict[str, Any],
    seams: Sequence[Seam] | None,
) -> _Begun:
    """The checkpoint to go on from, loaded into the method, or None; and what the next checkpoints record."""
    settings = {"accumulate": fit.accumulate, "precision": fit.precision}
    record = Record(made_of(method, source, fit.batch_size, **settings), config, fit.steps)
    found, broken = checkpoint.newest(folder, method.world)
    if found is not None:
        record = continued(found, record, method, seams)
        checkpoint.begin(found, method)
        method.world.decided(lambda: tidy(folder, found.path.name, fit.keep_checkpoints))
        if fit.threads is None and (threads := found.state.get("threads")) is not None:
            torch.set_num_threads(int(threads))  # with another count, sums would differ in their last bits
        return _Begun(found, record, broken)
    if seams:
        raise Refused(f"{folder}: has no checkpoint, but training was to go on from step {seams[-1].reached}")
    if method.progress.iteration:
        raise Refused(
            f"{folder}: has no checkpoint, but this method was trained for {method.progress.step} steps; give the folder of "
            "that training, or call `prepare` again to start another one from these weights"
        )
    return _Begun(None, record)


def _run(trainer: L.Trainer, method: DistillModule, loader: StepLoader) -> None:
    """Lightning's loop; a KeyboardInterrupt that something else raises in it stays one."""
    try:
        trainer.fit(method, train_dataloaders=loader)
    except (SystemExit, ValueError) as error:  # Lightning exits, and off the main thread fails to
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


class _OneProcess(SingleDeviceStrategy):
    """One of several processes, of which only the main one writes. What callbacks (and Lightning) ask of all processes is
    answered by all: callbacks that decide together, such as `EarlyStopping` and `Timer`, stop together."""

    def __init__(self, device: torch.device, world: World) -> None:
        super().__init__(device=device)
        self.world = world
        self.global_rank, self.local_rank = world.rank, world.local_rank

    def teardown(self) -> None:
        """Networks and optimizers stay on their device: Lightning would move them to the CPU, where shards of a mesh of GPUs
        cannot be gathered for the checkpoint and the model file."""
        assert self.accelerator is not None
        for part in (self.precision_plugin, self.accelerator, self.checkpoint_io):
            part.teardown()

    @property
    def is_global_zero(self) -> bool:
        """Asked by callbacks and loggers before they write."""
        return self.world.main

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all processes."""
        self.world.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object of process `src`."""
        return self.world.broadcast(obj, src)

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all processes decided so, or any of them."""
        return not self.world.any(not decision) if all else self.world.any(decision)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The mean, the sum or another reduction of a tensor over all processes, for `log(..., sync_dist=True)`."""
        return _sync_ddp_if_available(tensor, group, reduce_op) if isinstance(tensor, Tensor) else tensor

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """[processes, *shape]: the tensors of all processes."""
        return _all_gather_ddp_if_available(tensor, group, sync_grads)


def _trainer(
    fit: Fit, device: torch.device, world: World, callbacks: list[Callback], attached: Attached, folder: Path
) -> L.Trainer:
    """Lightning's trainer of one process. What processes share is in `distill.world` and `engine.parallel`."""
    cast(Any, rank_zero).rank_zero_only.rank = world.rank
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index] if device.type == "cuda" else 1,
        strategy=_OneProcess(device, world) if world.size > 1 else "auto",
        precision=cast(Any, fit.precision),
        max_epochs=1,
        # Callbacks that log need a logger on every process.
        logger=list(attached.loggers) or (False if world.main else DummyLogger()),
        log_every_n_steps=fit.log_every,
        callbacks=callbacks,
        profiler=attached.profiler,
        fast_dev_run=fit.fast_dev_run,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        plugins=[LightningEnvironment()],
    )
