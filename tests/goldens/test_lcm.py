"""Goldens of latent consistency distillation (data/consistency/README.md, lcm_tables and lcm_loss), gradients included.

Tolerances are the README's: float32, rtol 1e-4 atol 1e-6 for tables; atol 1e-5 for the loss file, whose last index divides by
alpha = 0.068 and keeps 1e-3.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Load
from torch import Tensor
from translate import bounded_net, close

from distill.methods.losses.distances import elementwise_huber, l2
from distill.methods.losses.lcm import SolverStep, guided_ddim_step, lcm_pair
from distill.process.base import expand
from distill.process.guidance_w import w_embedding
from distill.process.scalings import lcm_scalings
from distill.process.vp import VPScaledLinear
from distill.samplers.fewstep import lcm_boundary, lcm_grid
from distill.samplers.ode import Field, ddim_step

FAMILY = "consistency"
KIND = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
"""diffusers' prediction types -> ours."""
DISTANCES = {"l2": l2, "huber": elementwise_huber}


def test_tables(load: Load) -> None:
    file = load(FAMILY, "lcm_tables")
    process = VPScaledLinear(num_timesteps=len(file["alphas_cumprod"]))
    close(process.alphas_cumprod, file["alphas_cumprod"], 1e-6, 1e-4)
    steps = len(file["ddim_timesteps"])
    grid = lcm_grid(process.num_timesteps, steps)
    assert grid.tolist() == file["ddim_timesteps"].tolist()
    t, u = lcm_pair(grid, torch.arange(steps))
    assert torch.equal(t, grid)
    close(process.alpha(t.double()) ** 2, file["ddim_alpha_cumprods"], 1e-6, 1e-4)
    close(process.alpha(u.double()) ** 2, file["ddim_alpha_cumprods_prev"], 1e-6, 1e-4)


def test_boundary_scalings(load: Load) -> None:
    file = load(FAMILY, "lcm_tables")
    for suffix, scaling in (("", 10.0), ("_scaling1", 1.0)):
        c_skip, c_out = lcm_scalings(file["t"], scaling)
        close(c_skip, file[f"c_skip{suffix}"], 1e-12, 1e-4)
        close(c_out, file[f"c_out{suffix}"], 1e-6, 1e-4)
        ones = torch.ones(len(file["t"]), 1)
        close(lcm_boundary(0 * ones, ones, file["t"], scaling)[:, 0], file[f"c_skip{suffix}"], 1e-12, 1e-4)
        close(lcm_boundary(ones, 0 * ones, file["t"], scaling)[:, 0], file[f"c_out{suffix}"], 1e-6, 1e-4)


def test_w_embedding(load: Load) -> None:
    """The reference takes angles of up to 15000 in float32, hence atol 2e-3."""
    file = load(FAMILY, "lcm_tables")
    widths = [int(key.rsplit("_", 1)[1]) for key in file if key.startswith("w_emb_")]
    assert any(dim % 2 for dim in widths)
    assert any(dim % 2 == 0 for dim in widths)
    for dim in widths:
        features = w_embedding(file["w"], dim)
        assert features.dtype == torch.float32
        close(features, file[f"w_emb_{dim}"], 2e-3, 1e-3)
        if dim % 2:
            assert not features[:, -1].any()


def near(actual: Tensor, expected: Tensor, index: Tensor) -> None:
    """atol 1e-5, and 1e-3 relative at the last index of the grid."""
    last = index == index.max()
    close(actual[~last], expected[~last], 1e-5, 1e-4)
    close(actual[last], expected[last], 1e-5, 1e-3)


@pytest.mark.parametrize("prediction", KIND)
def test_conversions(load: Load, prediction: str) -> None:
    file = load(FAMILY, "lcm_loss")
    process, index = VPScaledLinear(), file["index"]
    t, u = lcm_pair(lcm_grid(), index)
    assert t.tolist() == file["start_timesteps"].tolist()
    assert u.tolist() == file["end_timesteps"].tolist()
    x0, eps, x_u = ddim_step(
        process, KIND[prediction], file["model_output"], file["latents"], t.double(), u.double()
    )
    near(x0, file[f"pred_x0_{prediction}"], index)
    near(eps, file[f"pred_eps_{prediction}"], index)
    if prediction == "epsilon":
        near(x_u, file["ddim_step"], index)


