"""Certificates: each method distils the exact 8-Gaussian teacher, and the student is compared with the teacher's exact flow map
and with the distribution of the data; for methods that match distributions, only with the latter.

    python scripts/certificates.py [METHOD ...] [--seed 0] > table.md

Prints a Markdown table with the student's numbers in one step and, in brackets, the teacher's in one step from the same noise.
If a method misses a bound, it is listed and the exit status is 1. `tests/identities/test_certificates.py` runs the same table.
Takes some minutes on one thread of a CPU.

To add a method, write a function from `Bench` to `Generator` and add an entry to `CERTIFICATES`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from exact_bench import NARROW, WIDE, Bench, Ends, Ring, falls_late, trainable

from distill.data.cond import Cond
from distill.data.points import ring_means
from distill.data.rng import sample_noise
from distill.evaluation.certificate import Found, flow_map, measure
from distill.methods.consistency import Consistency
from distill.methods.consistency_training import ConsistencyTraining
from distill.methods.degrade import Degrade
from distill.methods.disback import DisBack
from distill.methods.dmd import DMD
from distill.methods.families.score import ScoreDistillation
from distill.methods.lcm import LCM
from distill.methods.mmd import MMD
from distill.methods.one_step import OneStep
from distill.methods.progressive import Progressive
from distill.methods.reflow import Reflow
from distill.methods.sid import SiD
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.native import save_model
from distill.models.spec import SamplerSpec
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.vp import VPCosine, VPScaledLinear

COUNT = 4096  # samples in evaluations, and new points of the data


# One function per method, from the bench to a generator.


def reflow(bench: Bench) -> Generator:
    """Reflow of the exact pairs, from scratch."""
    method = Reflow(bench.student("velocity"))
    return Generator(
        bench.fit(method, Ends(bench.exact, bench.seed), steps=3000, rate=2e-3), method.result().sampler
    )


def one_step(bench: Bench) -> Generator:
    """Direct regression of the exact ends, from scratch."""
    method = OneStep(bench.student("velocity"))
    return Generator(
        bench.fit(method, Ends(bench.exact, bench.seed), steps=3000, rate=2e-3), method.result().sampler
    )


def progressive(bench: Bench) -> Generator:
    """64 steps of the exact teacher halved six times."""
    teacher, student, steps = bench.exact, bench.denoiser("v"), 64
    while steps > 1:
        steps //= 2
        method = Progressive(student, teacher, steps=steps)
        teacher = bench.fit(method, steps=1000 if steps > 2 else 1500)
        student = trainable(teacher)
    return Generator(teacher, method.result().sampler)


def consistency(bench: Bench) -> Generator:
    """Consistency distillation from scratch: 18 levels, Heun, squared distance, target network."""
    method = Consistency(bench.student("x0", width=96), bench.exact, loss="l2", target_decay=0.95)
    return Generator(bench.fit(method, **consistently(4000)), method.result().sampler)


def ect(bench: Bench) -> Generator:
    """Easy consistency tuning of a trained denoiser, in 8 stages; no teacher."""
    method = ConsistencyTraining(bench.denoiser("x0", width=96), curriculum="ect", total_steps=3000)
    return Generator(bench.fit(method, **consistently(3000)), method.result().sampler)


def lcm(bench: Bench) -> Generator:
    """Latent consistency distillation of a trained denoiser: without guidance, or with w ~ U[0, 2] as a new input."""
    student, guided = bench.denoiser("v", width=96), bench.guidance_w > 0
    if guided:
        wider = bench.student("v", width=96, guidance_embedding=16)
        wider.net.load_state_dict(student.net.state_dict(), strict=False)
        student = wider
    options: dict[str, Any] = {"w_max": 2.0 * guided, "sample_w": bench.guidance_w, "loss": "l2"}
    method = LCM(student, bench.exact, w_min=0.0, **options)
    return Generator(
        bench.fit(method, steps=3000, schedule=falls_late(3000), ema=0.999), method.result().sampler
    )


def sid(bench: Bench) -> Generator:
    """Score identity distillation of the exact teacher."""
    start = bench.denoiser("x0", width=96)
    return matched(bench, SiD(start, bench.exact, sampling={"levels": [2.5]}), trainable(start))


def dmd(bench: Bench) -> Generator:
    """Distribution matching with the exact teacher, one fake update for each of the student."""
    start = bench.denoiser("x0", width=96)
    method = DMD(start, bench.exact, sampling={"levels": [2.5]}, updates={"fake_per_student": 1})
    return matched(bench, method, trainable(start))


def disback(bench: Bench) -> Generator:
    """Distribution backtracking along a recorded path. Its targets are weights, which the exact teacher does not have, so the
    teacher is a trained denoiser, whose error adds to the student's."""
    start = bench.denoiser("x0", width=96)
    record = Degrade(
        trainable(start), trainable(start), total_steps=200, node_every=50, sampling={"levels": [2.5]}
    )
    with tempfile.TemporaryDirectory() as folder:
        save_node = node_saver(record, Path(folder))
        bench.fit(record, **scoring(200), snapshot=save_node)
        nodes = [Path(folder) / str(step) for step in (0, *record.snapshots())]
        method = DisBack(
            trainable(start), start, nodes, sampling={"levels": [2.5]}, updates={"fake_per_student": 1}
        )
        return matched(bench, method, method.fake)


