"""What the processes of the distributed tests run: trains, writes what it found, rank by rank. No test itself.

A job is the end of a `job_NAME` below, or MODULE.NAME for one of another file. The
world comes from the environment, and without one this is one process.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from checkpoint_support import checkpoint_of, former_file
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distill.data.digits import Digits
from distill.data.rng import sample_noise
from distill.engine.fit import Fit, train
from distill.engine.module import DistillModule
from distill.engine.parallel import full, full_state, local, make_mesh, shard_net, units
from distill.engine.schedule import Linear
from distill.engine.update import Loss, Optim, Update
from distill.models.denoiser import Denoiser
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.world import World, join, leave

torch.set_num_threads(1)
STEPS, BATCH = 6, 16
Method = TypeVar("Method", bound=DistillModule)


def net() -> Denoiser:
    """A small U-Net whose layers all matter."""
    unet = UNet(width=8, multipliers=(1,), embedding=16, groups=4)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.15)
    return Denoiser(unet, Flow(), "velocity", (1, 8, 8))


class Score(DistillModule):
    """Three networks as score distillation has them: a frozen teacher, a fake score that is trained in every iteration, a
    student in every second one whose gradient flows through the fake's input."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(net())
        self.teacher = self.keep_frozen("teacher", net())
        self.fake = net()
        self.norms: list[list[float]] = []
        self.poison: set[int] = set()

    def updates(self):
        return [
            Update("student", {"student": self.student}, self.student_loss, every=2),
            Update("fake", {"fake": self.fake}, self.fake_loss),
        ]

    def result(self):
        return Result(SamplerSpec(steps=1, any_steps=True), "independent")

    def student_loss(self, batch, step):
        z, t = step.draws.normal("z", (1, 8, 8)), 0.1 + 0.8 * step.draws.uniform("t")
        x = self.student.x0(z, torch.ones(len(z)), batch.cond)
        step.shared["x"] = x.detach()
        x_t = self.student.process.add_noise(x, step.draws.normal("eps", (1, 8, 8)), t)
        with torch.no_grad():
            target = self.teacher.x0(x_t, t, batch.cond)
        return Loss((self.fake.x0(x_t, t, batch.cond) - target + batch.x0).square().mean())

    def fake_loss(self, batch, step):
        x = step.shared.get("x", batch.x0)
        t, eps = 0.1 + 0.8 * step.draws.uniform("t"), step.draws.normal("eps", (1, 8, 8))
        loss = (
            (self.fake.velocity(self.fake.process.add_noise(x, eps, t), t, batch.cond) - (eps - x))
            .square()
            .mean()
        )
        bad = step.iteration in self.poison and self.world.rank == self.world.size - 1
        return Loss(loss * (float("nan") if bad else 1.0))


def make(world: World) -> Score:
    """The method, prepared; the same weights on every process."""
    return prepared(Score(), world)


def prepared(method: Method, world: World) -> Method:
    """A method of a student, which is averaged, and a fake score, with the settings of all jobs."""
    optim = {
        "optimizer": partial(torch.optim.AdamW, lr=1e-3, fused=True, eps=1e-6),
        "schedule": Linear(total=4 * STEPS),
    }
    method.prepare(
        {"student": Optim(**optim, clip=1.0, ema=0.9), "fake": Optim(**optim, clip=0.5, ema=None)},
        seed=3,
        world=world,
    )
    return method


def fit(
    method: DistillModule,
    folder: Path,
    *,
    steps: int = STEPS,
    shard: str = "none",
    accumulate: int = 2,
    callbacks: Sequence[Callback] = (),
    **options,
) -> dict:
    """Train; losses and gradient norms (and the node, where there is one) of every step, and all weights at the end."""
    seen: dict[str, list[float]] = {}
    original = method._run

    def noted(update, batch, shared, iteration):
        logs = original(update, batch, shared, iteration)
        for key in (f"{update.name}/{name}" for name in ("loss", "grad_norm", "node")):
            if key in logs:
                seen.setdefault(key, []).append(float(method.world.mean(logs[key].clone().reshape(1))))
        return logs

    method._run = noted
    train(
        method,
        Digits(),
        Fit(steps=steps, batch_size=BATCH, shard=shard, accumulate=accumulate, **options),
        folder=folder,
        config={},
        callbacks=callbacks,
    )
    result = {
        f"{role}.{k}": v for role, network in method.networks.items() for k, v in full_state(network).items()
    }
    result |= {f"ema.{k}": v for k, v in full_state(method.ema["student"]).items()}
    return result | {key: torch.tensor(values) for key, values in seen.items()}


class Watching(Callback):
    """Numbers of a gradient on this process after each backward, of those that are there."""

    def __init__(self) -> None:
        self.held: list[int] = []

    def on_after_backward(self, trainer, pl_module) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.held.append(sum(local(gradient).numel() for gradient in gradients))


