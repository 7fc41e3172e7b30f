"""What the engine costs: its training step against a bare PyTorch loop on the same net, data and optimizer.

    python scripts/bench/overhead.py [--nets 1 5 20 100] [--runs 3] [--blocks 8] [--profile]

Three loops take turns in one process, a block of steps each (A B C A B C ...), and every block of the engine is divided by
its neighbours; the table gives the median of these ratios with their quartiles, by CPU time and by wall time.

* engine: `DistillModule` (flow matching) through `distill.engine.fit.train` as a run has it, with the seekable loader,
  per-sample draws, non-finite check, clipping, average, counters, and a line of `metrics.jsonl` every 20 steps. Checkpoints
  are left out (`scripts/bench/reliability.py` times them).
* bare: forward, backward, `clip_grad_norm_`, fused AdamW, `_foreach_lerp_` average, `torch.randn` noise, rows of a `randperm`;
  the loss is read every 20 steps.
* bare, same loss: the bare loop with the method's own loss and draws, so what remains is the loop alone. Before anything
  is timed, it and the engine must end at bit-equal weights and averages: both do the same work.

A machine that others use too shows in the row "bare / bare, again": two bare loops, which cost the same.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from distill.data.cond import NULL_LABEL, Cond
from distill.data.digits import Digits
from distill.data.order import Order
from distill.data.rng import Draws
from distill.engine.ema import decay_at
from distill.engine.fit import Fit, train
from distill.engine.loggers import Jsonl
from distill.engine.module import DistillModule
from distill.engine.schedule import Constant
from distill.engine.update import Optim, Step
from distill.methods.flow_matching import FlowMatching
from distill.models.denoiser import Denoiser
from distill.nets.mlp import MLP
from distill.nets.unet import UNet
from distill.process.flow import Flow

LR, CLIP, EMA, LOG_EVERY, NULL_PROB = 1e-3, 1.0, 0.999, 20, 0.1


@dataclass(frozen=True)
class Case:
    """A net with a batch, and how many steps make a block of about 0.3 s on a 2-core CPU."""

    label: str
    net: Callable[[], nn.Module]
    batch_size: int
    block: int

    def with_block(self, steps: int | None) -> Case:
        """The same with another length of a block, if one is given."""
        return replace(self, block=steps) if steps else self


# By the milliseconds that a bare step takes on one core of the machine of docs/performance.md.
CASES = {
    "1": Case("MLP, width 64, batch 64", lambda: MLP(shape=(1, 8, 8), width=64, num_classes=10), 64, 200),
    "5": Case("MLP, width 384, batch 128", lambda: MLP(shape=(1, 8, 8), width=384, num_classes=10), 128, 60),
    "20": Case("U-Net, width 16, batch 24", lambda: UNet(width=16), 24, 20),
    "100": Case("U-Net, width 32, batch 80", lambda: UNet(width=32), 80, 20),
}


def method(case: Case) -> FlowMatching:
    """A prepared teacher training: the engine's side."""
    torch.manual_seed(0)
    made = FlowMatching(Denoiser(case.net(), Flow(), "velocity", (1, 8, 8)), null_prob=NULL_PROB)
    adamw = partial(torch.optim.AdamW, lr=LR, fused=True)
    made.prepare({"student": Optim(adamw, Constant(), clip=CLIP, ema=EMA, ema_ramp=True)}, seed=0)
    return made


class Bare:
    """The loop that one would write by hand, around a loss of its next batch."""

    def __init__(self, net: nn.Module, data: Digits, batch_size: int, loss: Callable[[Bare], Tensor]) -> None:
        self.net, self.data, self.batch_size, self.loss = (
            net.train().requires_grad_(True),
            data,
            batch_size,
            loss,
        )
        self.average = copy.deepcopy(net).requires_grad_(False)
        self.parameters, self.averaged = list(net.parameters()), list(self.average.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, fused=True)
        self.rows = torch.empty(0, dtype=torch.int64)
        self.done, self.logged = 0, 0.0

    def take(self) -> tuple[Tensor, Cond]:
        """The next images [B,1,8,8] of a shuffled epoch, with their labels, some of them dropped."""
        if len(self.rows) < self.batch_size:
            self.rows = torch.randperm(len(self.data))
        rows, self.rows = self.rows[: self.batch_size], self.rows[self.batch_size :]
        label = torch.where(torch.rand(len(rows)) < NULL_PROB, NULL_LABEL, self.data.labels[rows])
        return self.data.images[rows], Cond.of_labels(label)

    def steps(self, count: int) -> None:
        """Train for `count` steps."""
        for _ in range(count):
            loss = self.loss(self)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(self.averaged, self.parameters, 1.0 - decay_at(self.done, EMA, True))
            self.done += 1
            if self.done % LOG_EVERY == 0:
                self.logged = loss.item()


