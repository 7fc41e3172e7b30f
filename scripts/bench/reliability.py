"""What reliability costs: averages and non-finite checks a step, a checkpoint, its size, the time to resume.

    python scripts/bench/reliability.py [--width 16] [--steps 60] [--repeats 5]

Ratios are of interleaved runs (A B A B ...) of the same net, data and optimizer in one process; the table
gives median and range.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from distill.data.digits import Digits
from distill.engine import checkpoint
from distill.engine.fit import Fit, train
from distill.engine.module import DistillModule
from distill.engine.schedule import Constant
from distill.engine.update import Optim
from distill.methods.flow_matching import FlowMatching
from distill.models.denoiser import Denoiser
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.world import World


def method(width: int, ema: float | None, fused: bool = True) -> DistillModule:
    """A prepared teacher training."""
    torch.manual_seed(0)
    made = FlowMatching(Denoiser(UNet(width=width), Flow(), "velocity", (1, 8, 8)))
    optim = Optim(partial(torch.optim.AdamW, lr=1e-3, fused=fused), Constant(), ema=ema)
    made.prepare({"student": optim}, seed=0)
    return made


def step_seconds(made: DistillModule, folder: Path, steps: int, every: int) -> float:
    """Seconds a step, without the first ones."""
    times: list[float] = []

    def note(step: int, text: str) -> None:
        times.append(time.perf_counter())

    fit = Fit(steps=steps, batch_size=64, checkpoint_every=every, log_every=10**9)
    train(made, Digits(), fit, folder=folder, config={}, on_progress=note)
    warm = max(1, steps // 6)
    return (times[-2] - times[warm]) / (len(times) - 2 - warm)


def compare(name: str, a: dict, b: dict, options: argparse.Namespace) -> str:
    """A table row: median and range of the ratio of seconds a step, b over a, over interleaved runs."""
    ratios = []
    for _ in range(options.repeats):
        seconds = []
        for case in (a, b):
            with tempfile.TemporaryDirectory() as scratch:
                made = method(options.width, case.get("ema"))
                seconds.append(step_seconds(made, Path(scratch), options.steps, case.get("every", 10**9)))
        ratios.append(seconds[1] / seconds[0])
    return f"| {name} | {statistics.median(ratios):.3f} | {min(ratios):.3f} .. {max(ratios):.3f} |"


def checkpoint_costs(options: argparse.Namespace) -> list[str]:
    """Milliseconds to save and to resume, and bytes."""
    saves, resumes = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = method(options.width, 0.999)
        train(made, Digits(), Fit(steps=5, batch_size=64), folder=folder, config={})
        for _ in range(4 * options.repeats):
            start = time.perf_counter()
            path = checkpoint.save(folder, made, {})
            saves.append(1e3 * (time.perf_counter() - start))
            again = method(options.width, 0.999)
            again.configure_optimizers()
            start = time.perf_counter()
            found, _ = checkpoint.newest(folder, World())
            assert found is not None
            checkpoint.begin(found, again)
            checkpoint.restore(found, again)
            checkpoint.restore_optimizers(found, again)
            resumes.append(1e3 * (time.perf_counter() - start))
        parameters = sum(p.numel() for p in made.student.parameters())
        size = sum(file.stat().st_size for file in path.iterdir())
    return [
        f"| write a checkpoint (with fsync) | {statistics.median(saves):.1f} ms | {min(saves):.1f} .. {max(saves):.1f} |",
        f"| read one and restore | {statistics.median(resumes):.1f} ms | {min(resumes):.1f} .. {max(resumes):.1f} |",
        f"| size of a checkpoint | {size:,} bytes | {size / (4 * parameters):.2f} x the float32 weights |",
    ]


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parameters = sum(p.numel() for p in UNet(width=options.width).parameters())
    print(
        f"U-Net of {parameters:,} parameters, batch 64, {options.threads} threads, {options.repeats} interleaved runs\n"
    )
    print("| | median | range |\n|---|---|---|")
    print(compare("step with EMA / without", {}, {"ema": 0.999}, options))
    print(
        compare(
            "step with a checkpoint every 20 / without", {"ema": 0.999}, {"ema": 0.999, "every": 20}, options
        )
    )
    print(compare("the same twice (noise of this machine)", {}, {}, options))
    print("\n".join(checkpoint_costs(options)))


if __name__ == "__main__":
    main()
