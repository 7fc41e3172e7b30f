"""Hooks of the user's callbacks: which are called, when, and with what."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from checkpoint_support import checkpoint_of
from lightning.pytorch.callbacks import Callback, Checkpoint, LambdaCallback
from test_engine import Points, make, weights

from distill.engine.callbacks import CheckpointCallback
from distill.engine.fit import Fit, _OneProcess, train
from distill.engine.hooks import WITHIN_STEPS
from distill.engine.loggers import check_callback
from distill.world import World


class Watching(Checkpoint):
    """Notes what it is called with; as a `Checkpoint`, Lightning calls it after all others but ours."""

    def __init__(self, fail_at: int = -1) -> None:
        self.batches, self.fail_at = 0, fail_at
        self.begun: list[Any] = []
        self.counts: list[tuple[int, int]] = []
        self.steps: list[tuple[str, int]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.begun.append("state")
        self.batches = state_dict["batches"]

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.begun.append("setup")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.begun.append(("fit", self.batches))

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        moments = [len(optimizer.state) for optimizer in trainer.optimizers]
        self.begun.append(("train", self.batches, trainer.global_step, moments))
        assert isinstance(trainer.callbacks[-1], CheckpointCallback)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(("start", trainer.fit_loop.epoch_loop._batches_that_stepped))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        self.steps.append(("end", trainer.fit_loop.epoch_loop._batches_that_stepped))
        self.counts.append((self.batches, pl_module.progress.iteration))
        if self.batches == self.fail_at:
            raise RuntimeError("a user's error")


def fit(method: Any, folder: Path, steps: int, *callbacks: Callback, **options: Any) -> Any:
    fit = Fit(steps, 8, checkpoint_every=1, **options)
    train(method, Points(), fit, folder=folder, config={"a": 1}, callbacks=callbacks)
    return method


def test_states_and_optimizers_are_restored_where_lightning_restores_them(tmp_path: Path) -> None:
    """The student steps in iterations 0, 2 and 4; the fake network in each."""
    first, second = Watching(fail_at=4), Watching()
    with pytest.raises(RuntimeError, match="a user's error"):
        fit(make(), tmp_path, 3, first)
    assert first.begun == ["setup", ("fit", 0), ("train", 0, 0, [0, 0])]
    # The checkpoint of step 2 holds the state after it.
    assert checkpoint_of(tmp_path)["callbacks"] == {"Watching": {"batches": 3}}
    fit(make(), tmp_path, 3, second)
    assert second.begun == ["setup", "state", ("fit", 3), ("train", 3, 2, [2, 2])]
    assert second.counts == [(4, 4), (5, 5)]
    # Lightning's callbacks number what they log in an iteration by the steps before it.
    assert first.steps == [(at, n) for n in (0, 1, 1, 2) for at in ("start", "end")]
    assert second.steps == [(at, 2) for _ in range(2) for at in ("start", "end")]


class Within(Callback):
    """Notes the hooks within a step."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        self.seen.append(("backward", loss.requires_grad))

    def on_after_backward(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.seen.append(("after",))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        parameters = optimizer.param_groups[0]["params"]
        (name,) = (n for n, own in pl_module.optimizers_by_key.items() if own is optimizer)
        self.seen.append(("step", name, all(p.grad is not None for p in parameters)))
        for parameter in parameters:
            parameter.grad.zero_()

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad for p in optimizer.param_groups[0]["params"]]
        self.seen.append(("zero", any(bool(grad.any()) for grad in grads)))


def test_hooks_within_a_step_are_called_for_callbacks_and_methods_that_define_them(tmp_path: Path) -> None:
    within, method = Within(), make(optimizer=partial(torch.optim.SGD, lr=1.0))
    before = weights(method)
    fit(method, tmp_path / "a", 1, within, accumulate=2)
    micro = [("backward", True), ("after",)]
    updates = [[*micro, *micro, ("step", name, True), ("zero", False)] for name in ("student", "fake")]
    assert within.seen == [event for events in updates for event in events]
    assert all(torch.equal(weights(method)[n], before[n]) for n in before if n.startswith("net"))

    class Own(type(method)):
        calls = 0

        def on_after_backward(self) -> None:
            self.calls += 1

    own = make()
    own.__class__ = Own
    fit(own, tmp_path / "b", 1)
    assert own.calls == 2
    plain = fit(make(), tmp_path / "c", 1)
    assert not plain._hook.defined, "nothing is called in a step where nobody listens"
    assert set(WITHIN_STEPS) == {name for name in vars(Within) if name.startswith("on_")}


class Saving(Callback):
    """Keeps its state in Lightning's checkpoints."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1


def test_a_callback_whose_state_would_be_lost_is_refused_before_training(tmp_path: Path) -> None:
    loading = LambdaCallback(on_load_checkpoint=lambda trainer, module, checkpoint: None)
    for callback, hook in ((Saving(), "Saving defines on_save"), (loading, "LambdaCallback defines on_load")):
        with pytest.raises(ValueError, match=f"callbacks: {hook}.*expected its state in state_dict"):
            fit(make(), tmp_path, 1, callback)
    with pytest.raises(ValueError, match=r"callbacks\[0\]: Saving defines on_save_checkpoint"):
        check_callback(Saving, {"_target_": "Saving"}, "callbacks[0]")
    check_callback(LambdaCallback, {"_target_": "LambdaCallback"}, "callbacks[1]")
    assert not list(tmp_path.iterdir())


def test_networks_of_several_processes_stay_on_their_device_after_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The checkpoint and the model file are gathered after it, and NCCL gathers nothing that lies on a CPU."""
    strategy = _OneProcess(torch.device("cpu"), World(0, 2))
    L.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    module = make()
    strategy.connect(module)
    monkeypatch.setattr(type(module), "cpu", lambda self: pytest.fail("moved"))
    strategy.teardown()
