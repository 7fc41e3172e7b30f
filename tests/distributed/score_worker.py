"""Jobs of score distillation for `worker.py`: every method on one process and on two, whole and continued. No test itself.

One process is a world of its own wherever it runs, so the two processes share the single runs between them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from worker import fit, prepared

from distill.engine import checkpoint
from distill.engine.module import DistillModule
from distill.engine.parallel import full_state, is_sharded, shard_net
from distill.methods.disback import DisBack
from distill.methods.dmd import DMD
from distill.methods.sid import SiD
from distill.models.denoiser import Denoiser
from distill.models.native import save_model
from distill.models.spec import SamplerSpec
from distill.nets.mlp import MLP
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.world import World

STEPS, HALF, NODES = 8, 5, 4
TIMES: dict[str, Any] = {
    "generator_times": {"name": "uniform", "low": 0.02, "high": 0.98},
    "fake": {"times": {"name": "logit_normal"}},
}
# One group: of the small nets' few features, groups would hold two numbers each, whose norm is a sign, and then the order of
# a sum decides.
GAN = {"weight_g": 1.0, "weight_d": 1.0, "groups": 1}
POINTS_GAN = {"weight_g": 1.0, "weight_d": 1.0}  # features of points have no groups
SMALL = {"shape": (1, 8, 8), "width": 33, "depth": 2, "features": 8, "num_classes": 10, "time_scale": 30.0}


def small() -> Denoiser:
    """A net of few tensors, since sharding costs by the tensor; 33 rows cannot be split evenly."""
    mlp = MLP(**SMALL)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Denoiser(mlp, Flow(), "velocity", (1, 8, 8))


def unet() -> Denoiser:
    """A U-Net of one level."""
    net = UNet(width=8, multipliers=(1,), embedding=16, groups=4, attention="none")
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.15)
    return Denoiser(net, Flow(), "velocity", (1, 8, 8))


def sid(student: Denoiser, teacher: Denoiser, nodes: Sequence[Path]) -> DistillModule:
    """Teacher and fake score pass gradients on to their inputs."""
    return SiD(student, teacher, **TIMES)


def gan_on_fake(student: Denoiser, teacher: Denoiser, nodes: Sequence[Path]) -> DistillModule:
    """The fake score learns by its output and by its features."""
    return DMD(student, teacher, updates={"fake_per_student": 2}, gan={"features": "fake", **GAN}, **TIMES)


def gan_on_teacher(student: Denoiser, teacher: Denoiser, nodes: Sequence[Path]) -> DistillModule:
    """A frozen net passes gradients on from its features; no noise before it."""
    gan = {"features": "teacher", "diffusion": False, **POINTS_GAN}
    return DMD(student, teacher, updates={"fake_per_student": 2}, gan=gan, **TIMES)


def two_steps(student: Denoiser, teacher: Denoiser, nodes: Sequence[Path]) -> DistillModule:
    """Backward simulation: one step of the student for all processes, and one for each sample of the fake score, which is
    updated three times as often."""
    return DMD(student, teacher, sampling={"levels": [4.0, 1.0]}, updates={"fake_per_student": 3}, **TIMES)


def disback(student: Denoiser, teacher: Denoiser, nodes: Sequence[Path]) -> DistillModule:
    """Targets change at steps 2, 4 and 6; the head sees features of the target, also between student steps."""
    gan = {"features": "teacher", **POINTS_GAN}
    return DisBack(
        student,
        teacher,
        nodes,
        backtrack={"steps_per_node": 2},
        updates={"fake_per_student": 2},
        gan=gan,
        **TIMES,
    )


def plateau(student: Denoiser, teacher: Denoiser, nodes: Sequence[Path]) -> DistillModule:
    """Windows end at even steps, so the checkpoint lies inside one; the loss rises, and every second one ends a target."""
    walk = {"backtrack": {"criterion": "plateau", "window": 2, "tolerance": 0.5}}
    return DisBack(student, teacher, nodes, updates={"fake_per_student": 1}, **walk, **TIMES)


METHODS = {
    sid: small,
    gan_on_fake: unet,
    gan_on_teacher: small,
    two_steps: small,
    disback: small,
    plateau: small,
}
# Also trained with blocks that are gathered on their own, as of large nets: features come from the middle of such a net, and
# what lies behind them sees no backward.
IN_UNITS, UNIT = (sid, gan_on_fake, gan_on_teacher), 100
# The default tests train the method with the most state of its own, continue and replicate it. Everything else is the slow
# tests'.
QUICK = [disback]
Build = Callable[[Denoiser, Denoiser, Sequence[Path]], DistillModule]


def write_nodes(folder: Path) -> None:
    """Model folders of the teacher and of ever more degraded ones."""
    torch.manual_seed(1)
    teacher = small()
    for number in range(NODES + 1):
        save_model(
            folder / f"{number:03d}", teacher, SamplerSpec(steps=50, any_steps=True), full_state(teacher.net)
        )
        for parameter in teacher.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape)


def make(build: Build, world: World, nodes: Path) -> DistillModule:
    """A method whose student is not the teacher; the same weights on every process."""
    torch.manual_seed(1)
    teacher, student = METHODS[build](), METHODS[build]()
    return prepared(build(student, teacher, sorted(nodes.iterdir())), world)


def train(
    build: Build, world: World, folder: Path, name: str, *, shard: str = "none", begun: Path | None = None
) -> None:
    """Train to the end, from the checkpoint `begun` where there is one, and store what was found. The checkpoint of `HALF`
    steps stays beside the last."""
    place = folder / build.__name__ / name
    if world.main:
        place.parent.mkdir(parents=True, exist_ok=True)
        if begun is not None:
            shutil.copytree(begun, place)
    world.barrier()
    method = make(build, world, folder / "nodes")
    save, after_step, walk = checkpoint.save, method.after_step, []

    def walked() -> None:
        after_step()
        walk.append([float(value) for value in method.state().values()])

    def keep(folder: Path, module: DistillModule, *rest: Any, **options: Any) -> Path:
        path = save(folder, module, *rest, **options)
        if module.world.main and module.progress.step == HALF:
            shutil.copytree(path, folder / "half" / path.name)
        return path

    checkpoint.save, method.after_step = keep, walked
    try:
        accumulate = 1 if METHODS[build] is unet else 2
        found = fit(method, place, steps=STEPS, shard=shard, accumulate=accumulate, checkpoint_every=HALF)
    finally:
        checkpoint.save = save
    teacher = method.frozen["teacher"]
    found |= {f"teacher.{name}": value for name, value in full_state(teacher).items()}
    if build is plateau:
        rows = torch.tensor(walk, dtype=torch.float64)
        # Infinite: no window has ended, so there is nothing to compare with.
        found["state/walk"] = torch.where(rows.isposinf(), -1.0, rows)
    held = sum(p.to_local().numel() if is_sharded(p) else p.numel() for p in teacher.parameters())
    shares = world.gather(held)
    if world.main:
        found["held"] = torch.tensor(shares)
        torch.save(found, place / "found.pt")


def job_quick(world: World, folder: Path) -> None:
    """What the default tests need."""
    train_all(world, folder, QUICK, QUICK, [])


def job_all(world: World, folder: Path) -> None:
    """What the slow ones need."""
    train_all(world, folder, list(METHODS), list(METHODS), IN_UNITS)


def train_all(
    world: World, folder: Path, builds: Sequence[Build], continued: Sequence[Build], in_units: Sequence[Build]
) -> None:
    """Every method, whole: alone (each process has its share of them) and sharded; those in `continued` also replicated, and
    the halves of each number of processes continued on each."""
    alone = [build for number, build in enumerate(builds) if number % world.size == world.rank]
    if world.main:
        write_nodes(folder / "nodes")
    world.barrier()
    for build in alone:
        train(build, World(), folder, "one")
    world.barrier()
    for build in builds:
        halves = {name: folder / build.__name__ / name / "half" for name in ("one", "world")}
        train(build, world, folder, "world", shard="world")
        if build not in continued:
            continue
        train(build, world, folder, "none", shard="none")
        train(build, world, folder, "two-on-two", shard="world", begun=halves["world"])
        train(build, world, folder, "one-on-two", shard="world", begun=halves["one"])
    for build in in_units:
        default, shard_net.__kwdefaults__["least"] = shard_net.__kwdefaults__["least"], UNIT
        train(build, world, folder, "units", shard="world")
        shard_net.__kwdefaults__["least"] = default
    world.barrier()
    for build in [build for build in alone if build in continued]:
        train(build, World(), folder, "one-on-one", begun=folder / build.__name__ / "one" / "half")
        train(build, World(), folder, "two-on-one", begun=folder / build.__name__ / "world" / "half")
