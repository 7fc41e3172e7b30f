"""What `certificates` trains with: the exact teacher of eight Gaussians, its data and pairs, a small student, the engine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.points import Points, ring_means
from distill.data.rng import sample_noise
from distill.data.source import Source
from distill.engine.fit import Fit, train
from distill.engine.module import DistillModule
from distill.engine.schedule import Linear
from distill.engine.update import Optim
from distill.evaluation.certificate import flow_map
from distill.methods.denoising import Denoising
from distill.models.analytic import exact_denoiser
from distill.models.denoiser import Denoiser
from distill.nets.mlp import MLP
from distill.nets.precond import EDMPrecond
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.vp import VPScaledLinear

DATA = 65536  # points of the training data
PAIRS = 8192  # pairs of noise and exact end, for methods that train on pairs


def falls_late(total: int, share: float = 0.3) -> Callable[[int], float]:
    """A learning rate that is constant and then falls to 0 over the last `share` of `total` steps."""
    return lambda step: min(1.0, (total - step) / (share * total))


def fit(
    method: DistillModule,
    source: Source,
    *,
    steps: int,
    batch: int,
    optim: Optim,
    seed: int,
    **hooks: Any,
) -> Denoiser:
    """Train a method with the engine; returns the student's average if there is one, else the student.

    All optimizers of the method have the settings `optim`; `hooks` are those of `engine.fit.train`."""
    keys = {update.name for update in method.updates()}
    method.prepare(dict.fromkeys(keys, optim), seed=seed)
    length = Fit(steps=steps, batch_size=batch, checkpoint_every=steps)
    with tempfile.TemporaryDirectory() as folder:
        train(method, source, length, folder=Path(folder), config={}, **hooks)
    return method.as_generator().denoiser.eval()


def trainable(model: Denoiser) -> Denoiser:
    """Return a trainable copy of a model."""
    return deepcopy(model).requires_grad_(True)


@dataclass(frozen=True)
class Ring:
    """8 Gaussians on a circle. `WIDE` has about unit variance per coordinate, for flows and variance-preserving processes;
    `NARROW` has the standard deviation 0.5 of EDM's preconditioning."""

    radius: float
    std: float

    def teacher(self, process: Process, labelled: bool = False) -> Denoiser:
        """Return the exact teacher."""
        return exact_denoiser(process, ring_means(8, self.radius), self.std, labelled=labelled).eval()

    def points(self, count: int, stream: str, seed: int = 0, labelled: bool = False) -> Points:
        """Return samples of the mixture."""
        ring = {"count": 8, "radius": self.radius}
        return Points(ring=ring, std=self.std, count=count, stream=stream, seed=seed, labelled=labelled)


WIDE, NARROW = Ring(1.5, 0.1), Ring(0.7, 0.05)


class Ends:
    """Pairs (z, x0): `PAIRS` noises and their ends under the exact flow."""

    sample_shape: tuple[int, ...] = (2,)
    num_classes = 0

    def __init__(self, exact: Denoiser, seed: int) -> None:
        self.z = sample_noise(seed, "pairs", torch.arange(PAIRS), (2,))
        self.x0 = flow_map(exact, self.z, Cond.nothing(PAIRS)).float()

    def __len__(self) -> int:
        return len(self.z)

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """Return the pairs at `rows`."""
        return Batch(rows, index, Cond.nothing(len(rows)), x0=self.x0[rows], z=self.z[rows])

    def fingerprint(self) -> str:
        """Return an empty string: these runs have no records."""
        return ""


@dataclass
class Bench:
    """Teacher, data and settings of a certificate.

    Attributes:
        process, ring: of the exact teacher. seed: of data, weights and training.
        guidance_w: guidance w of student and teacher in the evaluation.
        work, net: descriptions of training and net, for the table.
    """

    process: Process
    ring: Ring
    seed: int
    guidance_w: float = 0.0
    work: list[str] = field(default_factory=list)
    net: str = ""

    def __post_init__(self) -> None:
        self.labelled = self.guidance_w > 0
        self.exact = self.ring.teacher(self.process, self.labelled)
        self.points = self.ring.points(DATA, "train", self.seed, self.labelled)

    def student(self, kind: str, **options: Any) -> Denoiser:
        """Return an untrained student: a small MLP, with EDM's preconditioning for the process EDM."""
        torch.manual_seed(self.seed)
        scale = {EDM: 10.0, VPScaledLinear: 0.03}.get(type(self.process), 30.0)
        classes = 8 if self.labelled else 0
        net: nn.Module = MLP(**({"width": 64, "time_scale": scale, "num_classes": classes} | options))
        parameters = sum(p.numel() for p in net.parameters())
        self.net = f"MLP of {parameters:,} parameters"
        if isinstance(self.process, EDM):
            net = EDMPrecond(net)
        return Denoiser(net, self.process, kind, (2,), guidable=self.labelled)

    def fit(
        self,
        method: DistillModule,
        source: Source | None = None,
        *,
        steps: int,
        batch: int = 256,
        rate: float = 1e-3,
        optimizer: Callable[..., Any] = torch.optim.Adam,
        schedule: Callable[[int], float] | None = None,
        ema: float | None = None,
        **hooks: Any,
    ) -> Denoiser:
        """Call `fit` on the ring's points or on `source`; by default Adam with a rate that falls linearly to 0."""
        self.work.append(f"{type(method).__name__} {steps} x {batch}")
        optim = Optim(partial(optimizer, lr=rate), schedule or Linear(total=steps), ema=ema)
        where = source or self.points
        return fit(method, where, steps=steps, batch=batch, optim=optim, seed=self.seed, **hooks)

    def denoiser(self, kind: str, steps: int = 2000, **options: Any) -> Denoiser:
        """Train a denoiser, for students that start from their teacher: the exact teacher has no weights."""
        times, weight = ("lognormal", "edm") if isinstance(self.process, EDM) else ("uniform", "own")
        student, dropped = self.student(kind, **options), 0.1 if self.labelled else 0.0
        method = Denoising(student, null_prob=dropped, times=times, weight=weight)
        return trainable(self.fit(method, steps=steps, rate=2e-3, ema=0.999))