def plain_loss(loop: Bare) -> Tensor:
    """Flow matching, E |v(x_t, t) - (eps - x0)|^2, with torch's generator."""
    x0, cond = loop.take()
    eps, t = torch.randn_like(x0), torch.rand(len(x0))
    wide = t[:, None, None, None]
    return (loop.net((1 - wide) * x0 + wide * eps, t, cond) - (eps - x0)).square().mean()


def same_loss(own: FlowMatching, data: Digits, batch_size: int) -> Callable[[Bare], Tensor]:
    """A method's own loss, on the batch and with the draws of the engine's step."""
    order, index = Order(len(data), 0, "train/order"), torch.arange(batch_size)

    def loss(loop: Bare) -> Tensor:
        batch = data.fetch(order.at(loop.done * batch_size, batch_size), index)
        return own.loss(batch, Step(loop.done, Draws(0, "train/student", loop.done, index))).total

    return loss


def bare_loops(case: Case, data: Digits) -> dict[str, Bare]:
    """The loops to compare with, each with a net of its own that starts at the same weights."""
    own = method(case)
    return {
        "bare": Bare(method(case).student.net, data, case.batch_size, plain_loss),
        "bare, same loss": Bare(own.student, data, case.batch_size, same_loss(own, data, case.batch_size)),
        "bare, again": Bare(method(case).student.net, data, case.batch_size, plain_loss),
    }


def check_equal(case: Case, data: Digits, steps: int = 3) -> None:
    """Raise RuntimeError unless the engine and the bare loop with its loss train bit-equal weights and averages."""
    made, bare = method(case), bare_loops(case, data)["bare, same loss"]
    with tempfile.TemporaryDirectory() as scratch:
        train(made, data, Fit(steps=steps, batch_size=case.batch_size), folder=Path(scratch), config={})
    bare.steps(steps)
    for what, one, two in (
        ("weights", made.student, bare.net),
        ("averages", made.ema["student"], bare.average),
    ):
        for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
            if not torch.equal(a, b):
                raise RuntimeError(
                    f"{what}: {name} differs after {steps} steps; the loops do not do the same work"
                )


@dataclass
class Clock:
    """Times of blocks by loop: (CPU seconds of this process, wall seconds), and their profiles where asked for."""

    profiling: bool = False
    times: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    profiles: dict[str, cProfile.Profile] = field(default_factory=dict)
    _running: tuple[str, float, float] | None = None

    def start(self, name: str) -> None:
        """A block of this loop begins."""
        profile = self.profiles.setdefault(name, cProfile.Profile(time.process_time))
        self._running = (name, time.process_time(), time.perf_counter())
        if self.profiling:
            profile.enable()

    def stop(self, keep: bool) -> None:
        """It ends; the first one of each loop warms up and is not kept."""
        cpu, wall = time.process_time(), time.perf_counter()
        assert self._running is not None
        name, began_cpu, began_wall = self._running
        if self.profiling:
            self.profiles[name].disable()
        if keep:
            self.times.setdefault(name, []).append((cpu - began_cpu, wall - began_wall))
        elif self.profiling:
            self.profiles[name].clear()

    @contextmanager
    def block(self, name: str, keep: bool) -> Iterator[None]:
        """Both, around a block."""
        self.start(name)
        yield
        self.stop(keep)


class Loop(Protocol):
    """What takes turns with the engine."""

    def steps(self, count: int) -> None:
        """Train for `count` steps."""


def measure(
    case: Case,
    data: Digits,
    loops: Mapping[str, Loop],
    blocks: int,
    clock: Clock,
    make: Callable[[Case], DistillModule] = method,
) -> None:
    """Run the engine once and, after each block of its steps, a block of every other loop."""
    last = case.block * (blocks + 1)

    def after(step: int, text: str) -> None:
        """The engine calls this after each step (with a text when it has logged)."""
        if text or step % case.block:
            return
        clock.stop(keep=step > case.block)
        for name, loop in loops.items():
            with clock.block(name, keep=step > case.block):
                loop.steps(case.block)
        if step < last:
            clock.start("engine")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fit = Fit(steps=last, batch_size=case.batch_size, checkpoint_every=10**9, log_every=LOG_EVERY)
        clock.start("engine")
        train(make(case), data, fit, folder=folder, config={}, loggers=[Jsonl(folder)], on_progress=after)


