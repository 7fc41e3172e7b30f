"""Goldens of the targets, losses and guided stage of progressive distillation (data/progressive/README.md).

float64, atol 1e-8, rtol 1e-7, unless a comment says otherwise.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Load
from torch import Tensor
from translate import KIND, close, mixture_field, numbers

from distill.data.cond import Cond
from distill.methods.losses.distances import l1, l2
from distill.methods.losses.progressive import (
    StudentGrid,
    StudentStep,
    Target,
    guided_target,
    landing_x0,
    progressive_loss,
    snr_weight,
    two_step_target,
)
from distill.models.analytic import exact_denoiser
from distill.process.base import Process, expand
from distill.process.guidance_w import scale_of_w, w_of_scale
from distill.process.tables import VPTable
from distill.process.times import student_grid, uniform_grid
from distill.process.vp import VPCosine, VPScaledLinear
from distill.samplers.fewstep import renoise
from distill.samplers.ode import Field, ddim

FAMILY = "progressive"
WEIGHT = {"constant": "constant", "snr": "snr", "snr_trunc": "snr_trunc", "snr_plus_1": "snr+1"}
"""The files' names of weights -> ours."""


def teacher(z: Tensor, u: Tensor) -> Tensor:
    """The files' teacher net at noise levels u in [0, 1]."""
    u = expand(u, z)
    return z * (0.7 - 0.4 * u) + 0.2 * torch.sin(3 * z) + 0.1 + 0.05 * u


def student(z: Tensor, u: Tensor) -> Tensor:
    """The files' student net."""
    u = expand(u, z)
    return z * (0.6 - 0.3 * u) + 0.15 * torch.sin(2 * z) - 0.05 + 0.1 * u


def same(actual: Tensor, expected: Tensor) -> None:
    close(actual, expected, 1e-8, 1e-7)


def test_weights(load: Load) -> None:
    file = load(FAMILY, "weights")
    for theirs, ours in WEIGHT.items():
        for kind in KIND:
            same(snr_weight(ours, KIND[kind], file["logsnr"]), file[f"{theirs}.{kind}"])
            single = snr_weight(ours, KIND[kind], file["logsnr"].float())
            close(single, file[f"{theirs}.{kind}"], 0.0, 2e-5)
    same(torch.exp(file["logsnr"]), file["snr"])


@pytest.mark.parametrize("kind", KIND)
def test_two_step_target(load: Load, kind: str) -> None:
    file = load(FAMILY, f"target_{kind}")
    process = VPCosine()
    for n in numbers(file, r"N(\d+)\.i"):
        golden = {key.split(".", 1)[1]: value for key, value in file.items() if key.startswith(f"N{n}.")}
        grid = StudentGrid(process, uniform_grid(process, 2 * n))
        assert grid.steps == n
        step = grid.step(golden["i"])
        for time, key in ((step.u, "u"), (step.m, "u_mid"), (step.s, "u_s")):
            close(time, golden[key], 1e-12, 0)
        same(2 * process.log_ratio(step.u), golden["logsnr"])
        z = process.add_noise(golden["x"], golden["eps"], step.u)
        same(z, golden["z"])

        found = two_step_target(teacher, process, KIND[kind], z, step)
        for actual, key in (
            (found.first.x0, "x1"),
            (found.first.eps, "eps1"),
            (found.z_m, "z_mid"),
            (found.second.x0, "x2"),
            (found.second.eps, "eps2"),
            (found.target.x0, "x_target"),
            (found.target.eps, "eps_target"),
        ):
            same(actual, golden[key])
        same(process.target("v", *found.target, step.u), golden["v_target"])

        # The path and the formula without the special last step: u = 0 keeps the schedule's trace of noise.
        whole = StudentGrid(process, uniform_grid(process, 2 * n), clean_end=False).step(golden["i"])
        raw = two_step_target(teacher, process, KIND[kind], z, whole)
        same(raw.z_s, golden["z_s"])
        same(raw.target.x0, golden["x_target_raw"])
        same(landing_x0(process, z, golden["z_s"], step.u, step.s), golden["x_target_raw"])


