"""Our training step against a peer's: the same net, batch, optimizer, clipping and average around the peer's own loss.

    python scripts/bench/peers.py                                         the bare loop stands in for a peer
    python scripts/bench/peers.py --peer torchcfm --path ~/src/torchcfm   a checkout (or an unpacked wheel) of it

The peer's library is imported from --path and nothing of it is contained here: a line of `PEERS` says which module is
imported, what it must offer, and how its loss is called on our net. Its loop is the bare one of `overhead.py`, which is how
its examples train. Blocks of the three loops take turns in one process; see `overhead.py` for what is measured.

Adapters that were run: torchcfm 1.0.7; rectified-flow 1.0.1, with torchvision (which it imports for plots) left empty.
Never run: any other version. No adapter: diffusers' LCM scripts, FastGen, DMD2, whose steps stand inside one long `main` or
need a GPU, so there is nothing to import and time on the same net.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from overhead import CASES, HEADER, Bare, Case, Clock, measure, method, plain_loss, positive, rows
from torch import Tensor

from distill.data.digits import Digits

Loss = Callable[[Bare], Tensor]


@dataclass(frozen=True)
class Peer:
    """How a peer is reached: the module to import, the name that it must offer, and its loss on a loop's next batch."""

    module: str
    name: str
    loss: Callable[[ModuleType], Loss]


def torchcfm(module: ModuleType) -> Loss:
    """ConditionalFlowMatcher: x0 is noise, x1 data, t = 1 is data and the velocity data minus noise."""
    matcher = module.ConditionalFlowMatcher(sigma=0.0)

    def loss(loop: Bare) -> Tensor:
        data, cond = loop.take()
        t, x_t, velocity = matcher.sample_location_and_conditional_flow(torch.randn_like(data), data)
        return (-loop.net(x_t, 1 - t, cond) - velocity).square().mean()

    return loss


def rectified_flow(module: ModuleType) -> Loss:
    """RectifiedFlow.get_loss, with times from its own sampler; the same orientation. Made once, as its users do: making one
    solves its interpolation symbolically."""
    flow = module.RectifiedFlow(Digits.sample_shape, lambda x_t, t, net, cond: -net(x_t, 1 - t, cond))

    def loss(loop: Bare) -> Tensor:
        data, cond = loop.take()
        t = flow.sample_train_time(len(data), expand_dim=False)
        return flow.get_loss(torch.randn_like(data), data, t, net=loop.net, cond=cond)

    return loss


PEERS = {
    "torchcfm": Peer("torchcfm.conditional_flow_matching", "ConditionalFlowMatcher", torchcfm),
    "rectified-flow": Peer("rectified_flow.rectified_flow", "RectifiedFlow", rectified_flow),
}


def load(peer: str, path: Path | None) -> Loss:
    """A peer's loss, from its checkout. Raises ValueError that names --path and what is missing."""
    spec = PEERS[peer]
    package = spec.module.partition(".")[0]
    expected = f"expected a checkout of {peer}: a folder that holds the package {package}"
    if path is None:
        raise ValueError(f"--path: missing; {expected}")
    if not (path / package).is_dir():
        raise ValueError(f"--path: {path} holds no folder {package}; {expected}")
    sys.path.insert(0, str(path.resolve()))
    try:
        module = importlib.import_module(spec.module)
    except ImportError as error:
        raise ValueError(f"--path: {spec.module} of {path} cannot be imported: {error}") from error
    finally:
        sys.path.remove(str(path.resolve()))
    found = Path(module.__file__ or "").resolve()
    if not found.is_relative_to(path.resolve()):
        raise ValueError(f"--path: {spec.module} was imported from {found}; {expected}")
    if not hasattr(module, spec.name):
        raise ValueError(
            f"--path: {found} has no {spec.name}: another version than this adapter was written for?"
        )
    return spec.loss(module)


def check(loop: Bare) -> None:
    """Raise ValueError unless the loss is a finite scalar that reaches every parameter: the same work as ours."""
    loss = loop.loss(loop)
    if loss.ndim or not torch.isfinite(loss):
        raise ValueError(f"peer: expected a finite scalar loss, found {loss}")
    reached = torch.autograd.grad(loss, loop.parameters, allow_unused=True)
    if missed := sum(gradient is None for gradient in reached):
        raise ValueError(
            f"peer: the loss reaches all but {missed} of {len(reached)} parameters, expected all"
        )


def compare(case: Case, peer: str, loss: Loss, options: argparse.Namespace) -> list[str]:
    """Table rows: the engine over the peer, and the peer over the bare loop."""
    data, clock = Digits(), Clock()
    check(Bare(method(case).student.net, data, case.batch_size, loss))
    for _ in range(options.runs):
        loops = {
            "bare": Bare(method(case).student.net, data, case.batch_size, plain_loss),
            peer: Bare(method(case).student.net, data, case.batch_size, loss),
        }
        measure(case, data, loops, options.blocks, clock)
    return rows(case, clock, [("engine", peer), (peer, "bare")])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peer", choices=sorted(PEERS), help="default: none, a second bare loop in its place"
    )
    parser.add_argument("--path", type=Path, help="the peer's checkout")
    parser.add_argument("--nets", nargs="+", choices=sorted(CASES), default=["20"])
    parser.add_argument("--runs", type=positive, default=3)
    parser.add_argument("--blocks", type=positive, default=8, help="timed blocks a loop in each run")
    parser.add_argument("--block-steps", type=positive, help="steps a block (default: about 0.3 s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        loss = load(options.peer, options.path) if options.peer else plain_loss
    except ValueError as error:
        parser.error(str(error))
    print(
        f"torch {torch.__version__}, 1 thread, {options.runs} runs of {options.blocks} blocks a loop\n\n{HEADER}"
    )
    for name in options.nets:
        case = CASES[name].with_block(options.block_steps)
        print("\n".join(compare(case, options.peer or "stand-in", loss, options)), flush=True)


if __name__ == "__main__":
    main()