def mmd(bench: Bench) -> Generator:
    """One step of a trained flow, finetuned with a mixture of widths from the modes' own to that of the ring."""
    kernel = {"name": "rbf_mixture", "gamma": "median", "scales": [0.25, 1.0, 4.0, 16.0, 64.0]}
    method = MMD(bench.denoiser("velocity", width=96), steps=1, kernel=kernel, recompute=False)
    return Generator(
        bench.fit(method, steps=1000, schedule=falls_late(1000), ema=0.99), method.result().sampler
    )


def matched(bench: Bench, method: ScoreDistillation, fake: Denoiser) -> Generator:
    """Train a student whose fake score starts from `fake`, because a copy of the exact teacher cannot be trained."""
    method.fake = fake
    return Generator(bench.fit(method, **scoring(1500)), method.result().sampler)


def node_saver(record: Degrade, folder: Path) -> Callable[[int], None]:
    """Save the teacher as step 0; returns a function that saves the degraded teacher of a given step."""

    def save_node(step: int) -> None:
        save_model(folder / str(step), record.student, record.result().sampler)

    save_node(0)
    return save_node


def consistently(steps: int) -> dict[str, Any]:
    """Return the settings for consistency methods: RAdam, batch 512, a rate that falls late, an average."""
    schedule = falls_late(steps)
    return {"steps": steps, "batch": 512, "optimizer": torch.optim.RAdam, "schedule": schedule, "ema": 0.999}


def scoring(steps: int) -> dict[str, Any]:
    """Return the settings for score distillation: Adam without momentum, a rate that falls late, an average."""
    adam = partial(torch.optim.Adam, betas=(0.0, 0.999))
    return {"steps": steps, "optimizer": adam, "rate": 3e-4, "schedule": falls_late(steps), "ema": 0.99}


@dataclass(frozen=True)
class Certificate:
    """The entry of a method.

    Attributes:
        train: trains the student.
        process, ring: of the exact teacher.
        trajectory: upper bound on the RMS distance to the exact ends; None for methods that match distributions.
        near: lower bound on the share of samples near a mode.
        energy: upper bound on the energy distance to new data.
        guidance_w: guidance w in the evaluation.
    """

    train: Callable[[Bench], Generator]
    process: Process
    ring: Ring
    trajectory: float | None
    near: float = 0.65
    energy: float = 0.01
    guidance_w: float = 0.0

    @property
    def against(self) -> str:
        """Description of the target, for the table."""
        if self.trajectory is None:
            return "distribution"
        return f"flow map, w = {self.guidance_w:g}" if self.guidance_w else "flow map"

    @property
    def bounds(self) -> list[tuple[str, str, float]]:
        """(name in `Found`, "at most" or "at least", number) of each bound."""
        kept = [
            ("energy", "at most", self.energy),
            ("modes", "at least", 8.0),
            ("near", "at least", self.near),
        ]
        return kept if self.trajectory is None else [*kept, ("trajectory", "at most", self.trajectory)]


@dataclass(frozen=True)
class Row:
    """The result of a certificate; `floor`: numbers of the exact ends against new data."""

    name: str
    certificate: Certificate
    student: Found
    teacher: Found
    floor: Found
    work: str
    net: str
    seconds: float

    def missed(self) -> list[str]:
        """Return a message for each bound that the student misses."""
        lines = []
        for name, how, bound in self.certificate.bounds:
            value = getattr(self.student, name)
            if not (value <= bound if how == "at most" else value >= bound):
                lines.append(f"{self.name}: {name} {value:.4g}, expected {how} {bound:g}")
        return lines


# Bounds are 1.5 to 2 times the larger value of seeds 0 and 1.
CERTIFICATES: dict[str, Certificate] = {
    "reflow": Certificate(reflow, Flow(), WIDE, trajectory=0.2),
    "one_step": Certificate(one_step, Flow(), WIDE, trajectory=0.12),
    "progressive": Certificate(progressive, VPCosine(), WIDE, trajectory=0.15),
    "consistency": Certificate(consistency, EDM(), NARROW, trajectory=0.1),
    "ect": Certificate(ect, EDM(), NARROW, trajectory=0.17),
    "lcm": Certificate(lcm, VPScaledLinear(), WIDE, trajectory=0.18),
    "lcm, guided": Certificate(lcm, VPScaledLinear(), WIDE, trajectory=0.08, guidance_w=2.0),
    "sid": Certificate(sid, EDM(), NARROW, trajectory=None, energy=0.004),
    "dmd": Certificate(dmd, EDM(), NARROW, trajectory=None, energy=0.005),
    "mmd": Certificate(mmd, Flow(), WIDE, trajectory=None, energy=0.006),
    "disback": Certificate(disback, EDM(), NARROW, trajectory=None, energy=0.007),
}


