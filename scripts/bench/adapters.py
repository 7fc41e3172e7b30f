"""Peak memory of a training step with adapters against one of all weights: python scripts/bench/adapters.py

Both parts train HiPA with a loss on samples alone (`high_frequency` 0, no features), with activations that are computed again.
Measured: a U-Net of the package on this CPU, each case in a process of its own, as the growth of its peak resident memory
over that before the networks were built. By arithmetic: the U-Net of Stable Diffusion 1.5 on the meta device, where nothing is
allocated, as the largest sum of the sizes of all tensors that are alive at a time in one step: weights, activations,
gradients, AdamW's state and the average.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from shaped_nets import shaped  # noqa: E402

from distill.data.batch import Batch  # noqa: E402
from distill.data.cond import Cond  # noqa: E402
from distill.data.rng import Draws  # noqa: E402
from distill.engine.fit import Fit, train  # noqa: E402
from distill.engine.memory import predicted  # noqa: E402
from distill.engine.networks import recompute_activations  # noqa: E402
from distill.engine.schedule import Constant  # noqa: E402
from distill.engine.update import Optim, Step  # noqa: E402
from distill.methods.hipa import HiPA  # noqa: E402
from distill.models.adapters import Adapted  # noqa: E402
from distill.models.decoder import Pixels  # noqa: E402
from distill.models.denoiser import Denoiser  # noqa: E402
from distill.nets.recomputed import Recomputed  # noqa: E402
from distill.nets.unet import UNet  # noqa: E402
from distill.process.flow import Flow  # noqa: E402

UNIT = 1024 if platform.system() == "Linux" else 1  # of ru_maxrss
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
IMAGES = (3, 32, 32)


class Noise:
    """Random pairs of images; a training source."""

    sample_shape, num_classes, value_range = IMAGES, 0, (-1.0, 1.0)

    def __len__(self) -> int:
        return 1024

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """x0 and z."""
        x0, z = (torch.randn(len(rows), *IMAGES) for _ in range(2))
        return Batch(rows, index, Cond.nothing(len(rows)), x0=x0, z=z)

    def fingerprint(self) -> str:
        """Of nothing that lasts."""
        return "noise"


def method(
    net: nn.Module, shape: tuple[int, ...], rank: int | None, targets: list[str] | None = None
) -> HiPA:
    """A prepared training of all weights of a net, or of adapters on it."""
    model = Denoiser(net, Flow(), "velocity", shape, decoder=Pixels())
    if rank is not None:
        model = model.with_(net=Adapted(net, rank, targets=targets))
    made = HiPA(model, high_frequency={"fourier": 0.0, "edges": 0.0})
    made.prepare({"student": Optim(partial(torch.optim.AdamW, lr=1e-4), Constant(), ema=0.999)}, seed=0)
    return made


def peak_of_process(rank: int | None, width: int, batch: int) -> dict[str, int]:
    """Two training steps in this process: bytes by which its peak grew, parameters and trained parameters."""
    torch.set_num_threads(1)

    def run(made: HiPA, fit: Fit) -> None:
        with tempfile.TemporaryDirectory() as folder:
            train(made, Noise(), fit, folder=Path(folder), config={})

    small = UNet(channels=3, width=8, groups=4, num_classes=0)
    run(method(small, IMAGES, None), Fit(steps=1, batch_size=1))  # what importing and training as such take
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT
    net = UNet(channels=3, width=width, multipliers=(1, 2, 4), embedding=4 * width, groups=8, num_classes=0)
    made = method(Recomputed(net), IMAGES, rank)
    run(made, Fit(steps=2, batch_size=batch))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT - before
    trained = sum(p.numel() for p in made.trained["student"].parameters())
    return {"peak": grown, "parameters": sum(p.numel() for p in net.parameters()), "trained": trained}


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that are alive: the given ones, and those that operations make inside the block."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.seen: dict[int, Any] = {}
        for tensor in tensors:
            self._count(tensor)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self.seen:
            return
        size = storage.nbytes()
        self.seen[key] = weakref.finalize(storage, self._free, key, size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _free(self, key: int, size: int) -> None:
        self.bytes -= size
        del self.seen[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for found in tree_leaves(out):
            if isinstance(found, Tensor):
                self._count(found)
        return out


def peak_by_arithmetic(name: str, rank: int | None, batch: int, base: torch.dtype) -> tuple[int, int]:
    """(largest number of bytes alive in a step, bytes between steps) of a shape of `shaped_nets`, in its second step."""
    device = torch.device("meta")
    net, shape, _ = shaped(name, device)
    made = method(net.to(base), shape, rank, ATTENTION)
    recompute_activations(made.networks)
    rows = torch.arange(batch)
    x0, z = (torch.empty(batch, *shape, device=device) for _ in range(2))
    data, step = Batch(rows, rows, Cond.nothing(batch), x0=x0, z=z), Step(0, Draws(0, "s", 0, rows))
    made.student.train()
    parameters = list(made.trained["student"].parameters())
    optimizer = made.optim["student"].optimizer(parameters)
    kept = [*made.student.parameters(), *made.averaged["student"].network.parameters()]
    with Alive([*kept, x0, z]) as alive:
        for _ in range(2):  # the first one makes the optimizer's state
            alive.peak = alive.bytes
            made.loss(data, step).total.backward()
            optimizer.step()
            optimizer.zero_grad()
    return alive.peak, sum(predicted(made).total().values())


def measured(width: int, batch: int) -> str:
    """The table of the measured cases."""
    found = {}
    for name, rank in {"all weights": None, "LoRA, rank 16": 16, "LoRA, rank 4": 4}.items():
        command = [sys.executable, __file__, "--case", json.dumps([rank, width, batch])]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found[name] = json.loads(out.splitlines()[-1])
    whole = found["all weights"]
    lines = ["| measured | trained | peak, MiB | ratio |", "|---|---|---|---|"]
    for name, row in found.items():
        cells = [f"{row['trained']:,} beside {whole['parameters']:,}", f"{row['peak'] / 2**20:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['peak'] / whole['peak']:.2f} |")
    return "\n".join(lines)


def arithmetic(name: str, batches: list[int]) -> str:
    """The table of a shape."""
    cases = {
        "all weights": (None, torch.float32),
        "LoRA, rank 16, base in float32": (16, torch.float32),
        "LoRA, rank 16, base in bfloat16": (16, torch.bfloat16),
    }
    lines = ["| by arithmetic | batch | between steps, GiB | peak, GiB | ratio |", "|---|---|---|---|---|"]
    for batch in batches:
        whole = 0
        for label, (rank, base) in cases.items():
            peak, kept = peak_by_arithmetic(name, rank, batch, base)
            whole = whole or peak
            lines.append(
                f"| {label} | {batch} | {kept / 2**30:.2f} | {peak / 2**30:.2f} | {peak / whole:.2f} |"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=96, help="of the measured U-Net")
    parser.add_argument("--batch", type=int, default=4, help="of the measured step")
    parser.add_argument("--shape", default="sd15", help="of the arithmetic: sd15, sdxl, tiny")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="of the arithmetic")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case is not None:
        print(json.dumps(peak_of_process(*json.loads(options.case))))
        return
    print(arithmetic(options.shape, options.batches), end="\n\n", flush=True)
    print(measured(options.width, options.batch))


if __name__ == "__main__":
    main()