def job_train(world: World, folder: Path) -> None:
    """Train in every way of sharding, from the start, and to halfway, with gradients reduced in each micro batch, for other
    worlds."""
    once, each = Watching(), Watching()
    for shard in ("none", "world"):
        result = fit(make(world), folder / f"{shard}-{world.size}", shard=shard, callbacks=[once])
        if world.main:
            torch.save(result, folder / f"{shard}-{world.size}.pt")
    half = {"steps": STEPS // 2, "shard": "world", "reduce_each": True, "callbacks": [each]}
    method = make(world)
    fit(method, folder / f"half-of-{world.size}", **half)
    if world.main:
        whole = sum(p.numel() for p in method.student.parameters())
        torch.save(
            {"once": once.held[0], "each": each.held[0], "whole": whole}, folder / f"held-{world.size}.pt"
        )


def job_continue(world: World, folder: Path) -> None:
    """Continue the half that the other world size trained, from its shards and from one file of an earlier version."""
    other = 3 - world.size
    half, former = folder / f"half-of-{other}", folder / f"former-of-{other}"
    if world.main:
        former_file(half, former)
    world.barrier()
    for name, place in (("continued", half), ("former", former)):
        result = fit(make(world), place, shard="world")
        if world.main:
            torch.save(result, folder / f"{name}-on-{world.size}.pt")


def job_gradients(world: World, folder: Path) -> None:
    """Gradients of the first student step, whole."""
    found: dict[str, torch.Tensor] = {}
    method = make(world)
    configure = method.configure_optimizers

    def watched():
        optimizers = configure()
        names = method.parameter_names()

        def note(optimizer, *_):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    found.setdefault(names[id(p)], full(p.grad).clone())

        for optimizer in optimizers:
            optimizer.register_step_pre_hook(note)
        return optimizers

    method.configure_optimizers = watched
    train(
        method,
        Digits(),
        Fit(steps=1, batch_size=BATCH, shard="world"),
        folder=folder / f"g{world.size}",
        config={},
    )
    if world.main:
        torch.save(found, folder / f"gradients-{world.size}.pt")


def job_stale(world: World, folder: Path) -> None:
    """Forward without gradient, optimizer step, forward: the last must see the new weights of the root. By default it does
    not, which shows that the sequence is the right one."""
    mesh = make_mesh(world, "world", torch.device("cpu"))
    errors = {}
    for kind in ("ours", "default"):
        torch.manual_seed(0)
        linear = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        if kind == "ours":
            shard_net(linear, mesh)
        else:
            fully_shard(linear, mesh=mesh)
        optimizer = torch.optim.SGD(linear.parameters(), lr=0.5)
        x = torch.ones(2, 4)
        linear(x).square().sum().backward()
        with torch.no_grad():
            linear(x)
        optimizer.step()
        weights = full_state(linear) if kind == "ours" else None
        with torch.no_grad():
            output = linear(x)
        if weights is None:
            linear.reshard()
            weights = full_state(linear)
        expected = x
        for i in range(2):
            expected = expected @ weights[f"{i}.weight"].T + weights[f"{i}.bias"]
        errors[kind] = float((output - expected).abs().max())
    if world.main:
        torch.save(errors, folder / "stale.pt")


def job_local(world: World, folder: Path) -> None:
    """Averages are shards like what they average, a net's blocks are units, frozen nets are sharded too."""
    method = make(world)
    mesh_width = make_mesh(world, "world", torch.device("cpu")).size()
    method.distribute("world", torch.device("cpu"))
    method._images = BATCH
    pairs = zip(method.ema["student"].parameters(), method.student.parameters(), strict=True)
    unet = method.student.net
    found = {
        "width": mesh_width,
        "all sharded": all(
            isinstance(p, DTensor) for p in [*unet.parameters(), *method.teacher.net.parameters()]
        ),
        "same shards": all(a.to_local().shape == b.to_local().shape for a, b in pairs),
        "units": len(units(unet, least=1)),
        "synced": len(method._running_of(replace(method.plan[0], mode="eval")).sharded),
    }
    if world.main:
        torch.save(found, folder / "local.pt")


def job_poison(world: World, folder: Path) -> None:
    """The last rank's loss of one net is NaN at two iterations: all ranks skip them together and count them."""
    method = make(world)
    method.poison = {3, 4}
    before: dict[int, torch.Tensor] = {}
    original = method._run

    def noted(update, batch, shared, iteration):
        weight = method.fake.net.stem.weight
        old = full(weight).detach().clone()
        logs = original(update, batch, shared, iteration)
        if update.name == "fake":
            before[iteration] = (full(weight).detach() - old).abs().max()
        return logs

    method._run = noted
    train(
        method,
        Digits(),
        Fit(steps=4, batch_size=BATCH, shard="world"),
        folder=folder / f"p{world.size}",
        config={},
    )
    counts = world.gather(method.nonfinite.to_dict())
    message = ""
    stubborn = make(world)
    stubborn.poison = set(range(5, 100))
    try:
        fit = Fit(steps=STEPS, batch_size=BATCH, shard="world", checkpoint_every=2, max_nonfinite=3)
        train(stubborn, Digits(), fit, folder=folder / f"q{world.size}", config={})
    except FloatingPointError as error:
        message = str(error)
    messages = world.gather(message)
    if world.main:
        moved = {i: float(v) for i, v in before.items()}
        saved = checkpoint_of(folder / f"q{world.size}")["progress"]["step"]
        torch.save(
            {"moved": moved, "counts": counts, "messages": messages, "saved": saved},
            folder / f"poison-{world.size}.pt",
        )


def job_mesh(world: World, folder: Path) -> None:
    """The mesh of each cut, and the names that are refused."""
    cuts = {cut: tuple(make_mesh(world, cut, torch.device("cpu")).shape) for cut in ("none", "world", "node")}
    assert init_device_mesh("cpu", (world.size,)).size() == world.size
    noise = sample_noise(0, "w", torch.arange(5), (2,))
    parts = {n: noise[ids] for n, ids in world.share(torch.arange(5).split(2))}
    collected = world.collect(parts)
    flags = (world.any(world.rank == 1), world.any(False))
    if world.main:
        torch.save({"cuts": cuts, "collected": collected, "noise": noise, "flags": flags}, folder / "mesh.pt")


def main(folder: Path, jobs: Sequence[str]) -> None:
    """Do the jobs, one after the other, in the world of the environment."""
    place = join(torch.device("cpu"))
    for job in jobs:
        module, _, name = job.rpartition(".")
        getattr(importlib.import_module(module or "worker"), f"job_{name}")(place, folder)
        place.barrier()
    leave()
    assert not dist.is_initialized()
