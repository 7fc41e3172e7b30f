"""Speed of a one-step student beside its autoregressive teacher, which draws tokens with cached keys and values.

    python scripts/bench/ar_speed.py runs/distilled_decoding
    python scripts/bench/ar_speed.py llamagen-b | var-d16      (random weights)

The teacher draws by torch.multinomial, as anyone samples it, not by the flow of tokens. Latency at batch 1, throughput at
batch 500 (8 with random weights); medians of interleaved measurements.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.models.native import load_model
from distill.nets.llamagen import LlamaGen
from distill.nets.token_net import TokenNet
from distill.nets.var import VAR

REPEATS = 5


@torch.no_grad()
def drawn(net: TokenNet, codebook: Tensor, cond: Cond) -> Tensor:
    """Codes [B,L,C] of ancestral sampling with the cache."""
    state, last, parts = net.begin(cond), None, []
    for _ in net.groups:
        p = net.advance(state, last).softmax(-1)
        last = codebook[torch.multinomial(p.flatten(0, 1), 1).view(p.shape[:2])]
        parts.append(last)
    return torch.cat(parts, 1)


def seconds(calls: dict[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """Median time of each call, measured in turn."""
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def networks(arguments: list[str]) -> tuple[TokenNet, torch.nn.Module, int]:
    """(teacher, student, large batch)."""
    name = arguments[0]
    if name == "llamagen-b":
        return LlamaGen().eval(), LlamaGen(student=True).eval(), 8
    if name == "var-d16":
        return VAR(depth=16).eval(), VAR(depth=16, student=True).eval(), 8
    net, student = (load_model(Path(name) / stage).denoiser.net for stage in ("teacher", "distill"))
    assert isinstance(net, TokenNet)
    return net, student, 500


def codebook_of(net: torch.nn.Module) -> Tensor:
    """The codes [V,C] of a net."""
    found = net.codebook
    assert isinstance(found, Tensor)
    return found


def main(arguments: list[str]) -> None:
    """Print a table."""
    if not arguments:
        raise SystemExit(__doc__)
    torch.manual_seed(0)
    teacher, student, many = networks(arguments)
    codebook = codebook_of(student)
    print("| batch | teacher, multinomial, ms | student, ms | ratio |\n|---|---|---|---|")
    for batch in (1, many):
        cond = Cond.of_labels(torch.arange(batch) % 10)
        z, t = torch.randn(batch, sum(teacher.groups), codebook.shape[1]), torch.ones(batch)
        found = seconds(
            {
                "teacher": lambda c=cond: drawn(teacher, codebook, c),
                "student": torch.no_grad()(lambda z=z, t=t, c=cond: student(z, t, c)),
            }
        )
        old, new = found["teacher"], found["student"]
        print(f"| {batch} | {1000 * old:.2f} | {1000 * new:.2f} | {old / new:.1f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
