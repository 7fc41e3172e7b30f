"""Goldens of rectified flow and InstaFlow (data/rectified_flow/README.md): float64 to 1e-8 unless said."""

from __future__ import annotations

import pytest
import torch
from conftest import Load
from torch import Tensor
from translate import (
    Spherical,
    close,
    flip_field,
    flip_time,
    flip_velocity,
    mixture_field,
    mixture_posterior,
    numbers,
)

from distill.methods.losses.flow import flow_matching_loss, k_step_times
from distill.models.guidance import guide
from distill.process.base import Process, expand
from distill.process.flow import Flow
from distill.process.times import (
    logit_normal,
    shift,
    skewed,
    truncated_exponential,
    u_shaped,
    uniform_grid,
    uniform_times,
)
from distill.process.vp import VPLinear, VPScaledLinear
from distill.samplers.ode import Field, euler, heun, rollout
from distill.samplers.straightness import straightness

FAMILY = "rectified_flow"
T_EPS = 1e-3
"""RectifiedFlow's smallest tau, the README's eps."""


@pytest.mark.parametrize(
    ("name", "process", "time_key"),
    [("straight", Flow(), "t"), ("spherical", Spherical(), "t"), ("ddim", VPLinear(), "t_vp")],
)
def test_interpolation(load: Load, name: str, process: Process, time_key: str) -> None:
    file = load(FAMILY, "interpolation")
    t = flip_time(file[time_key])
    close(process.alpha(t), file[f"{name}.alpha"])
    close(process.sigma(t), file[f"{name}.sigma"])
    close(flip_velocity(process.d_alpha(t)), file[f"{name}.d_alpha"])
    close(flip_velocity(process.d_sigma(t)), file[f"{name}.d_sigma"])
    data, noise = file["x1"], file["x0"]
    x_t = process.add_noise(data, noise, t)
    close(x_t, file[f"{name}.x_t"])
    close(flip_velocity(process.target("velocity", data, noise, t)), file[f"{name}.dx_t"])
    # The stored velocity converts back into the data and the noise that made it.
    velocity = flip_velocity(file[f"{name}.dx_t"])
    close(process.convert("velocity", velocity, x_t, t, "x0"), data)
    close(process.convert("velocity", velocity, x_t, t, "eps"), noise)


def test_vp_continuous_to_rf(load: Load) -> None:
    file = load(FAMILY, "vp_continuous_to_rf")
    flow, vp = Flow(), VPLinear()
    t_flow, x_flow = flip_time(file["tau"]), file["x_tau"]
    t = vp.matching_time(flow, t_flow)
    close(flip_time(t), file["t_vp_fm"])
    close(vp.alpha(t), file["alpha"])
    close(vp.sigma(t), file["sigma"])
    close(vp.matching_scale(flow, t_flow), file["scale"])
    close(flip_time(flow.matching_time(vp, t)), file["tau_from_alpha_sigma"])
    z = expand(vp.matching_scale(flow, t_flow), x_flow) * x_flow
    close(z, file["z"])
    # The file's teacher, a function of flow_matching's VP time.
    eps = 0.6 * z + 0.25 * torch.sin(2 * z) + 0.1 * expand(flip_time(t), z) - 0.05
    close(eps, file["eps_hat"])
    close(vp.convert("eps", eps, z, t, "x0"), file["x_hat"])
    close(vp.convert("eps", eps, z, t, "v"), file["v_vp_hat"])
    for kind, key in (("eps", "eps_hat"), ("x0", "x_hat"), ("v", "v_vp_hat")):
        x0 = vp.convert(kind, file[key], z, t, "x0")
        eps = vp.convert(kind, file[key], z, t, "eps")
        close(flip_velocity(eps - x0), file["v_rf"])
        close(flip_velocity(flow.convert("x0", x0, x_flow, t_flow, "velocity")), file["v_rf"])
        close(flip_velocity(flow.convert("eps", eps, x_flow, t_flow, "velocity")), file["v_rf"])


def test_sd15_discrete_to_rf(load: Load) -> None:
    file = load(FAMILY, "sd15_discrete_to_rf")
    flow, vp = Flow(), VPScaledLinear(num_timesteps=len(file["alphas_cumprod"]))
    index = torch.arange(vp.num_timesteps, dtype=torch.float64)
    close(vp.alpha(index) ** 2, file["alphas_cumprod"])
    close(flip_time(flow.matching_time(vp, index)), file["tau_table"])
    close(1 / flow.matching_scale(vp, index), file["scale_table"])

    t, z, eps = file["timestep"].double(), file["z"], file["eps_hat"]
    x0, t_flow = vp.convert("eps", eps, z, t, "x0"), flow.matching_time(vp, t)
    x_flow = expand(flow.matching_scale(vp, t), z) * z
    close(x0, file["x_hat"])
    close(vp.convert("eps", eps, z, t, "v"), file["v_vp_hat"])
    close(x_flow, file["x_tau"])
    close(flip_time(t_flow), file["tau"])
    close(flip_velocity(eps - x0), file["v_rf"])
    for kind, out in (("x0", x0), ("eps", eps)):
        close(flip_velocity(flow.convert(kind, out, x_flow, t_flow, "velocity")), file["v_rf"])

    query = flow.log_ratio(flip_time(file["query_tau"]))
    close(vp.time_of(query), file["query_timestep"])
    assert torch.equal(~vp.covers(query), file["query_clamped"].bool())


