"""Identities of the samplers, measured on fields whose solution is known in closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from distill.process.base import Process, expand
from distill.process.flow import Flow
from distill.process.times import shift, uniform_grid
from distill.process.vp import VPCosine, VPLinear, VPScaledLinear
from distill.samplers.ode import ddim, ddim_step, euler, heun, rollout
from distill.samplers.straightness import straightness

MEAN, STD = torch.tensor([0.7, -0.4]).double(), torch.tensor([0.5, 1.6]).double()


def noise(batch: int = 5) -> Tensor:
    return torch.randn(batch, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def gaussian_eps(process: Process, x: Tensor, t: Tensor) -> Tensor:
    """E[eps | x_t] for x0 ~ N(MEAN, diag STD^2) under any process."""
    alpha, sigma = expand(process.alpha(t), x), expand(process.sigma(t), x)
    return sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def gaussian_flow(x: Tensor, t: Tensor) -> Tensor:
    """The flow's exact marginal velocity of that Gaussian, finite at both ends."""
    t = expand(t, x)
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN) - MEAN


def exact_flow(z: Tensor) -> Tensor:
    return MEAN + STD * z


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_order_of_convergence(sampler: object, order: int) -> None:
    """Halving the step divides the error by 2^order on the exact Gaussian field (map: mean + std z)."""
    z = noise()
    errors = []
    for steps in (64, 128, 256, 512):
        final = sampler(gaussian_flow, z, uniform_grid(Flow(), steps))  # type: ignore[operator]
        errors.append((final - exact_flow(z)).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert orders == pytest.approx([order] * len(orders), abs=0.15)


@pytest.mark.parametrize("process", [Flow(), VPCosine(), VPLinear(), VPScaledLinear()], ids=repr)
def test_ddim_lands_where_the_prediction_points(process: Process) -> None:
    """With the true prediction of any kind, one step lands on the same data and noise at the new time."""
    t = torch.linspace(0.2, 0.9, 5, dtype=torch.float64) * process.t_max
    s = t / 3
    x0, eps = noise(), noise().flip(0)
    z_t = process.add_noise(x0, eps, t)
    for kind in ("x0", "eps", "velocity", "score", *(("v",) if process.variance_preserving else ())):
        got_x0, got_eps, z_s = ddim_step(process, kind, process.target(kind, x0, eps, t), z_t, t, s)
        torch.testing.assert_close(got_x0, x0, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(got_eps, eps, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(z_s, process.add_noise(x0, eps, s), atol=1e-9, rtol=1e-9)


def test_ddim_is_a_rotation_on_a_vp_process() -> None:
    """z_s = cos(d) z - sin(d) v with d the difference of angles (arXiv 2202.00512, appendix D)."""
    process, t, s = VPCosine(), torch.tensor([0.9, 0.4]).double(), torch.tensor([0.6, 0.1]).double()
    z_t, v = noise(2), noise(4)[2:]
    angle = torch.atan2(process.sigma(t), process.alpha(t)) - torch.atan2(process.sigma(s), process.alpha(s))
    expected = expand(angle.cos(), z_t) * z_t - expand(angle.sin(), z_t) * v
    torch.testing.assert_close(ddim_step(process, "v", v, z_t, t, s)[2], expected)


@pytest.mark.parametrize("process", [VPCosine(), VPLinear(), VPScaledLinear()], ids=repr)
def test_ddim_is_euler_of_the_flow_in_matched_coordinates(process: Process) -> None:
    """DDIM's state divided by (alpha + sigma) is Euler's on the flow at the matched times, step by step."""
    flow = Flow()
    times = uniform_grid(process, 6)
    z = noise()

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return gaussian_eps(process, x, t) + 0.1 * torch.sin(
            3 * x
        )  # any eps predictor, not only the exact one

    def as_flow(x: Tensor, t_flow: Tensor) -> Tensor:
        t = process.matching_time(flow, t_flow)
        state = expand(process.matching_scale(flow, t_flow), x) * x
        eps = teacher(state, t)
        return eps - process.convert("eps", eps, state, t, "x0")

    path = ddim(teacher, process, z, times, kind="eps", return_path=True, final="state")
    scale = flow.matching_scale(process, times)
    flow_path = euler(as_flow, scale[0] * z, flow.matching_time(process, times), return_path=True)
    torch.testing.assert_close(expand(scale, path) * path, flow_path, atol=1e-8, rtol=1e-8)


def test_ddim_of_a_flow_is_euler() -> None:
    z, times = noise(), uniform_grid(Flow(), 7)
    path = euler(gaussian_flow, z, times, return_path=True)
    by_ddim = ddim(gaussian_flow, Flow(), z, times, kind="velocity", return_path=True, final="state")
    torch.testing.assert_close(by_ddim, path)
    # a flow's grid ends on clean data, so both meanings of the last step agree
    torch.testing.assert_close(ddim(gaussian_flow, Flow(), z, times, kind="velocity"), path[-1])


def test_ddim_converges_and_its_last_step_returns_x0() -> None:
    process, z = VPCosine(), noise()
    start = process.prior(z)
    times = uniform_grid(process, 400)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return process.convert("eps", gaussian_eps(process, x, t), x, t, "v")

    final = ddim(predict, process, start, times, kind="v")
    # The exact map from unit Gaussian at t_max: the marginal there is unit only up to 4.5e-5.
    torch.testing.assert_close(final, exact_flow(z), atol=2e-2, rtol=2e-2)
    state = ddim(predict, process, start, times, kind="v", final="state")
    assert not torch.equal(final, state)
    torch.testing.assert_close(final, state, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="final"):
        ddim(predict, process, start, times, kind="v", final="x")
    with pytest.raises(ValueError, match="Flow"):
        ddim(predict, Flow(), start, times, kind="v")


def test_paths_callbacks_and_dtypes() -> None:
    z, times = noise(), uniform_grid(Flow(), 3)
    seen: list[tuple[int, Tensor]] = []
    path = heun(gaussian_flow, z, times, on_state=lambda i, x: seen.append((i, x)), return_path=True)
    assert path.shape == (4, *z.shape)
    assert [i for i, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(torch.stack([x for _, x in seen]), path)
    assert torch.equal(path[0], z)
    assert torch.equal(path[-1], heun(gaussian_flow, z, times))
    # a half-precision net and start: the state is float32, and float64 times do not widen it
    half = euler(lambda x, t: x.bfloat16(), z.bfloat16(), times)
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="times"):
        euler(gaussian_flow, z, times[:1])


def test_evaluation_counts_and_last_euler() -> None:
    z, times = noise(), uniform_grid(Flow(), 4)
    asked: list[float] = []

    def counted(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(z),)
        asked.append(t[0].item())
        return gaussian_flow(x, t)

    euler(counted, z, times)
    assert asked == times[:-1].tolist()
    asked.clear()
    heun(counted, z, times)
    assert len(asked) == 8
    assert asked[-1] == times[-1]
    asked.clear()
    heun(counted, z, times, last_euler=True)
    assert len(asked) == 7
    assert times[-1].item() not in asked


def test_heun_with_last_euler_on_a_singular_end() -> None:
    process = VPLinear()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return process.convert("eps", gaussian_eps(process, x, t), x, t, "velocity")

    times = uniform_grid(process, 50) ** 2  # finer where the field is steep
    assert not heun(velocity, noise(), times).isfinite().all()
    assert heun(velocity, noise(), times, last_euler=True).isfinite().all()


def test_there_and_back() -> None:
    """An ascending grid integrates data back into its noise."""
    z, times = noise(), uniform_grid(Flow(), 400)
    back = heun(gaussian_flow, heun(gaussian_flow, z, times), times.flip(0))
    torch.testing.assert_close(back, z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["euler", "heun", "ddim"])
def test_differentiable_in_the_initial_noise(name: str) -> None:
    """d x0 / d z is diag(std) on the exact Gaussian field; coarse Jacobians agree with differences too."""
    z = noise(2)

    def sample(z: Tensor, steps: int) -> Tensor:
        times = uniform_grid(Flow(), steps)
        if name == "ddim":
            return ddim(gaussian_flow, Flow(), z, times, kind="velocity")
        return {"euler": euler, "heun": heun}[name](gaussian_flow, z, times)

    jacobian = torch.autograd.functional.jacobian(lambda z: sample(z, 300), z)
    expected = torch.einsum("ab,cd,c->acbd", torch.eye(2).double(), torch.eye(2).double(), STD)
    torch.testing.assert_close(jacobian, expected, atol=2e-2, rtol=2e-2)
    assert torch.autograd.gradcheck(lambda z: sample(z, 4), z.clone().requires_grad_())


@pytest.mark.parametrize("steps", [2, 3, 10, 50])
def test_straightness_identity(steps: int) -> None:
    """S = mean |v|^2 - mean |z - x0|^2 on a uniform grid, since the chord is the mean velocity."""
    path, velocities = rollout(gaussian_flow, noise(), uniform_grid(Flow(), steps))
    plain, norm = straightness(path, velocities)
    chord = (path[0] - path[-1]).square().sum(1).mean()
    torch.testing.assert_close(plain, velocities.square().sum(2).mean() - chord)
    torch.testing.assert_close(norm, plain / chord)
    assert plain > 0


def test_straightness_of_a_straight_field_and_refusals() -> None:
    z = noise()
    path, velocities = rollout(lambda x, t: z * 2, z, uniform_grid(Flow(), 5))
    plain, _ = straightness(path, velocities)
    assert plain.item() == pytest.approx(0.0, abs=1e-25)
    with pytest.raises(ValueError, match="N >= 2"):
        straightness(*rollout(gaussian_flow, z, uniform_grid(Flow(), 1)))
    with pytest.raises(ValueError, match="velocities"):
        straightness(path[1:], velocities)
    # images, not only vectors
    images = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    plain, _ = straightness(*rollout(lambda x, t: x * expand(t, x), images, uniform_grid(Flow(), 4)))
    assert plain.shape == ()


def test_a_shifted_grid_reaches_the_same_end() -> None:
    z = noise()
    final = heun(gaussian_flow, z, shift(uniform_grid(Flow(), 400), 3.0))
    torch.testing.assert_close(final, exact_flow(z), atol=1e-3, rtol=1e-3)
