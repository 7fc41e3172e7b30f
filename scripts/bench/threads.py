"""Training steps of the tiny U-Net with one and two threads, spinning and sleeping, on an idle and on a busy machine.

    python scripts/bench/threads.py [--repeats 3]

Each case is a process of its own (OpenMP reads its policy once); cases are interleaved. "Busy": one other process computes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

WORK = """
import sys, time, torch
from distill.data.cond import Cond
from distill.nets.unet import UNet
torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
net = UNet()
optimizer = torch.optim.AdamW(net.parameters(), 1e-3, fused=True)
x, t, cond = torch.randn(64, 1, 8, 8), torch.rand(64), Cond.of_labels(torch.arange(64) % 10)
for i in range(40):
    if i == 10:
        start = time.perf_counter()
    net(x, t, cond).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print((time.perf_counter() - start) / 30)
"""


def milliseconds(threads: int, policy: str) -> float:
    """Milliseconds a step, over 30 steps in a process of its own."""
    environment = os.environ | {"OMP_WAIT_POLICY": policy} if policy != "default" else os.environ.copy()
    out = subprocess.run(
        [sys.executable, "-c", WORK, str(threads)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return 1e3 * float(out.stdout)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    cases = [(1, "default"), (2, "default"), (2, "passive")]
    print("| machine | threads | waiting threads | ms a step: median | range |\n|---|---|---|---|---|")
    for busy in (False, True):
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        try:
            found: dict[tuple[int, str], list[float]] = {case: [] for case in cases}
            for _ in range(options.repeats):
                for case in cases:
                    found[case].append(milliseconds(*case))
        finally:
            if other is not None:
                other.kill()
        for (threads, policy), values in found.items():
            waiting = {"default": "spin", "passive": "sleep"}[policy] if threads > 1 else "-"
            where = "busy" if busy else "idle"
            spread = f"{min(values):.1f} .. {max(values):.1f}"
            print(f"| {where} | {threads} | {waiting} | {statistics.median(values):.1f} | {spread} |")


if __name__ == "__main__":
    main()