@pytest.mark.parametrize("kind", KIND)
def test_losses_of_the_student(load: Load, kind: str) -> None:
    file = load(FAMILY, f"target_{kind}")
    process = VPCosine()
    for n in numbers(file, r"N(\d+)\.i"):
        golden = {key.split(".", 1)[1]: value for key, value in file.items() if key.startswith(f"N{n}.")}
        z, u = golden["z"], golden["u"]
        target = Target(golden["x_target"], golden["eps_target"])
        out = student(z, u)
        for wanted in KIND:
            prediction = process.convert(KIND[kind], out, z, u, KIND[wanted])
            same(prediction, golden[f"student_{wanted}"])
            # Any kind of the same prediction gives the same loss.
            for theirs, ours in WEIGHT.items():
                loss = progressive_loss(process, KIND[wanted], prediction, target, z, u, ours)
                same(loss, golden[f"loss.{theirs}"])


@pytest.mark.parametrize("kind", ["v", "x"])
def test_rollouts(load: Load, kind: str) -> None:
    """The teacher with 2N steps, and the student that predicts the target exactly with N."""
    file = load(FAMILY, "rollouts")
    process, z = VPCosine(), file["z1"]
    for n in numbers(file, rf"{kind}\.ddim(\d+)"):
        same(ddim(teacher, process, z, uniform_grid(process, n), KIND[kind]), file[f"{kind}.ddim{n}"])
        if n > 1:
            oracle = oracle_student(teacher, process, KIND[kind], n // 2)
            same(ddim(oracle, process, z, uniform_grid(process, n // 2)), file[f"{kind}.ddim{n}"])


def oracle_student(predict: Field, process: Process, kind: str, n: int) -> Field:
    """The x0 that a student of n steps has learned from ``predict`` of 2n steps when its loss is zero."""
    grid = StudentGrid(process, uniform_grid(process, 2 * n))

    def x0(z: Tensor, u: Tensor) -> Tensor:
        index = torch.round(u * n).long() - 1
        return two_step_target(predict, process, kind, z, grid.step(index)).target.x0

    return x0


def test_mixture_rollouts(load: Load) -> None:
    """DDIM with the exact denoiser, ours and the one of the flow's closed form at the matched time."""
    file = load(FAMILY, "gmm8_analytic")
    process = VPCosine()
    model = exact_denoiser(process, file["means"].tolist(), float(file["std"]))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return model.net(x, t, Cond.nothing(len(x)))

    velocity = mixture_field(file["means"], float(file["std"]))
    for n in numbers(file, r"ddim(\d+)"):
        same(ddim(predict, process, file["z"], uniform_grid(process, n)), file[f"ddim{n}"])
    x, t = file["z"], torch.full((len(file["z"]),), 0.3, dtype=torch.float64)
    scale = process.alpha(t) + process.sigma(t)
    y, tau = x / expand(scale, x), process.sigma(t) / scale
    same(predict(x, t), y - expand(tau, y) * velocity(y, tau))


def test_stable_diffusion_table(load: Load) -> None:
    """The discrete grid ends on clean data, so the last target is the teacher's second x0."""
    file = load(FAMILY, "target_eps_sd_discrete")
    process = VPScaledLinear()

    def predict(z: Tensor, t: Tensor) -> Tensor:
        return teacher(z, t / process.t_max)

    for n in numbers(file, r"N(\d+)\.z"):
        golden = {key.split(".", 1)[1]: value for key, value in file.items() if key.startswith(f"N{n}.")}
        grid = StudentGrid(process, student_grid(process, 2 * n))
        assert grid.times[:-1].flip(0).tolist() == golden["teacher_index"].tolist()
        step = grid.step(torch.arange(n))
        assert step.u.tolist() == golden["student_index"].tolist()
        assert grid.times[::2].tolist() == student_grid(process, n).tolist()
        found = two_step_target(predict, process, "eps", golden["z"], step)
        for actual, key in (
            (found.first.x0, "x1"),
            (found.z_m, "z_mid"),
            (found.second.x0, "x2"),
            (found.z_s, "z_s"),
            (found.target.x0, "x_target"),
            (found.target.eps, "eps_target"),
        ):
            same(actual, golden[key])


def test_guided_target(load: Load) -> None:
    file = load(FAMILY, "guided_distillation")
    process, z, u, w = VPCosine(), file["z"], file["u"], file["w"]
    same(torch.as_tensor(scale_of_w(w)), file["cfg_scale"])
    same(torch.as_tensor(w_of_scale(file["cfg_scale"])), w)
    found = guided_target(process, "eps", file["eps_cond"], file["eps_uncond"], z, u, w)
    same(found.x0, file["x_target"])
    same(found.eps, file["eps_target"])
    same(process.target("v", *found, u), file["v_target"])
    clipped = guided_target(process, "eps", file["eps_cond"], file["eps_uncond"], z, u, w, clip=1.0)
    same(clipped.x0, file["x_target_clipped"])
    same(clipped.eps, file["eps_target_clipped"])
    # The same guidance on another kind of the two predictions.
    v = [process.convert("eps", file[key], z, u, "v") for key in ("eps_cond", "eps_uncond")]
    same(guided_target(process, "v", *v, z, u, w).x0, file["x_target"])


def test_renoise(load: Load) -> None:
    file = load(FAMILY, "guided_distillation")
    process, s, m = VPCosine(), file["renoise_u_s"], file["renoise_u_m"]
    ones, zeros = torch.ones(len(s), 1).double(), torch.zeros(len(s), 1).double()
    same(renoise(process, ones, s, m, zeros)[:, 0], file["renoise_scale"])
    same(renoise(process, zeros, s, m, ones)[:, 0], file["renoise_std"])


class ProDiffTable(VPTable):
    """ProDiff's schedule as its file lists it; index 0 is far from clean."""


def test_prodiff(load: Load) -> None:
    """One halving 4 -> 2 on a table whose last level is noisy, x0 students, mean absolute error.

    The reference evaluated its table and time in float32 (differences of 5e-8), hence the README's float32 tolerance.
    """
    file, schedules = load(FAMILY, "prodiff_reference"), load(FAMILY, "schedules")
    process = ProDiffTable(schedules["prodiff_vpsde_abar_T5"])
    same(torch.cumprod(1 - schedules["prodiff_vpsde_betas_T5"], 0), process.alphas_cumprod)
    z, t = file["x_t"], file["t"].double()
    step = StudentStep(t, t - 1, t - 2, torch.zeros(len(t), dtype=torch.bool))
    found = two_step_target(lambda x, t: teacher(x, t / process.t_max), process, "x0", z, step)
    close(found.target.x0, file["x_target"], 1e-6, 2e-5)
    # The student net is called with the index t - 2.
    prediction = student(z, (t - 2) / process.t_max)
    close(prediction, file["x_pred"], 1e-6, 2e-5)
    close(l1(prediction, found.target.x0).mean(), file["loss_l1"], 1e-6, 2e-5)
    close(l2(prediction, found.target.x0).mean(), file["loss_l2"], 1e-6, 2e-5)
    close(
        progressive_loss(process, "x0", prediction, found.target, z, t, "constant").mean(),
        file["loss_l2"],
        1e-6,
        2e-5,
    )
    # A teacher that knows the data makes the data the target.
    data = file["ref_mels"].transpose(1, 2)[:, None]
    assert data.shape == z.shape
    same(two_step_target(lambda x, t: data, process, "x0", z, step).target.x0, data)
