"""Bytes that each process keeps of a training, by network, method, student and number of processes, as in docs/scaling.md:
python scripts/scaling_table.py [--shapes sd15 sdxl dit_xl2 flux]

Nothing is allocated: networks are on the meta device. Whole students are trained in float32; adapters (rank 16, on attention)
stand on a base in bfloat16, which the teacher shares.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from shaped_nets import NAMES, shaped  # noqa: E402

from distill.engine.memory import Memory, predicted  # noqa: E402
from distill.engine.module import DistillModule  # noqa: E402
from distill.engine.schedule import Constant  # noqa: E402
from distill.engine.update import Optim  # noqa: E402
from distill.methods.dmd import DMD  # noqa: E402
from distill.methods.reflow import Reflow  # noqa: E402
from distill.methods.sid import SiD  # noqa: E402
from distill.models.denoiser import Denoiser  # noqa: E402
from distill.process.flow import Flow  # noqa: E402
from distill.stages.adapt import adapted  # noqa: E402

PROCESSES = (1, 8, 64)
LORA = {"lora": {"rank": 16, "targets": ["to_q", "to_k", "to_v", "to_out.0"]}}
METHODS: dict[str, Callable[[Denoiser, Denoiser], DistillModule]] = {
    "reflow": lambda student, teacher: Reflow(student),
    "SiD": lambda student, teacher: SiD(student, teacher),
    "DMD": lambda student, teacher: DMD(student, teacher),
}


def memory(shape: str, method: str, *, lora: bool) -> Memory:
    """The predicted memory of a training."""
    device = torch.device("meta")
    net, sample, _ = shaped(shape, device)
    teacher = Denoiser(net.to(torch.bfloat16) if lora else net, Flow(), "velocity", sample)
    with device:
        student = adapted(teacher, LORA) if lora else copy.deepcopy(teacher)
    assert isinstance(student, Denoiser)
    made = METHODS[method](student, teacher)
    optim = Optim(partial(torch.optim.AdamW, lr=1e-4), Constant())
    alone = replace(optim, ema=None)  # of a fake score no average is needed
    made.prepare({u.name: optim if "student" in u.trains else alone for u in made.updates()}, seed=0)
    return predicted(made)


def table(shapes: list[str]) -> str:
    """The table in Markdown: GiB a process, without activations."""
    columns = [f"{method}, {count}" for method in METHODS for count in PROCESSES]
    lines = [f"| network | student | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for shape in shapes:
        for lora in (False, True):
            found = [memory(shape, method, lora=lora) for method in METHODS]
            cells = [
                f"{sum(each.total(count).values()) / 2**30:.2f}" for each in found for count in PROCESSES
            ]
            lines.append(f"| {NAMES[shape]} | {'LoRA' if lora else 'all weights'} | {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=list(NAMES), choices=list(NAMES))
    print(table(parser.parse_args().shapes))
