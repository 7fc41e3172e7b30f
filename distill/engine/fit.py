"""Runs a method with Lightning: devices and the loop are Lightning's, counting and checkpoints are ours."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from distill.data.arguments import integer
from distill.data.source import Source, StepLoader
from distill.engine import checkpoint
from distill.engine.logging import Logger
from distill.engine.made import made_of
from distill.engine.module import DistillModule
from distill.engine.networks import modes_kept
from distill.engine.nonfinite import WINDOW
from distill.engine.record import Record, Seam, continued
from distill.interrupt import Interrupted, deferred, reinstall, requested, taken

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
        checkpoint_every, log_every: student steps between checkpoints and between log entries.
        threads: torch's threads; None: those of the checkpoint that training goes on from (with another count sums differ in
            their last bits), else as torch is set. `train` leaves torch at that count.
        max_nonfinite: stop when this many steps of an update in a row had to be skipped.
        max_nonfinite_share: stop when more than this share of a thousand steps of an update had to be skipped.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    precision: str = "32-true"
    device: str = "cpu"
    shard: str = "none"
    checkpoint_every: int = 200
    log_every: int = 20
    threads: int | None = None
    max_nonfinite: int = 10
    max_nonfinite_share: float = 0.05

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: found {self.precision!r}, expected one of {list(PRECISIONS)}")
        if self.threads is not None:
            integer("threads", self.threads, at_least=1)


class Evaluation(Protocol):
    """Measures the student while it is trained; every process calls it after the same steps."""

    def due(self, before: int, now: int) -> bool:
        """Whether an evaluation falls between two counts of images."""
        ...

    def resume(self, step: int) -> None:
        """Called once, before training goes on from `step`."""
        ...

    def __call__(self, module: DistillModule) -> Mapping[str, float]:
        """Evaluate; returns what to log."""
        ...


class _Watch(Callback):
    """Logs, evaluates, saves, stops and reports between iterations."""

    def __init__(
        self,
        fit: Fit,
        path: Path,
        record: Record,
        loggers: Sequence[Logger],
        on_progress: Callable[[int, str], None],
        resumed: dict[str, Any] | None,
        evaluation: Evaluation | None,
        snapshot: Callable[[int], None],
    ) -> None:
        self.fit, self.path, self.record, self.loggers = fit, path, record.to_dict(), loggers
        self.evaluation, self.snapshot = evaluation, snapshot
        self.on_progress, self.resumed = on_progress, resumed
        self.seen = self.images = 0
        self.saved: int | None = None  # the step of the checkpoint on disk
        self.logs: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Optimizers exist now; on a resumed run they get their state back."""
        assert isinstance(pl_module, DistillModule)
        reinstall()  # Lightning has put a handler of its own before ours, which ends the run unsaved
        self.seen, self.images = pl_module.progress.step, pl_module.progress.images
        if self.resumed is not None:
            checkpoint.restore_optimizers(self.resumed, pl_module, where=self.path)
            self.resumed, self.saved = None, self.seen

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Outside the precision that the step was computed in: what is measured here is what is saved."""
        assert isinstance(pl_module, DistillModule)
        self.after(pl_module, pl_module.latest)

    def after(self, module: DistillModule, logs: Mapping[str, Tensor]) -> None:
        """After an iteration. Nothing reads the device except when an entry is written."""
        self.logs |= logs  # of updates that do not run in every iteration, the latest
        step = module.progress.step
        logging_now = step != self.seen and (step % self.fit.log_every == 0 or step == self.fit.steps)
        if step != self.seen and step in module.snapshots():
            self.snapshot(step)
            module.restart_clock()
        evaluated = self._evaluate(module) if step != self.seen else None
        if logging_now or evaluated is not None:
            self._log(module, self.logs, evaluated or {})
        if logging_now or module.device.type == "cpu":  # where reading a counter costs nothing, stop at once
            self._stop_if_nonfinite(module)
        if step != self.seen:
            self.seen = step
            self.on_progress(step, "")
            if step % self.fit.checkpoint_every == 0 and step < self.fit.steps:
                checkpoint.save(self.path, module, self.record)
                self.saved = step
        signum = requested()
        if module.world.any(signum is not None):
            checkpoint.save(self.path, module, self.record)
            raise Interrupted(signum or signal.SIGTERM)

    def _evaluate(self, module: DistillModule) -> Mapping[str, float] | None:
        """Measure the student where it is due (else None), before the checkpoint of the same step: a kill in between
        repeats it. Its time is not training's."""
        before, self.images = self.images, module.progress.images
        last = module.progress.step == self.fit.steps
        if self.evaluation is None or not (last or self.evaluation.due(before, self.images)):
            return None
        found = self.evaluation(module)
        module.restart_clock()
        return found

    def _log(self, module: DistillModule, logs: Mapping[str, Tensor], evaluated: Mapping[str, float]) -> None:
        """One entry with the means over processes and the counts of skipped steps."""
        names = list(logs)
        values = module.world.mean(torch.stack([logs[n].to(module.device, torch.float32) for n in names]))
        entry = {**module.progress.to_dict(), **dict(zip(names, values.tolist(), strict=True))}
        entry |= {f"{name}/skipped": pair[0] for name, pair in module.nonfinite.to_dict().items()}
        entry |= evaluated
        for logger in self.loggers:
            logger.log(entry)
        self.on_progress(module.progress.step, f"loss {entry.get('student/loss', float('nan')):.4g}")

    def _stop_if_nonfinite(self, module: DistillModule) -> None:
        """Stop after `max_nonfinite` skipped steps in a row, or too many of a thousand; the same on every process."""
        for name, (total, streak, recent) in module.nonfinite.to_dict().items():
            often = recent > self.fit.max_nonfinite_share * WINDOW
            if streak >= self.fit.max_nonfinite or often:
                last = "none was saved yet" if self.saved is None else f"{self.path} at step {self.saved}"
                count = f"{recent} of at most {WINDOW} steps" if often else f"{streak} steps in a row"
                raise FloatingPointError(
                    f"update {name!r}: loss or gradient was not finite in {count} ({total} in "
                    f"all), up to step {module.progress.step}; all were skipped. Last good checkpoint: {last}"
                )


