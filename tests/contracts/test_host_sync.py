"""No step of a method reads the device: on a GPU each read would wait for all kernels. It needs no GPU to see: every read of a
tensor by Python, and every operation whose result's shape depends on values, is recorded with the place that made it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_given_networks import made, networks, prepared
from test_recipes import METHOD_CONFIGS, TOKENS, PairedDigits, build
from token_support import TokenDigits
from torch.utils._python_dispatch import TorchDispatchMode

from distill.engine.fit import Fit, train

# A read of the device, or a shape that only the device knows.
READS = (
    *("_local_scalar_dense", "item", "nonzero", "masked_select", "_unique", "_unique2", "unique_consecutive"),
    *("unique_dim", "equal", "is_nonzero", "bincount", "histc", "repeat_interleave.Tensor"),
)
# Python's own reads, of which some never reach the dispatcher.
METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__")
# Reads that happen on a CPU alone (the code asks for the device), and those of a log entry.
ALLOWED = {
    "data/arguments.py:check_range",
    "data/rng.py:_uniforms",
    "engine/nonfinite.py:bad_step",
    "models/denoiser.py:_places",  # of a grid that is made on the CPU
    "models/generator.py:generate",  # the same
    "engine/module.py:_run",
    "engine/nonfinite.py:step_unless",
    "engine/nonfinite.py:to_dict",
    "engine/callbacks.py:_log",
}
PACKAGE = "/distill/"


def place() -> str:
    """file:function of the innermost frame of the package."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if PACKAGE in name and "/tests/" not in name:
            return f"{name.rpartition(PACKAGE)[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class Reads(TorchDispatchMode):
    """Records reads inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        if name in READS or f"{name}.{func._overloadname}" in READS:
            self.note(name)
        if name in ("index", "index_put", "index_put_") and any(
            isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            self.note(f"{name} by a mask")
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        if (where := place()) not in ALLOWED:
            self.found.add(f"{where}: {what}")


class Watch(Callback):
    """Records the reads of every iteration."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads, self.on = Reads(), False
        for name in METHODS:
            monkeypatch.setattr(torch.Tensor, name, self.noted(name, getattr(torch.Tensor, name)))

    def noted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.on:
                self.reads.note(name)
            return method(tensor, *args, **kwargs)

        return read

    def on_train_batch_start(self, *args: Any) -> None:
        self.reads.__enter__()
        self.on = True

    def on_train_batch_end(self, *args: Any) -> None:
        self.on = False
        self.reads.__exit__(None, None, None)


@pytest.mark.parametrize("path", METHOD_CONFIGS, ids=lambda path: path.stem)
def test_a_step_reads_nothing_from_the_device(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = path.stem in TOKENS
    method = build(path) if tokens else prepared(made(path, networks(path)))
    source = TokenDigits() if tokens and path.stem != "tokenizer" else PairedDigits()
    watch = Watch(monkeypatch)
    train(method, source, Fit(3, 8, log_every=100), folder=tmp_path, config={}, callbacks=[watch])
    assert method.progress.step == 3
    assert sorted(watch.reads.found) == []


def test_reads_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instrument itself: each kind of read is found, at the place that made it."""
    watch, x = Watch(monkeypatch), torch.arange(4.0)
    kinds: dict[str, Callable[[], object]] = {
        "item": x[0].item,
        "tolist": x.tolist,
        "numpy": x.numpy,
        "__bool__": lambda: bool(x[1] > 0),
        "__float__": lambda: float(x[1]),
        "_local_scalar_dense": lambda: x[int(x[1].long())],
        "nonzero": x.nonzero,
        "index by a mask": lambda: x[x > 1],
    }
    for kind, read in kinds.items():
        watch.on_train_batch_start()
        read()
        watch.on_train_batch_end()
        assert f"elsewhere: {kind}" in watch.reads.found, kind
        watch.reads.found.clear()
    watch.on_train_batch_start()
    torch.where(x > 1, x, 0.0).sum()
    watch.on_train_batch_end()
    assert not watch.reads.found
