"""Goldens of progressive distillation (data/progressive/README.md): float64, atol 1e-8, rtol 1e-7."""

from __future__ import annotations

import pytest
import torch
from conftest import Load
from translate import KIND, close, numbers

from distill.data.cond import Cond
from distill.models.analytic import exact_denoiser
from distill.process.vp import VPCosine, VPCosineIDDPM, VPLinear, VPLinearTable, VPScaledLinear
from distill.samplers.ode import ddim_step

FAMILY = "progressive"


def test_cosine_schedule(load: Load) -> None:
    file = load(FAMILY, "schedules")
    process, u = VPCosine(), file["u"]
    close(process.alpha(u), file["alpha"], 1e-8, 1e-7)
    close(process.sigma(u), file["sigma"], 1e-8, 1e-7)
    close(2 * process.log_ratio(u), file["logsnr"], 1e-8, 1e-7)
    close(process.time_of(file["logsnr"] / 2), u, 1e-8, 1e-7)
    # float32: relative, also where alpha or sigma is 4.5e-5
    close(process.alpha(u.float()), file["alpha"], 0.0, 2e-5)
    close(process.sigma(u.float()), file["sigma"], 0.0, 2e-5)


def test_scaled_linear_schedule(load: Load) -> None:
    file = load(FAMILY, "schedules")
    expected = file["sd_alphas_cumprod_f64"]
    process = VPScaledLinear(num_timesteps=len(expected))
    index = torch.arange(len(expected))
    close(process.alpha(index.double()) ** 2, expected, 1e-8, 1e-7)
    close(process.alpha(index) ** 2, file["sd_alphas_cumprod_diffusers_f32"], 0.0, 2e-5)


def test_iddpm_cosine_schedule(load: Load) -> None:
    """The clip acts on the last beta alone: entry j of N / 2 is entry 2 j + 1 of N, but for the last."""
    file = load(FAMILY, "schedules")
    tables = {}
    for count in numbers(file, r"iddpm_cosine_abar_(\d+)"):
        expected = file[f"iddpm_cosine_abar_{count}"]
        process = VPCosineIDDPM(len(expected))
        tables[count] = process.alphas_cumprod
        # relative, since the last entries are near 0
        close(process.alphas_cumprod, expected, 0.0, 1e-7)
        close(process.alpha(torch.arange(count).double()) ** 2, expected, 0.0, 1e-7)
    pairs = [count for count in tables if 2 * count in tables]
    assert pairs
    for count in pairs:
        close(tables[2 * count][1::2][:-1], tables[count][:-1])
        assert (tables[2 * count][-1] / tables[count][-1] - 1).abs() > 0.1


def test_prodiff_schedule(load: Load) -> None:
    file = load(FAMILY, "schedules")
    for count in numbers(file, r"prodiff_vpsde_abar_T(\d+)"):
        expected, betas = file[f"prodiff_vpsde_abar_T{count}"], file[f"prodiff_vpsde_betas_T{count}"]
        process = VPLinearTable(num_timesteps=len(expected))
        close(process.alphas_cumprod, expected, 0.0, 1e-7)
        before = torch.cat([torch.ones(1).double(), process.alphas_cumprod[:-1]])
        close(1 - process.alphas_cumprod / before, betas, 0.0, 1e-7)
        index = torch.arange(count).double()
        close(process.alpha(index) ** 2, expected, 0.0, 1e-7)
        close(
            VPLinear(process.beta_min, process.beta_max).alpha((index + 1) / count) ** 2, expected, 0.0, 1e-7
        )


def test_gmm8_analytic(load: Load) -> None:
    """DDIM of the exact denoiser, from noise to x0_hat of the last step, for every number of steps."""
    file = load(FAMILY, "gmm8_analytic")
    teacher = exact_denoiser(VPCosine(), file["means"].tolist(), file["std"].item())
    nothing = Cond.nothing(len(file["z"]))
    for steps in numbers(file, r"ddim(\d+)"):
        close(
            teacher.transport(file["z"], nothing, solver="ddim", steps=steps)[0],
            file[f"ddim{steps}"],
            1e-8,
            1e-7,
        )


@pytest.mark.parametrize("kind", KIND)
def test_ddim_cosine(load: Load, kind: str) -> None:
    file = load(FAMILY, "ddim_cosine")
    t, s = file["u_t"], file["u_s"]
    x0, eps, z_s = ddim_step(VPCosine(), KIND[kind], file["model_output"], file["z_t"], t, s)
    close(x0, file[f"{kind}.x_hat"], 1e-8, 1e-7)
    close(eps, file[f"{kind}.eps_hat"], 1e-8, 1e-7)
    close(z_s, file[f"{kind}.z_s"], 1e-8, 1e-7)

    # float32 throughout; eps predictions near u = 1 divide by alpha = 4.5e-5 and only keep 1e-3
    single = [tensor.float() for tensor in (file["model_output"], file["z_t"], t, s)]
    rtol = 1e-3 if kind == "eps" else 2e-5
    for actual, key in zip(
        ddim_step(VPCosine(), KIND[kind], *single), ("x_hat", "eps_hat", "z_s"), strict=True
    ):
        assert actual.dtype == torch.float32
        close(actual, file[f"{kind}.{key}"], 2e-5, rtol)


@pytest.mark.parametrize("kind", KIND)
def test_ddim_scaled_linear(load: Load, kind: str) -> None:
    """s < 0 is diffusers' ``set_alpha_to_one=False``: the step lands on index 0, where our time clamps."""
    file = load(FAMILY, "ddim_sd_scaled_linear")
    process = VPScaledLinear()
    t, s = file["t"].double(), file["s"].double()
    x0, _, z_s = ddim_step(process, KIND[kind], file["model_output"], file["z_t"], t, s)
    close(x0, file[f"{kind}.x_hat"], 1e-8, 1e-7)
    close(z_s, file[f"{kind}.z_s"], 1e-8, 1e-7)

    # Integer times and float32 tensors against diffusers' own float32 result.
    out, z_t = file["model_output"].float(), file["z_t"].float()
    *_, z_s = ddim_step(process, KIND[kind], out, z_t, file["t"], file["s"])
    close(z_s, file[f"{kind}.z_s_diffusers_f32"], 2e-5, 2e-5)
