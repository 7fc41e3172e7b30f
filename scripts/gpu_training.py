"""What `gpu_check` trains, and how fast: the machine, data of noise, methods, and a step against plain training."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from shaped_nets import shaped
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import sample_noise
from distill.engine.fit import Fit, train
from distill.engine.module import DistillModule
from distill.engine.networks import recompute_activations
from distill.engine.schedule import Constant
from distill.engine.update import Optim
from distill.methods.dmd import DMD
from distill.methods.reflow import Reflow
from distill.methods.sid import SiD
from distill.models.denoiser import Denoiser
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.stages.adapt import adapted

# Dense matrix products in bfloat16, operations a second, as the vendor states them; by a word of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "V100": 125e12}


@dataclass
class Machine:
    """Where the checks run."""

    device: torch.device
    tiny: bool
    shapes: Sequence[str]

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize()

    def peak(self, run: Callable[[], object]) -> int | None:
        """Most bytes allocated while `run` runs, on a GPU."""
        if not self.cuda:
            run()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.wait()
        return torch.cuda.max_memory_allocated()


def small(machine: Machine) -> Denoiser:
    """The package's own U-Net, for checks of the engine."""
    torch.manual_seed(0)
    width = 8 if machine.tiny else 64
    net = UNet(width=width, multipliers=(1,), embedding=16, groups=4, num_classes=0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return Denoiser(net, Flow(), "velocity", (1, 8, 8))


class Noise:
    """Pairs of noise as data, of any shape."""

    num_classes = 0

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.sample_shape = shape

    def __len__(self) -> int:
        return 256

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """x0 and z are independent noise."""
        x0, z = (sample_noise(0, stream, rows, self.sample_shape) for stream in ("x0", "z"))
        return Batch(rows, index, Cond.nothing(len(rows)), x0=x0, z=z)

    def fingerprint(self) -> str:
        """The shape is all there is."""
        return str(self.sample_shape)


class Clock(Callback):
    """Seconds of each iteration from `first` on, with the device's work."""

    def __init__(self, machine: Machine, first: int) -> None:
        self.machine, self.first, self.marks = machine, first, list[float]()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Time the beginning."""
        if batch_idx >= self.first:
            self.machine.wait()
            self.marks.append(time.perf_counter())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Time the end."""
        self.machine.wait()
        self.marks.append(time.perf_counter())

    def seconds(self) -> float:
        """The median of an iteration."""
        return sorted(b - a for a, b in zip(self.marks, self.marks[1:], strict=False))[
            (len(self.marks) - 1) // 2
        ]


def prepared(method: DistillModule, *, fused: bool = True) -> DistillModule:
    """With AdamW for every update."""
    optim = Optim(partial(torch.optim.AdamW, lr=1e-4, fused=fused), Constant())
    method.prepare({update.name: optim for update in method.updates()}, seed=0)
    return method


def fitted(
    machine: Machine, method: DistillModule, shape: tuple[int, ...], steps: int, folder: Path, **more: Any
) -> DistillModule:
    """The method after `steps` steps in all."""
    fit = Fit(
        steps,
        more.pop("batch", 8),
        device=machine.device.type,
        log_every=10_000,
        checkpoint_every=10_000,
        **more.pop("fit", {}),
    )
    train(method, Noise(shape), fit, folder=folder, config={}, **more)
    return method


def _lora(student: Denoiser) -> Denoiser:
    made = adapted(student, {"lora": {"rank": 16, "targets": ["to_q", "to_k", "to_v", "to_out.0"]}})
    assert isinstance(made, Denoiser)
    return made


METHODS: dict[str, Callable[[Denoiser], DistillModule]] = {
    "reflow": Reflow,
    "sid": lambda model: SiD(model, copy.deepcopy(model)),
    "dmd": lambda model: DMD(model, copy.deepcopy(model)),
}
TIMED: dict[str, Callable[[Denoiser], DistillModule]] = {
    "reflow": Reflow,
    "dmd, LoRA": lambda model: DMD(_lora(model), model),
    "sid": METHODS["sid"],
}


def speed(machine: Machine, folder: Path, *, shape_name: str, method_name: str) -> dict[str, Any]:
    """Seconds of a step of a method, against plain training of the same net; share of the device's peak."""
    torch.manual_seed(0)
    net, shape, batch = shaped(shape_name, machine.device)
    model = Denoiser(net, Flow(), "velocity", shape)
    if not machine.tiny and method_name == "sid":
        recompute_activations({"student": model})
    warm, steps = (1, 4) if machine.tiny else (4, 14)
    plain = bare(machine, net, shape, batch, warm, steps)
    clock = Clock(machine, warm)
    method = prepared(TIMED[method_name](model))

    def run() -> None:
        fit = {"precision": "bf16-mixed"}
        fitted(machine, method, shape, steps, folder / "speed", batch=batch, fit=fit, callbacks=[clock])

    peak = machine.peak(run)
    name = torch.cuda.get_device_name() if machine.cuda else ""
    top = next((value for word, value in PEAKS.items() if word in name), None)
    return {
        "batch": batch,
        "seconds": clock.seconds(),
        "plain_seconds": plain,
        "images_per_second": batch / clock.seconds(),
        "peak_bytes": peak,
        "plain_mfu": flops(shape_name) / plain / top if top else None,
    }


def bare(
    machine: Machine, net: nn.Module, shape: tuple[int, ...], batch: int, warm: int, steps: int
) -> float:
    """Median seconds of a step of a plain loop: forward, backward, clip, fused AdamW, in bfloat16."""
    own = copy.deepcopy(net).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-4, fused=True)
    x, t = torch.randn(batch, *shape, device=machine.device), torch.rand(batch, device=machine.device)
    cond, marks = Cond.nothing(batch).to(machine.device), []
    for _ in range(steps):
        machine.wait()
        marks.append(time.perf_counter())
        with torch.autocast(machine.device.type, torch.bfloat16):
            loss = own(x, t, cond).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    machine.wait()
    marks.append(time.perf_counter())
    taken = sorted(b - a for a, b in zip(marks[warm:], marks[warm + 1 :], strict=False))
    return taken[len(taken) // 2]


def flops(shape_name: str) -> int:
    """Operations of a forward and a backward, without those that activation checkpointing repeats. Nothing is computed."""
    meta = torch.device("meta")
    net, shape, batch = shaped(shape_name, meta)
    x, t = torch.empty(batch, *shape, device=meta), torch.empty(batch, device=meta)
    with FlopCounterMode(display=False) as counter:
        net(x, t, Cond.nothing(batch).to(meta)).sum().backward()
    return counter.get_total_flops()