def train(
    method: DistillModule,
    source: Source,
    fit: Fit,
    *,
    folder: Path,
    config: dict[str, Any] | None = None,
    seams: Sequence[Seam] | None = None,
    loggers: Sequence[Logger] = (),
    on_progress: Callable[[int, str], None] = lambda step, text: None,
    evaluation: Evaluation | None = None,
    snapshot: Callable[[int], None] = lambda step: None,
) -> None:
    """Train a prepared method to `fit.steps` student steps, from the checkpoint in `folder` where there is one.

    `evaluation` measures the student whenever it is due, and at the end; `snapshot` is called after each of the method's
    `snapshots`. A checkpoint knows its method with all options, optimizers, seed, stream, data, batch size and precision:
    one of another training is refused. `config` (plain containers) is compared with them. A training may be made longer;
    `seams` says where it was, if the caller knows.

    Afterwards `folder/last.ckpt` holds the end of training. Raises ValueError where the batch cannot be split,
    `checkpoint.Refused` (a ValueError) for a checkpoint that training cannot go on from, FloatingPointError after too
    many non-finite steps. SIGINT and SIGTERM stop after the iteration that is running, with a checkpoint saved:
    `Interrupted` inside `interrupt.watch`, else KeyboardInterrupt or what SIGTERM does in this program."""
    # What is computed does not depend on an autocast around the call.
    with taken(), torch.autocast(fit.device, enabled=False):
        _train(
            method,
            source,
            fit,
            folder / checkpoint.NAME,
            config or {},
            seams,
            loggers,
            on_progress,
            evaluation,
            snapshot,
        )


def _train(
    method: DistillModule,
    source: Source,
    fit: Fit,
    path: Path,
    config: dict[str, Any],
    seams: Sequence[Seam] | None,
    loggers: Sequence[Logger],
    on_progress: Callable[[int, str], None],
    evaluation: Evaluation | None,
    snapshot: Callable[[int], None],
) -> None:
    world = method.world
    if fit.threads is not None:
        torch.set_num_threads(fit.threads)
    state, record = _begin(method, source, fit, path, config, seams)
    if state is not None:
        on_progress(method.progress.step, f"continues from step {method.progress.step}")
    for logger in loggers:
        logger.resume(method.progress.step)
    if evaluation is not None:
        evaluation.resume(method.progress.step)
    device = torch.device(fit.device, world.local_rank) if fit.device == "cuda" else torch.device(fit.device)
    method.distribute(fit.shard, device)
    stop = method.student_update.iterations_for(fit.steps)
    if method.progress.iteration >= stop:
        return
    loader = StepLoader(
        source,
        fit.batch_size,
        method.seed,
        stream=method.stream,
        start=method.progress.iteration,
        stop=stop,
        accumulate=fit.accumulate,
        rank=world.rank,
        world=world.size,
    )
    watch = _Watch(fit, path, record, loggers, on_progress, state, evaluation, snapshot)
    with deferred(), modes_kept(method.networks.values()):
        _run(_trainer(fit, device, watch, path.parent), method, loader)
        if method.progress.iteration < stop:
            raise RuntimeError(f"training stopped at iteration {method.progress.iteration} of {stop}")
        checkpoint.save(path, method, record.to_dict())
    if world.any(requested() is not None):  # it came after the last iteration
        raise Interrupted(requested() or signal.SIGTERM)


def _begin(
    method: DistillModule,
    source: Source,
    fit: Fit,
    path: Path,
    config: dict[str, Any],
    seams: Sequence[Seam] | None,
) -> tuple[dict[str, Any] | None, Record]:
    """The checkpoint to go on from, loaded into the method, or None; and what the next checkpoints record."""
    settings = {"accumulate": fit.accumulate, "precision": fit.precision}
    record = Record(made_of(method, source, fit.batch_size, **settings), config, fit.steps)
    if path.exists():
        state = checkpoint.read(path)
        record = continued(state, record, method, path, seams)
        checkpoint.restore(state, method, where=path)
        if fit.threads is None and (threads := state.get("threads")) is not None:
            torch.set_num_threads(int(threads))  # with another count, sums would differ in their last bits
        return state, record
    if seams:
        raise checkpoint.Refused(
            f"{path}: missing, but training was to go on from its step {seams[-1].reached}"
        )
    if method.progress.iteration:
        raise checkpoint.Refused(
            f"{path}: missing, but this method was trained for {method.progress.step} steps; give the folder of that "
            "training, or call `prepare` again to start another one from these weights"
        )
    return None, record


def _run(trainer: L.Trainer, method: DistillModule, loader: StepLoader) -> None:
    """Lightning's loop; a KeyboardInterrupt that something else raises in it stays one."""
    try:
        trainer.fit(method, train_dataloaders=loader)
    except (SystemExit, ValueError) as error:  # Lightning exits, and off the main thread fails to
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


def _trainer(fit: Fit, device: torch.device, watch: _Watch, folder: Path) -> L.Trainer:
    """Lightning's loop for one process. To Lightning each process is a world of its own; what they share is in
    `distill.world` and `engine.parallel`."""
    return L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index] if device.type == "cuda" else 1,
        precision=cast(Any, fit.precision),
        max_epochs=1,
        logger=False,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        plugins=[LightningEnvironment()],
    )
