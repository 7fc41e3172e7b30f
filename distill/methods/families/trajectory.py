"""Functions of the consistency methods: grids, boundaries, checks and diagnostics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.engine.update import Average, Diagnostics
from distill.models.boundary import Boundary
from distill.models.denoiser import Denoiser, check_same_samples
from distill.models.generator import Generator
from distill.process.base import Process, expand
from distill.process.edm import EDM, SIGMA_MAX
from distill.process.times import karras_grid, uniform_grid

GRIDS = ("auto", "karras", "uniform")


def check_pair_of_models(student: Denoiser, teacher: Denoiser) -> None:
    """Refuse a teacher without trajectories, or of another process than the student.

    Raises:
        ValueError: names `teacher`.
    """
    check_same_samples(student, teacher)
    if teacher.coupling in ("endpoint", "few_step"):
        raise ValueError(
            "teacher: found a few-step student, which has no trajectories; expected an ODE teacher"
        )
    if teacher.boundary is not None:
        raise ValueError(
            "teacher: found a consistency function, which has no trajectories; expected an ODE teacher"
        )
    if teacher.embeds_guidance:
        raise ValueError("teacher: takes the guidance as an input; expected a teacher without")


def check_sample_steps(counts: Sequence[int], most: int) -> tuple[int, ...]:
    """The step counts that a student is sampled with, 1 .. `most` each.

    Raises:
        ValueError: names `sample_steps`.
    """
    listed = isinstance(counts, Sequence) and not isinstance(counts, str)
    if not listed or not counts or not all(isinstance(n, int) and 1 <= n <= most for n in counts):
        raise ValueError(f"sample_steps: found {counts!r}, expected a list of step counts in 1 .. {most}")
    return tuple(counts)


def target_network(decay: float) -> dict[str, Average]:
    """`averages` of a method whose target network follows the student with a fixed decay (arXiv 2303.01469, eq. 8); empty for
    0."""
    return {"target": Average("student", lambda step: decay)} if decay > 0 else {}


def level_grid(process: Process, scales: int, grid: str = "auto") -> Tensor:
    """[scales] falling times, neighbours of which are the pairs of consistency distillation.

    "karras" (ends at sigma_min), "uniform" in the process's time, or "auto": Karras for EDM, uniform for the others.

    Raises:
        ValueError: an unknown grid or fewer than 2 scales.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid: found {grid!r}, expected one of {list(GRIDS)}")
    if not isinstance(scales, int) or scales < 2:
        raise ValueError(f"scales: found {scales!r}, expected an integer of at least 2")
    if grid == "karras" or (grid == "auto" and isinstance(process, EDM)):
        return karras_grid(process, scales - 1, clean_end=False)
    return uniform_grid(process, scales - 1)


def noise_level(process: Process, t: Tensor) -> Tensor:
    """sigma / alpha at times t [B]: the noise level in EDM's coordinates, at most EDM's 80 (a flow's t = 1 holds no data)."""
    return (process.sigma(t) / process.alpha(t)).clamp(max=SIGMA_MAX)


def boundary_at(
    process: Process, levels: Tensor, kind: str, sigma_data: float | None = None
) -> Boundary | None:
    """The boundary that makes a prediction of `kind` the identity at the cleanest level of a grid; None where it already is:
    where no noise is left (a flow's t = 0), unless the net predicts the data. For use while a method is built. `sigma_data`:
    that of the model; None: the boundary's default.

    Raises:
        ValueError: names `grid`: it ends on clean data, where nothing constrains a net that predicts x0.
    """
    level = float(noise_level(process, levels[-1:].double()))
    if level > 0:
        own = Boundary.sigma_data if sigma_data is None else sigma_data
        return Boundary("cm", sigma_min=level, sigma_data=own)
    if kind == "x0":
        raise ValueError(
            f"grid: ends at t = {float(levels[-1]):g} of {process!r}, where no noise is left and a predicted x0 is not "
            "constrained to be the state; expected 'karras', which ends above, or a student of another kind"
        )
    return None


def by_thirds(values: Tensor, place: Tensor) -> dict[str, Tensor]:
    """Means of per-sample values [B] over the noisy, middle and clean third of places [B] in [0, 1) (0 is noisiest), 0 where
    a third is empty; detached, no host sync."""
    third = (place * 3).floor()
    found = {}
    for number, name in enumerate(("noisy", "middle", "clean")):
        mask = third == number
        found[f"loss_{name}"] = (values.detach() * mask).sum() / mask.sum().clamp(min=1)
    return found


def trajectory_diagnostics(
    generator: Generator, batch: Batch, z: Tensor, wanted: Tensor, levels: Tensor, label: str = "teacher"
) -> Diagnostics:
    """Compare a consistency student with `wanted` [B,*S], the ends of the teacher's trajectories from the noise z [B,*S] (or
    other samples, named by `label`).

    Logs `trajectory` (RMS distance of the one-step sample to them), `boundary` (max |f(x, e) - x| at the cleanest level e,
    with x in the coordinates of the boundary: the state over alpha, or the state itself of "lcm"), mean, spread and
    largest value of the samples."""
    student, process = generator.denoiser, generator.denoiser.process
    made = generator.one_step(z, batch.cond)
    assert batch.x0 is not None
    clean = torch.full((len(z),), float(levels[-1]), dtype=torch.float64, device=z.device)
    x = process.add_noise(batch.x0, z, clean)
    as_is = student.boundary is not None and student.boundary.form == "lcm"
    state = x if as_is else expand((1 / process.alpha(clean)).to(x.dtype), x) * x
    cond = batch.cond.with_guidance(generator.spec.embedded()).to(z.device)
    scalars = {
        "trajectory": (made - wanted).square().mean().sqrt(),
        "boundary": (student.x0(x, clean, cond) - state).abs().max(),
        "x_mean": made.mean(),
        "x_std": made.std(),
        "x_std_teacher": wanted.std(),
        "x_max": made.abs().max(),
    }
    return Diagnostics(scalars, [(label, wanted), ("student, 1 step", made)])