def test_zero_terminal_snr(load: Load) -> None:
    """The rescaled table: alpha^2 at every index, and its flow times from exactly 1 on."""
    expected = load(FAMILY, "sd15_discrete_to_rf")["alphas_cumprod_ztsnr"]
    vp = VPScaledLinear(num_timesteps=len(expected), zero_terminal_snr=True)
    index = torch.arange(vp.num_timesteps, dtype=torch.float64)
    close(vp.alphas_cumprod, expected)
    close(vp.alpha(index) ** 2, expected)
    close(vp.sigma(index) ** 2, 1 - expected)
    alpha, sigma = expected.sqrt(), (1 - expected).sqrt()
    t_flow = Flow().matching_time(vp, index)
    close(t_flow, sigma / (alpha + sigma))
    assert vp.alpha(index)[-1] == 0
    assert t_flow[-1] == 1
    close(vp.matching_time(Flow(), t_flow), index)


def test_rf_loss_reference(load: Load) -> None:
    file = load(FAMILY, "rf_loss_reference")
    data, noise, batch = file["z1"], file["z0"], len(file["u"])
    close(flip_velocity(Flow().target("velocity", data, noise, torch.zeros(batch).double())), file["target"])

    def net(x: Tensor, t: Tensor) -> Tensor:
        channels = file["model_c"].reshape(1, -1, *(1,) * (x.dim() - 2))
        return flip_velocity(0.3 * x + channels * expand(flip_time(t), x))  # label / 999 is the file's time

    times = {
        "uniform": uniform_times(flip_time(file["u"]), 0.0, 1 - T_EPS),
        "t0": k_step_times(torch.zeros(batch, dtype=torch.int64), 1, T_EPS),
        "t1": torch.zeros(batch, dtype=torch.float64),
    }
    for k in numbers(file, r"t\.(\d+)"):
        times[str(k)] = k_step_times(file["k_index"], k, T_EPS)
    for schedule, t in times.items():
        close(flip_time(t), file[f"t.{schedule}"])
        x_t = Flow().add_noise(data, noise, t)
        close(x_t, file[f"x_t.{schedule}"])
        for reduction in ("mean", "halfsum"):
            loss = flow_matching_loss(net(x_t, t), data, noise, reduction)
            assert loss.shape == (batch,)
            close(loss.mean(), file[f"loss.{schedule}.{reduction}"].squeeze())


def check_rollouts(file: dict[str, Tensor], field: Field, z: Tensor, tol: float = 1e-8) -> None:
    """Every ``eulerN``, ``eulerN.traj`` and ``straightnessN`` of a file, N from its keys."""
    for steps in numbers(file, r"euler(\d+)"):
        path, velocities = rollout(field, z, uniform_grid(Flow(), steps))
        close(path[-1], file[f"euler{steps}"], tol, tol)
        close(euler(field, z, uniform_grid(Flow(), steps)), file[f"euler{steps}"], tol, tol)
        if f"euler{steps}.traj" in file:
            close(path, file[f"euler{steps}.traj"], tol, tol)
        if steps == 1:
            with pytest.raises(ValueError, match="N >= 2"):
                straightness(path, velocities)
            for key in ("straightness1", "straightness_norm1"):  # why it is refused
                close(torch.zeros(()).double(), file.get(key, torch.zeros(())))
            continue
        plain, norm = straightness(path, velocities)
        close(plain, file[f"straightness{steps}"], tol, tol)
        if f"straightness_norm{steps}" in file:
            close(norm, file[f"straightness_norm{steps}"], tol, tol)


