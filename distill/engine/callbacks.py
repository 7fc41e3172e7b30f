"""What happens between iterations, as Lightning callbacks: evaluation and snapshots, logging, checkpoints and stops.

Order: evaluation, logging, the user's callbacks, checkpoints (Lightning moves a user's `Checkpoint` behind other callbacks, and
ours stays behind it). So a checkpoint holds the state of the user's callbacks after the step, and a kill between an evaluation
and the checkpoint of the same step repeats both. All of it runs outside of the precision that the step is computed in: what is
measured is what is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor

from distill.engine import checkpoint
from distill.engine.module import DistillModule
from distill.engine.networks import modes_kept
from distill.engine.nonfinite import WINDOW
from distill.engine.progress import Progress
from distill.engine.record import Record
from distill.engine.stored import Stored
from distill.interrupt import Interrupted, reinstall, requested

STOP = 256  # `trainer.should_stop` among the numbers of signals, which are smaller


class Evaluation(Protocol):
    """Measures the student while it is trained; every process calls it after the same steps. What the main process found counts
    on all of them, so that callbacks decide alike."""

    def due(self, before: int, now: int) -> bool:
        """Whether an evaluation falls between two counts of images."""
        ...

    def resume(self, step: int) -> None:
        """Called once, before training goes on from `step`."""
        ...

    def __call__(self, module: DistillModule) -> Mapping[str, float]:
        """Evaluate; returns what to log."""
        ...


class EvaluationCallback(Callback):
    """Stores the method's snapshots and evaluates the student. The time of both is not training time."""

    def __init__(
        self,
        evaluation: Evaluation | None,
        snapshot: Callable[[int], None],
        steps: int,
        images: int,
        step: int,
    ) -> None:
        self.evaluation, self.snapshot, self.steps = evaluation, snapshot, steps
        self.images, self.seen = images, step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After each step of the student."""
        module: DistillModule = pl_module
        step, before = module.progress.step, self.images
        if step == self.seen:
            return
        self.seen, self.images = step, module.progress.images
        if step in module.snapshots():
            self.snapshot(step)
            module.restart_clock()
        if self.evaluation is not None and (step == self.steps or self.evaluation.due(before, self.images)):
            with modes_kept([*module.networks.values(), *module.ema.values()]):
                module.evaluated = module.world.broadcast(dict(self.evaluation(module)))
            module.restart_clock()


class LoggingCallback(Callback):
    """Sets Lightning's counters, logs to all loggers, reports progress. Nothing reads the device except when an entry is
    written.

    `trainer.global_step` is the number of the student's optimizer steps, over all starts of a run (Lightning would count
    those of every optimizer, from this start). Callbacks of Lightning that log number their entries from 0, as everywhere."""

    def __init__(self, every: int, steps: int, on_progress: Callable[[int, str], None]) -> None:
        self.every, self.steps, self.on_progress = every, steps, on_progress
        self.seen = 0
        self.logs: dict[str, Tensor | float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Counters go on from the checkpoint."""
        self.seen = trainer.fit_loop.epoch_loop._batches_that_stepped = pl_module.progress.step
        self._count(trainer, self.seen)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The number of entries of Lightning's callbacks in this iteration: the student's steps before it."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = pl_module.progress.step

    def _count(self, trainer: L.Trainer, step: int) -> None:
        trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an iteration."""
        module: DistillModule = pl_module
        self.logs |= module.latest  # of updates that do not run in every iteration, the latest
        step = module.progress.step
        self._count(trainer, step)
        if step == self.seen:
            return
        self.seen = step
        if step % self.every == 0 or step == self.steps or module.evaluated is not None:
            self._log(trainer, module)
        self.on_progress(step, "")

    def _log(self, trainer: L.Trainer, module: DistillModule) -> None:
        """One entry with the means over processes and the counts of skipped steps."""
        logs, names = self.logs, list(self.logs)
        values = module.world.mean(
            torch.stack([torch.as_tensor(logs[n], dtype=torch.float32, device=module.device) for n in names])
        )
        entry = {**module.progress.to_dict(), **dict(zip(names, values.tolist(), strict=True))}
        entry |= {f"{name}/skipped": pair[0] for name, pair in module.nonfinite.to_dict().items()}
        entry |= module.evaluated or {}
        module.evaluated = None
        for logger in trainer.loggers:
            logger.log_metrics(dict(entry), step=module.progress.step)
        trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in entry.items()})
        self.on_progress(module.progress.step, f"loss {entry.get('student/loss', float('nan')):.4g}")


class CheckpointCallback(Checkpoint):
    """Restores callbacks and optimizers when Lightning would, saves checkpoints, and ends training: with a checkpoint after a
    signal, or without one after too many non-finite steps. A signal to one process, or `trainer.should_stop` of one, ends
    training on all of them after the same iteration. Several processes ask each other in each iteration and read the answers
    in the next one, so that none waits for another; hence they train one iteration more.

    A `Checkpoint` of Lightning's, so that no callback of the user's runs after it.

    Args:
        folder, record: where checkpoints are saved, and what they record; None: a trial saves none.
        callbacks: the user's, whose state is saved with them.
        resumed: the checkpoint that training goes on from.
        every: student steps between checkpoints. keep: how many of them. steps: length of training.
        log_every: student steps between reads of the device's counters; on a CPU, where they cost nothing, each step.
        max_nonfinite, max_nonfinite_share: see `engine.fit.Fit`.
    """

    def __init__(
        self,
        folder: Path,
        record: Record | None,
        callbacks: Sequence[Callback],
        resumed: Stored | None,
        *,
        every: int,
        keep: int,
        steps: int,
        log_every: int,
        max_nonfinite: int,
        max_nonfinite_share: float,
    ) -> None:
        self.folder, self.record, self.callbacks, self.resumed = folder, record, callbacks, resumed
        self.every, self.keep, self.steps, self.log_every = every, keep, steps, log_every
        self.max_nonfinite, self.max_nonfinite_share = max_nonfinite, max_nonfinite_share
        self.seen = 0
        self.last = None if resumed is None else resumed.path  # the last checkpoint
        self.saved: Progress | None = None  # what it is a checkpoint of
        self.asked: Callable[[], int] | None = None  # what the processes answer to the last iteration

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Restore the callbacks' states, after their `setup` and before `on_fit_start`."""
        if self.resumed is not None:
            checkpoint.restore_callbacks(self.resumed, self.callbacks)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Optimizers exist now: restore them, before `on_train_start`."""
        self.seen = pl_module.progress.step
        if self.resumed is not None:
            checkpoint.restore_optimizers(self.resumed, pl_module)
            self.resumed, self.saved = None, replace(pl_module.progress)
        self._agree(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Before the first iteration."""
        reinstall()  # Lightning has put a handler of its own before ours, which ends the run unsaved
        self._agree(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """The last hook before the first iteration."""
        self._agree(trainer, pl_module)

    def _agree(self, trainer: L.Trainer, module: DistillModule) -> int:
        """Set `should_stop` on every process if it is set on one; else return the number of a signal that one of them received,
        or 0."""
        return self._obey(trainer, module.world.largest(self._wish(trainer)))

    def _agree_later(self, trainer: L.Trainer, module: DistillModule) -> int:
        """`_agree` on what was so after the iteration before."""
        before, self.asked = self.asked, module.world.largest_later(self._wish(trainer))
        return self._obey(trainer, 0 if before is None else before())

    def _wish(self, trainer: L.Trainer) -> int:
        return STOP if trainer.should_stop else requested() or 0

    def _obey(self, trainer: L.Trainer, found: int) -> int:
        trainer.should_stop = found == STOP
        return found % STOP

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an iteration."""
        module: DistillModule = pl_module
        agree = self._agree if module.world.size == 1 else self._agree_later
        step, signum = module.progress.step, agree(trainer, pl_module)
        stepped, self.seen = step != self.seen, step
        if module.device.type == "cpu" or (stepped and step % self.log_every == 0):
            self._stop_if_nonfinite(module)
        if signum or (stepped and step % self.every == 0 and step < self.steps):
            self.save(module)
        if signum:
            raise Interrupted(signum)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Nothing is left to be answered."""
        if self.asked is not None:
            self.asked()
            self.asked = None

    def save(self, module: DistillModule) -> None:
        """Save a checkpoint now, unless there is one of this iteration, or this is a trial. Collective."""
        if self.record is None or (self.saved and self.saved.iteration == module.progress.iteration):
            return
        self.last = checkpoint.save(
            self.folder, module, self.record.to_dict(), self.callbacks, keep=self.keep
        )
        self.saved = replace(module.progress)

    def _stop_if_nonfinite(self, module: DistillModule) -> None:
        """Stop after `max_nonfinite` skipped steps in a row, or too many of a thousand; the same on every process."""
        for name, (total, streak, recent) in module.nonfinite.to_dict().items():
            often = recent > self.max_nonfinite_share * WINDOW
            if streak >= self.max_nonfinite or often:
                last = (
                    "none was saved yet" if self.saved is None else f"{self.last} at step {self.saved.step}"
                )
                count = f"{recent} of at most {WINDOW} steps" if often else f"{streak} steps in a row"
                place = f"; {where}" if (where := module.nonfinite_place()) else ""
                raise FloatingPointError(
                    f"update {name!r}: loss or gradient was not finite in {count} ({total} in "
                    f"all), up to step {module.progress.step}{place}; all were skipped. Last good checkpoint: {last}"
                )
