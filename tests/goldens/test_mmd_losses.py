"""Goldens of MMD-DDM (data/mmd/README.md): kernels with gradients, and gradients through the whole sampling chain."""

from __future__ import annotations

import pytest
import torch
from conftest import Load
from torch import Tensor, nn
from torch.nn import functional as F

from distill.models.kernels import Kernel, mmd2
from distill.nets.recomputed import Recomputed
from distill.process.vp import VPLinearBetas
from distill.samplers.ode import ddim
from distill.samplers.stochastic import stochastic_ddim

Golden = dict[str, Tensor]
GRIDS = {"ddim5": "uniform_5", "ddim4": "uniform_4", "ddimq5": "quad_5", "ddim4_eta1": "uniform_4"}
CASES = ("poly1", "poly2", "poly3", "poly3_g0.5_c2", "rbf", "rbf_g0.05")


@pytest.fixture(scope="module")
def kernels(load: Load) -> Golden:
    return load("mmd", "mmd_kernels")


@pytest.fixture(scope="module")
def chain(load: Load) -> Golden:
    return load("mmd", "ddim_chain")


def kernel_of(case: str) -> Kernel:
    """The kernel of a case by its name: poly<degree>[_g<gamma>_c<c>], rbf[_g<gamma>]."""
    name, *rest = case.split("_")
    options = {part[0]: float(part[1:]) for part in rest}
    gamma = options.get("g")
    if name == "rbf":
        return Kernel("rbf", gamma=gamma)
    return Kernel("polynomial", degree=int(name.removeprefix("poly")), gamma=gamma, c=options.get("c", 1.0))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("side", ["a", "b"])
def test_value_and_gradient(kernels: Golden, side: str, case: str) -> None:
    x, y = kernels[f"{side}.x"].clone().requires_grad_(True), kernels[f"{side}.y"]
    terms = mmd2(x, y, kernel_of(case))
    terms.mmd2.backward()
    torch.testing.assert_close(terms.mmd2.detach(), kernels[f"{side}.{case}.loss"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x.grad, kernels[f"{side}.{case}.grad_x"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_gram_matrices(kernels: Golden, case: str) -> None:
    x, y, kernel = kernels["a.x"], kernels["a.y"], kernel_of(case)
    for name, pair in (("xx", (x, x)), ("xy", (x, y)), ("yy", (y, y))):
        torch.testing.assert_close(kernel(*pair), kernels[f"a.{case}.K{name}"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("side", ["a", "b"])
def test_in_float32(kernels: Golden, side: str) -> None:
    x = kernels[f"{side}.x"].float().requires_grad_(True)
    found = mmd2(x, kernels[f"{side}.y"].float(), kernel_of("poly3")).mmd2
    found.backward()
    torch.testing.assert_close(
        found.detach(), kernels[f"{side}.poly3_f32.loss"].float(), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(x.grad, kernels[f"{side}.poly3_f32.grad_x"].float(), rtol=0, atol=1e-5)


def test_of_a_set_and_its_copy_and_of_a_linear_kernel(kernels: Golden) -> None:
    x, y = kernels["a.x"], kernels["a.y"]
    same = mmd2(x, x.clone(), kernel_of("poly3")).mmd2
    torch.testing.assert_close(same, kernels["a.poly3_same.loss"], rtol=1e-9, atol=0)
    linear = mmd2(x, y, Kernel("linear")).mmd2  # c of the polynomial cancels
    torch.testing.assert_close(linear, kernels["a.poly1.loss"], rtol=1e-9, atol=1e-12)


class Predictor(nn.Module):
    """The noise predictor of the goldens."""

    def __init__(self, golden: Golden) -> None:
        super().__init__()
        for name in ("w1", "b1", "tw", "w2", "b2"):
            setattr(self, name, nn.Parameter(golden[f"model.{name}"].clone()))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        hidden = F.conv2d(x, self.w1, self.b1, padding=1)
        hidden = torch.tanh(
            hidden + self.tw[None, :, None, None] * (t.to(x.dtype) / 1000)[:, None, None, None]
        )
        return x + 0.06 * F.conv2d(hidden, self.w2, self.b2, padding=1)


def features(z: Tensor, golden: Golden) -> Tensor:
    return F.relu(((z + 1) / 2).clamp(0, 1).flatten(1) @ golden["proj"])


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize(("case", "grid"), GRIDS.items())
def test_the_gradient_through_the_whole_chain(chain: Golden, case: str, grid: str, again: bool) -> None:
    """DDIM on rising lists of steps that end at index 0; the last step returns the predicted data, wherever it ends."""
    process, net = VPLinearBetas(), Predictor(chain)
    torch.testing.assert_close(
        process.alphas_cumprod, torch.cumprod(1 - chain["betas"].double(), 0), rtol=1e-5, atol=0
    )
    rising = chain[f"seq.{grid}"].double()
    times = torch.cat([rising.flip(0), torch.tensor([-1.0], dtype=torch.float64)])
    predict = Recomputed(net) if again else net
    if case.endswith("eta1"):
        noise = chain["eta1_noises"]
        states = stochastic_ddim(predict, process, chain["x_T"], times, noise, kind="eps", return_path=True)
    else:
        states = ddim(predict, process, chain["x_T"], times, kind="eps", return_path=True)
    torch.testing.assert_close(states.detach(), chain[f"{case}.xs"], rtol=1e-4, atol=1e-4)
    loss = mmd2(features(states[-1], chain), features(chain["real"], chain), kernel_of("poly3")).mmd2
    torch.testing.assert_close(loss.detach(), chain[f"{case}.loss"], rtol=0, atol=2e-6)
    loss.backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, chain[f"{case}.grad.{name}"], rtol=1e-3, atol=1e-6)
    assert net.calls == (2 if again else 1) * len(rising)