def test_euler_rollouts(load: Load) -> None:
    file = load(FAMILY, "euler_rollouts")
    A, b, c = file["A"], file["b"], file["c"]
    field, z = flip_field(lambda x, tau: x @ A.T + b + expand(tau, x) * c), file["x0"]
    check_rollouts(file, field, z)

    # RectifiedFlow evaluates at tau = eps + (1 - eps) i / N but steps by 1 / N: a squeezed clock.
    def squeezed(x: Tensor, t: Tensor) -> Tensor:
        return field(x, (1 - T_EPS) * t)

    for steps in numbers(file, r"euler(\d+)\.rfrepo_eps"):
        close(euler(squeezed, z, uniform_grid(Flow(), steps)), file[f"euler{steps}.rfrepo_eps"])

    # Heun with 2000 steps is within 1e-6 of the exact solution, and RK45 within its own rtol of both.
    fine = uniform_grid(Flow(), 2000)
    close(heun(field, z, fine), file["exact_t1"], 1e-6, 1e-6)
    from_eps = heun(field, z, (1 - T_EPS) * fine)
    close(from_eps, file["exact_from_eps"], 1e-6, 1e-6)
    close(from_eps, file["rk45_rtol1e-5_from_eps"], 1e-5, 1e-5)


def test_gaussian_field(load: Load) -> None:
    file = load(FAMILY, "gaussian_field")
    mu, s, z = file["mu"], file["s"], file["x0"]
    field = mixture_field(mu.unsqueeze(0), s)
    close(flip_velocity(field(file["x"], flip_time(file["t"]))), file["v"])
    close(mu + s * z, file["exact_x1"])
    check_rollouts(file, field, z)
    close(heun(field, z, uniform_grid(Flow(), 1000)), file["exact_x1"], 1e-4, 1e-4)


def test_empirical_marginal_velocity(load: Load) -> None:
    file = load(FAMILY, "empirical_marginal_velocity")
    x, t, data = file["x"], flip_time(file["t"]), file["dataset"]
    x0, eps = mixture_posterior(data, 0.0, x, t)
    close(x0, file["x1_posterior_mean"])
    close(flip_velocity(eps - x0), file["v"])
    close(flip_velocity(mixture_field(data, 0.0)(x, t)), file["v"])
    close(flip_velocity(Flow().convert("x0", file["x1_posterior_mean"], x, t, "velocity")), file["v"])


def test_gmm8_analytic(load: Load) -> None:
    file = load(FAMILY, "gmm8_analytic")
    check_rollouts(file, mixture_field(file["means"], file["std"]), file["z"], tol=1e-7)


def test_cfg_and_time_grid(load: Load) -> None:
    file = load(FAMILY, "cfg_and_time_grid")
    cond, uncond = flip_velocity(file["v_cond"]), flip_velocity(file["v_uncond"])
    scales = [key.removeprefix("v_alpha") for key in file if key.startswith("v_alpha")]
    assert scales
    for scale in scales:
        expected = file[f"v_alpha{scale}"]
        close(flip_velocity(guide(uncond, cond, float(scale))), expected)
        per_sample = torch.full((len(cond),), float(scale), dtype=torch.float64)
        close(flip_velocity(guide(uncond, cond, per_sample)), expected)
    for steps in numbers(file, r"unet_timesteps(\d+)"):
        close(1000 * uniform_grid(Flow(), steps)[:-1], file[f"unet_timesteps{steps}"])


def test_diffusers_flow_match_euler(load: Load) -> None:
    """diffusers' scheduler, float32: sigma is our time, its network's output our velocity, sign and all."""
    file = load(FAMILY, "diffusers_flow_match_euler_f32")
    shifts = [key.split(".sigmas")[0].removeprefix("shift") for key in file if key.endswith(".sigmas")]
    assert shifts
    for name in shifts:
        sigmas = file[f"shift{name}.sigmas"]
        outputs = iter(file["model_outputs"])
        final = euler(lambda x, t, outputs=outputs: next(outputs), file["sample0"], sigmas)
        close(final, file[f"shift{name}.final"], 1e-5, 1e-5)
        close(1000 * sigmas[:-1], file[f"shift{name}.timesteps"], 2e-5, 2e-5)
        # diffusers shifts its smallest time once and then the whole grid again, before appending 0.
        factor, steps = float(name), len(sigmas) - 1
        smallest = shift(sigmas[:1] / file[f"shift{name}.timesteps"][:1], factor).item()
        close(shift(torch.linspace(1, smallest, steps), factor), sigmas[:-1], 2e-5, 2e-5)


def test_time_samplers(load: Load) -> None:
    file = load(FAMILY, "time_samplers")
    u, n = file["u"], file["n"]
    close(truncated_exponential(u), file["u_shaped_half"])
    close(1 - truncated_exponential(u), file["u_shaped_other_half"])
    # The mixture's one draw: the lower half of [0, 1] goes to one side, the upper half to the other.
    close(u_shaped(u / 2), file["u_shaped_half"])
    inner = u < 1  # at u = 1 both sides claim the draw 1/2
    close(u_shaped(1 - u / 2)[inner], file["u_shaped_other_half"][inner])
    close(flip_time(u_shaped(1 - u / 2))[inner], file["u_shaped_half"][inner])
    close(flip_time(logit_normal(-n)), file["logit_normal"])
    close(flip_time(skewed(n)), file["skewed_fm"])