def network(abk: Tensor, cond: Tensor, w: Tensor | None = None) -> Field:
    """The file's network, (x, t) -> F(x, t / 1000) + cond, with 0.05 of the mean feature of w where it sees w."""
    net = bounded_net(abk)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        out = net(x, t / 1000) + expand(cond, x)
        return out if w is None else out + expand(0.05 * w_embedding(w).mean(1), x)

    return predict


def solver_step(file: dict[str, Tensor], kind: str, x_t: Tensor, t: Tensor, u: Tensor) -> SolverStep:
    """The teacher's guided step; it never sees w."""
    outs = [network(file["teacher_abk"], file[name])(x_t, t) for name in ("cond", "uncond")]
    return guided_ddim_step(VPScaledLinear(), kind, *outs, x_t, t, u, file["w"])


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("run", ["full", "lora"])
def test_full_step(load: Load, run: str, prediction: str, distance: str) -> None:
    """full: the student is told w and its target is a network of its own; lora: not told, and it is its own target."""
    file = load(FAMILY, "lcm_loss")
    golden = {
        key.removeprefix(f"{run}_{prediction}_"): value
        for key, value in file.items()
        if key.startswith(f"{run}_{prediction}_")
    }
    process, kind, index = VPScaledLinear(), KIND[prediction], file["index"]
    t, u = (time.double() for time in lcm_pair(lcm_grid(), index))
    x_t = process.add_noise(file["latents"], file["noise"], t)
    near(x_t, golden["x_t"], index)

    step = solver_step(file, kind, x_t, t, u)
    near(step.x0, golden["cfg_x0"], index)
    near(step.eps, golden["cfg_eps"], index)
    near(step.x_u, golden["x_prev"], index)

    def consistency(abk: Tensor, x: Tensor, t: Tensor) -> Tensor:
        out = network(abk, file["cond"], file["w"] if run == "full" else None)(x, t)
        return lcm_boundary(process.convert(kind, out, x, t, "x0"), x, t)

    abk = file["student_abk"].clone().requires_grad_()
    target_abk = (file["target_abk"] if run == "full" else abk).clone().detach().requires_grad_()
    prediction_ = consistency(abk, x_t, t)
    target = consistency(target_abk, step.x_u, u)
    near(prediction_, golden["model_pred"], index)
    near(target, golden["target"], index)
    loss = DISTANCES[distance](prediction_, target).mean()
    close(loss, golden[f"loss_{distance}"], 1e-5, 1e-4)
    loss.backward()
    assert abk.grad is not None
    close(abk.grad, golden[f"grad_{distance}_abk"], 1e-5, 1e-3)
    assert target_abk.grad is None


def test_guidance_commutes_with_the_conversion(load: Load) -> None:
    """Both x0 and eps are guided with w, which is one more than a scale of w would say."""
    file = load(FAMILY, "lcm_loss")
    process = VPScaledLinear()
    t, u = (time.double() for time in lcm_pair(lcm_grid(), file["index"]))
    for kind in ("eps", "v"):
        x_t = process.add_noise(file["latents"], file["noise"], t).double()
        step = solver_step(file, kind, x_t, t, u)
        outs = [network(file["teacher_abk"], file[name])(x_t, t) for name in ("cond", "uncond")]
        w = expand(file["w"], x_t)
        for found, wanted in ((step.x0, "x0"), (step.eps, "eps")):
            cond, uncond = (process.convert(kind, out, x_t, t, wanted) for out in outs)
            torch.testing.assert_close(found, cond + w * (cond - uncond), atol=1e-8, rtol=1e-8)
