"""Goldens of the few-step samplers (data/consistency/README.md): cm_samplers rtol 1e-3, lcm_scheduler atol 1e-4, float32."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import Load
from torch import Tensor
from translate import bounded_net, close, numbers

from distill.models.boundary import Boundary
from distill.process.base import expand
from distill.process.edm import EDM
from distill.process.scalings import edm_scalings, rescaled_time
from distill.process.times import karras_grid, karras_levels
from distill.process.vp import VPScaledLinear
from distill.samplers.fewstep import few_step, lcm_custom_times, lcm_predictor, lcm_times, multistep_times
from distill.samplers.ode import Field, euler, heun

FAMILY = "consistency"
KIND = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
"""diffusers' prediction types -> ours."""


def preconditioned(abk: Tensor) -> Field:
    """(x, sigma) -> the EDM-preconditioned x0 of the file's net."""
    net = bounded_net(abk)

    def x0(x: Tensor, sigma: Tensor) -> Tensor:
        c_skip, c_out, c_in, _ = (c.to(x.dtype) for c in edm_scalings(sigma))
        return expand(c_skip, x) * x + expand(c_out, x) * net(
            expand(c_in, x) * x, rescaled_time(sigma) / 1000
        )

    return x0


def test_consistency_multistep(load: Load) -> None:
    """Places on a Karras grid whose last one is sigma_min: N calls for N + 1 places."""
    file = load(FAMILY, "cm_samplers")
    process, x0 = EDM(), preconditioned(file["net_abk"])
    calls: list[float] = []

    def consistency(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(sigma[0].item())
        return Boundary("cm", process.sigma_min).apply(process, x0(x, sigma), x, sigma)

    names = [key for key in file if re.fullmatch(r"multistep(_\d+)+", key)]
    assert len(names) >= 3
    for name in names:
        places = [int(place) for place in name.split("_")[1:]]
        levels = multistep_times(karras_levels(places[-1] + 1), places)
        close(levels, file[f"{name}_sigmas"], 1e-9, 1e-9)
        calls.clear()
        found = few_step(
            consistency,
            process,
            file["x_T"],
            levels,
            lambda i: file["noise"][i],
            noise_floor=process.sigma_min,
        )
        assert found.dtype == torch.float32
        close(found, file[name], 1e-6, 1e-3)
        assert calls == levels[:-1].tolist()

    one = torch.tensor([process.sigma_max, process.sigma_min], dtype=torch.float64)
    close(few_step(consistency, process, file["x_T"], one, noise_floor=0.0), file["onestep"], 1e-6, 1e-3)


def test_edm_solvers(load: Load) -> None:
    """The multistep solvers of the same file, on the teacher's form of the net."""
    file = load(FAMILY, "cm_samplers")
    process, x0 = EDM(), preconditioned(file["net_abk"])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return process.convert("x0", x0(x, t), x, t, "velocity")

    for steps in numbers(file, r"heun(\d+)_edm"):
        grid = karras_grid(process, steps)
        close(heun(velocity, file["x_T"], grid, last_euler=True), file[f"heun{steps}_edm"], 1e-6, 1e-3)
    for steps in numbers(file, r"euler(\d+)_edm"):
        grid = karras_grid(process, steps)
        close(euler(velocity, file["x_T"], grid), file[f"euler{steps}_edm"], 1e-6, 1e-3)


def test_lcm_timesteps(load: Load) -> None:
    file = load(FAMILY, "lcm_scheduler")
    seen = 0
    for key in file:
        if (match := re.fullmatch(r"timesteps_n(\d+)(_strength([\d.]+))?(_orig(\d+))?", key)) is None:
            continue
        seen += 1
        times = lcm_times(int(match[1]), strength=float(match[3] or 1.0), original_steps=int(match[5] or 50))
        assert times[:-1].tolist() == file[key].tolist()
        assert times[-1] == 0
    assert seen == sum(key.startswith("timesteps_n") for key in file) >= 10
    custom = file["timesteps_custom"].tolist()
    assert lcm_custom_times(custom)[:-1].tolist() == custom


@pytest.mark.parametrize("prediction", KIND)
def test_lcm_trajectories(load: Load, prediction: str) -> None:
    """diffusers' ``prev_sample`` after every step; the last is the denoised sample, without noise."""
    file = load(FAMILY, "lcm_scheduler")
    process, net = VPScaledLinear(), bounded_net(file["net_abk"])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t / 1000) + expand(file["cond"], x)

    predictor = lcm_predictor(predict, process, KIND[prediction])
    for n in numbers(file, rf"traj_{prediction}_n(\d+)"):
        path = few_step(
            predictor, process, file["x_T"], lcm_times(n), lambda i: file["noise"][i], return_path=True
        )
        close(path[1:], file[f"traj_{prediction}_n{n}"], 1e-4, 1e-4)
        close(path[-1], file[f"final_denoised_{prediction}_n{n}"], 1e-4, 1e-4)