def ratios(clock: Clock, one: str, other: str, which: int) -> list[float]:
    """Block by block: time of `one` over `other`; 0: CPU, 1: wall."""
    return [a[which] / b[which] for a, b in zip(clock.times[one], clock.times[other], strict=True)]


def spread(values: Sequence[float]) -> str:
    """Median (first quartile .. third)."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} .. {high:.3f})"


COMPARED = (
    ("engine", "bare"),
    ("engine", "bare, same loss"),
    ("bare, same loss", "bare"),
    ("bare", "bare, again"),
)


def rows(case: Case, clock: Clock, compared: Sequence[tuple[str, str]] = COMPARED) -> list[str]:
    """Table rows of one net."""
    step = [1e3 * cpu / case.block for cpu, _ in clock.times["bare"]]
    lines = []
    for one, other in compared:
        cpu, wall = (spread(ratios(clock, one, other, which)) for which in (0, 1))
        extra = [
            1e6 * (a[0] - b[0]) / case.block
            for a, b in zip(clock.times[one], clock.times[other], strict=True)
        ]
        lines.append(
            f"| {case.label} | {statistics.median(step):.2f} | {one} / {other} | {cpu} | {wall} "
            f"| {statistics.median(extra):+.0f} |"
        )
    return lines


HEADER = (
    "| net | bare step, CPU ms | compared | CPU time: median (quartiles) | wall time: median (quartiles) "
    "| CPU us a step more |\n|---|---|---|---|---|---|"
)


def profile_rows(clock: Clock, steps: int, count: int = 30) -> list[str]:
    """The functions in which the engine spends most beyond the bare loop: own CPU time a step, in microseconds
    (cProfile slows Python down, so read them against each other)."""
    found: dict[str, list[float]] = {}
    for place, name in enumerate(("engine", "bare")):
        stats = pstats.Stats(clock.profiles[name]).stats  # type: ignore[attr-defined]
        for (file, line, function), entry in stats.items():
            where = function if file == "~" else f"{'/'.join(Path(file).parts[-3:])}:{line} {function}"
            values = found.setdefault(where, [0.0] * 4)
            values[2 * place] += 1e6 * entry[2] / steps
            values[2 * place + 1] += entry[1] / steps
    ranked = sorted(found.items(), key=lambda item: item[1][2] - item[1][0])[:count]
    return [
        f"| `{where.replace('|', '/')}` | {ours - bare:+.1f} | {ours:.1f} | {calls:.1f} | {bare:.1f} | {bare_calls:.1f} |"
        for where, (ours, calls, bare, bare_calls) in ranked
    ]


PROFILE_HEADER = "| function | more, us a step | engine | calls | bare | calls |\n|---|---|---|---|---|---|"


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=sorted(CASES), default=["1", "5", "20", "100"])
    parser.add_argument(
        "--runs", type=positive, default=3, help="from the start: memory lies anew, and with it speed"
    )
    parser.add_argument("--blocks", type=positive, default=8, help="timed blocks a loop in each run")
    parser.add_argument("--block-steps", type=positive, help="steps a block (default: about 0.3 s)")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument(
        "--profile", action="store_true", help="also profile the difference, in a run of its own"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print Markdown tables."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    data = Digits()
    cases = [CASES[name].with_block(options.block_steps) for name in options.nets]
    shape = f"{options.threads} threads, {options.runs} runs of {options.blocks} blocks a loop"
    print(f"torch {torch.__version__}, {shape}\n\n{HEADER}", flush=True)
    for case in cases:
        check_equal(case, data)
        clock = Clock()
        for _ in range(options.runs):
            measure(case, data, bare_loops(case, data), options.blocks, clock)
        print("\n".join(rows(case, clock)), flush=True)
    for case in cases if options.profile else []:
        measure(case, data, bare_loops(case, data), options.blocks, clock := Clock(profiling=True))
        print(f"\n{case.label}\n\n{PROFILE_HEADER}")
        print("\n".join(profile_rows(clock, options.blocks * case.block)))


if __name__ == "__main__":
    main()
