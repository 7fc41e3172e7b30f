"""Jobs on networks of which a part is trained, or that share a part; see `worker`. No test itself."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from engine_support import Points, head_only, two_adapters, two_heads
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from distill.engine.fit import Fit, train
from distill.engine.loggers import Jsonl
from distill.engine.logging import read_entries
from distill.engine.parallel import full, full_state, make_mesh, shard_net
from distill.world import World

CPU = torch.device("cpu")


class Block(nn.Module):
    """A block that holds a list of blocks, as those of diffusers' U-Nets do."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.scale = nn.Linear(6, 6)
        self.layers = nn.ModuleList([Block(depth - 1) for _ in range(2)] if depth else [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x + torch.tanh(self.scale(x))


class Nested(nn.Module):
    """Lists in lists of blocks, and a method beside `forward`."""

    entries = ("logits",)

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([Block(2), Block(1)])
        self.out = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.down:
            x = block(x)
        return self.out(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x).log_softmax(-1)


def job_nested(world: World, folder: Path) -> None:
    """Outputs and gradients of a net whose lists nest, each block a unit, beside the same net whole."""
    torch.manual_seed(0)
    whole = Nested()
    net = copy.deepcopy(whole)
    shard_net(net, make_mesh(world, "world", CPU), least=1)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    part = x.chunk(world.size)[world.rank]
    found = {}
    for name in ("forward", "logits"):
        for model, rows in ((whole, x), (net, part)):
            model.zero_grad()
            getattr(model, "__call__" if name == "forward" else name)(rows).square().mean().backward()
        pairs = zip(whole.named_parameters(), net.parameters(), strict=True)
        found[name] = {
            key: float((p.grad - full(q.grad)).abs().max()) for (key, p), q in pairs if p.grad is not None
        }
    if world.main:
        torch.save(found, folder / "nested.pt")


def job_parts(world: World, folder: Path) -> None:
    """Methods that train a head, two heads on one base, and two adapters of one base; weights and averages at the end."""
    for shard in ("none", "world"):
        for name, make in (("head", head_only), ("heads", two_heads), ("adapters", two_adapters)):
            method = make(world)
            place = folder / f"{name}-{shard}-{world.size}"
            train(method, Points(), Fit(8, 16, accumulate=2, shard=shard), folder=place)
            found = {
                f"{part}.{role}.{key}": value
                for part, networks in (("net", method.networks), ("ema", method.ema))
                for role, network in networks.items()
                for key, value in full_state(network).items()
            }
            if world.main:
                torch.save(found, folder / f"{place.name}.pt")


class Ranks(L.Callback):
    """Notes what Lightning says of this process."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, bool, int, int]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        trainer.loggers[0].log_metrics({"a": 1.0}, step=trainer.global_step)  # dropped where nothing logs
        writes = sum(not isinstance(logger, DummyLogger) for logger in trainer.loggers)
        self.seen.append((trainer.global_rank, trainer.is_global_zero, trainer.global_step, writes))


def job_callbacks(world: World, folder: Path) -> None:
    """A callback on every process, a logger on the main one."""
    ranks = Ranks()
    loggers = [Jsonl(folder)] if world.main else []
    train(
        head_only(world),
        Points(),
        Fit(2, 16, log_every=1),
        folder=folder / "c",
        loggers=loggers,
        callbacks=[ranks],
    )
    if seen := world.gather(ranks.seen):
        torch.save(
            {"seen": seen, "logged": [e["step"] for e in read_entries(folder / "metrics.jsonl")]},
            folder / "ranks.pt",
        )


def job_rows(world: World, folder: Path) -> None:
    """A loss of the rows of all processes, |mean f(x)|^2: its gradient on each process, and their mean."""
    weight = torch.arange(6.0).reshape(3, 2).requires_grad_(True)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    out = x.chunk(world.size)[world.rank] @ weight
    rows = world.rows(out)
    rows.mean(0).square().sum().backward()
    gradient = world.mean(weight.grad.clone())
    labels = world.rows(torch.arange(4).chunk(world.size)[world.rank])
    if world.main:
        torch.save(
            {"rows": rows.detach(), "gradient": gradient, "labels": labels}, folder / f"rows-{world.size}.pt"
        )
    if world.size > 1:
        dist.barrier()