@torch.no_grad()
def measured(bench: Bench, generators: Sequence[Generator]) -> list[Found]:
    """Measure one step of each generator and, as the last entry, the exact ends."""
    scale, ids = 1 + bench.guidance_w, torch.arange(2 * COUNT)
    z = sample_noise(bench.seed, "certificate", ids, (2,))
    cond = Cond.of_labels(ids % 8) if bench.labelled else Cond.nothing(len(z))
    ends, others = flow_map(bench.exact, z, cond, guidance_scale=scale).split(COUNT)
    # The guided flow does not end in the data: compare samples with other ends of the guided flow.
    fresh = others if bench.labelled else bench.ring.points(COUNT, "fresh", bench.seed).images
    z, cond = z[:COUNT], Cond.of_labels(ids[:COUNT] % 8) if bench.labelled else Cond.nothing(COUNT)
    means = torch.tensor(ring_means(8, bench.ring.radius))
    samples = [*(generator.generate(z, cond, 1) for generator in generators), ends]
    return [measure(x, ends, fresh, means, bench.ring.std) for x in samples]


def summary(work: Sequence[str]) -> str:
    """Return the stages of training; equal neighbours are counted."""
    runs = [(stage, len(list(equal))) for stage, equal in groupby(work)]
    return ", ".join(f"{stage} ({count} times)" if count > 1 else stage for stage, count in runs)


def run(name: str, seed: int = 0) -> Row:
    """Train and measure one entry of `CERTIFICATES`."""
    entry = CERTIFICATES[name]
    bench = Bench(entry.process, entry.ring, seed, entry.guidance_w)
    print(f"{name} ...", file=sys.stderr)
    start = time.process_time()
    generator = entry.train(bench)
    seconds = time.process_time() - start
    naive = SamplerSpec(steps=1, any_steps=True, solver="ddim", guidance_scale=1 + bench.guidance_w)
    student, teacher, floor = measured(bench, [generator, Generator(bench.exact, naive)])
    return Row(name, entry, student, teacher, floor, summary(bench.work), bench.net, seconds)


def table(rows: Sequence[Row], seed: int) -> str:
    """Return the Markdown table and its legend."""
    heads = ["method", "against", "trajectory", "energy", "sliced W2", "near a mode", "modes", "teacher"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        entry, three = row.certificate, (row.student, row.teacher, row.floor)
        student, teacher, floor = three
        follows = entry.trajectory is not None
        lines.append(
            [
                row.name,
                entry.against,
                f"{student.trajectory:.3f} ({teacher.trajectory:.3f})" if follows else "-",
                "{:.4f} ({:.3f}; {:.4f})".format(*(found.energy for found in three)),
                "{:.3f} ({:.3f}; {:.3f})".format(*(found.sliced for found in three)),
                "{:.3f} ({:.3f}; {:.3f})".format(*(found.near for found in three)),
                f"{student.modes} ({teacher.modes}; {floor.modes})",
                f"{type(entry.process).__name__}, radius {entry.ring.radius:g}, std {entry.ring.std:g}",
            ]
        )
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    how = "\n".join(f"- {row.name}: {row.work}; {row.net}; {row.seconds:.0f} s" for row in rows)
    return (
        f"{text}\n\nOne step of the student (one step of the exact teacher; what its exact ends score). `trajectory`: RMS "
        f"distance to the ends of the exact flow from the same {COUNT} noises, by RK45 in float64 to 1e-8. `energy`, `sliced "
        f"W2`: distances to {COUNT} fresh points. `near a mode`: share of samples within 3 standard deviations. `modes`: of 8, "
        f"with 2 % of the samples there. Seed {seed}. Training, as steps x batch, and CPU seconds of one thread:\n\n{how}\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if a bound is missed."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    known = ", ".join(CERTIFICATES)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {known}; all by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.methods if name not in CERTIFICATES]
    if unknown:
        parser.error(f"METHOD: found {unknown}, expected some of: {known}")
    torch.set_num_threads(1)
    rows = [run(name, options.seed) for name in options.methods or CERTIFICATES]
    print(table(rows, options.seed))
    missed = [line for row in rows for line in row.missed()]
    print(*missed, sep="\n", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
