"""Runs a method with Lightning: devices and the loop are Lightning's, counting and checkpoints are ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from distill.data.source import Source, StepLoader
from distill.engine import checkpoint
from distill.engine.logging import Logger
from distill.engine.module import DistillModule

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


@dataclass(frozen=True)
class Fit:
    """How long and how to train.

    Attributes:
        steps: optimizer steps of the student, in all.
        batch_size: samples of the global batch. accumulate: micro batches that it is cut into.
        precision: Lightning's name, e.g. "32-true" or "bf16-mixed".
        checkpoint_every, log_every: student steps between checkpoints and between log entries.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    precision: str = "32-true"
    accelerator: str = "cpu"
    checkpoint_every: int = 200
    log_every: int = 20


class _Watch(Callback):
    """Logs, saves and reports after iterations."""

    def __init__(
        self,
        fit: Fit,
        path: Path,
        config: dict[str, Any],
        loggers: Sequence[Logger],
        on_progress: Callable[[int, str], None],
        resumed: dict[str, Any] | None,
    ) -> None:
        self.fit, self.path, self.config, self.loggers = fit, path, config, loggers
        self.on_progress, self.resumed = on_progress, resumed
        self.seen = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Optimizers exist now; on a resumed run they get their state back."""
        assert isinstance(pl_module, DistillModule)
        if self.resumed is not None:
            checkpoint.restore_optimizers(self.resumed, pl_module, where=self.path)
            self.resumed = None
        self.seen = pl_module.progress.step
        pl_module.on_step = self.after

    def after(self, module: DistillModule, logs: Mapping[str, Tensor]) -> None:
        """After an iteration: nothing touches the device except when an entry is written."""
        step = module.progress.step
        if step == self.seen:
            return
        self.seen = step
        text = ""
        if step % self.fit.log_every == 0 or step == self.fit.steps:
            values = {name: float(value) for name, value in logs.items()}
            entry = {**module.progress.to_dict(), **values}
            for logger in self.loggers:
                logger.log(entry)
            text = f"loss {values.get('student/loss', float('nan')):.4g}"
        self.on_progress(step, text)
        if step % self.fit.checkpoint_every == 0 and step < self.fit.steps:
            checkpoint.save(self.path, module, self.config)


def train(
    method: DistillModule,
    source: Source,
    fit: Fit,
    *,
    folder: Path,
    config: dict[str, Any],
    loggers: Sequence[Logger] = (),
    on_progress: Callable[[int, str], None] = lambda step, text: None,
) -> None:
    """Train a prepared method to `fit.steps` student steps, from the checkpoint in `folder` where there is
    one.

    Afterwards `folder/last.ckpt` holds the end of training. Raises ValueError where the batch cannot be
    split."""
    path = folder / checkpoint.NAME
    state = checkpoint.read(path) if path.is_file() else None
    if state is not None:
        checkpoint.restore(state, method, where=path)
    for logger in loggers:
        logger.resume(method.progress.step)
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
    )
    watch = _Watch(fit, path, config, loggers, on_progress, state)
    trainer = L.Trainer(
        accelerator=fit.accelerator,
        devices=1,
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
    )
    torch.set_grad_enabled(True)
    trainer.fit(method, train_dataloaders=loader)
    if method.progress.iteration < stop:
        raise RuntimeError(f"training stopped at iteration {method.progress.iteration} of {stop}")
    checkpoint.save(path, method, config)
