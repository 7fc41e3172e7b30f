"""The boundary of consistency functions: the published scalings, the identity at the clean end, saved with the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from method_support import mlp, noise
from torch import Tensor

from distill.data.cond import Cond
from distill.methods.families.trajectory import boundary_at, level_grid, noise_level
from distill.models.boundary import Boundary
from distill.models.build import build_net
from distill.models.denoiser import Denoiser
from distill.models.native import load_model, save_model
from distill.models.spec import SamplerSpec
from distill.process.base import Process, expand
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.scalings import cm_scalings, edm_scalings, lcm_scalings
from distill.process.trig import TrigFlow
from distill.process.vp import VPCosine, VPLinear, VPScaledLinear

PROCESSES = [
    Flow(),
    VPCosine(),
    VPLinear(),
    VPScaledLinear(),
    EDM(),
    TrigFlow(),
    VPScaledLinear(zero_terminal_snr=True),
]
processes = pytest.mark.parametrize(
    "process", PROCESSES, ids=lambda p: type(p).__name__ + "0" * getattr(p, "zero_terminal_snr", False)
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def over_alpha(process: Process, x: Tensor, t: Tensor) -> Tensor:
    """The state in EDM's coordinates."""
    return expand((1 / process.alpha(t)).to(x.dtype), x) * x


@dtypes
@pytest.mark.parametrize("count", [2, 18, 151])
@processes
def test_the_identity_at_the_cleanest_level_is_exact(
    process: Process, count: int, dtype: torch.dtype
) -> None:
    """Whatever the net says there: not one bit of it gets through."""
    levels = level_grid(process, count, "karras")
    boundary = boundary_at(process, levels, "x0")
    assert boundary is not None
    assert boundary.sigma_min == pytest.approx(max(0.002, float(noise_level(process, levels[-1:]))))
    x, t = noise(64, dtype=dtype), levels[-1].expand(64)
    for said in (noise(64, 9, dtype), 1e6 * noise(64, 9, dtype)):
        assert torch.equal(boundary.apply(process, said, x, t), over_alpha(process, x, t))
    if isinstance(process, EDM):
        assert torch.equal(boundary.apply(process, noise(64, 9, dtype), x, t.to(dtype)), x)
    # ... and only there.
    assert not torch.allclose(boundary.apply(process, noise(64, 9, dtype), x, levels[-2].expand(64)), x)


@dtypes
def test_latent_consistency_is_the_identity_at_index_0(dtype: torch.dtype) -> None:
    process, x, said = VPScaledLinear(), noise(64, dtype=dtype), noise(64, 9, dtype)
    for boundary in (Boundary("lcm"), Boundary("lcm", timestep_scaling=3.0)):
        assert torch.equal(boundary.apply(process, said, x, torch.zeros(64, dtype=torch.float64)), x)
        assert torch.equal(boundary.apply(process, said, x, torch.zeros(64, dtype=torch.int64)), x)
        far = boundary.apply(process, said, x, torch.full((64,), 999.0, dtype=torch.float64))
        torch.testing.assert_close(far, said, atol=1e-5, rtol=1e-5)


@processes
def test_it_is_the_published_form_under_every_process(process: Process) -> None:
    """f = c_skip x + c_out F in EDM's coordinates, where D = c_skip' x + c_out' F is the prediction of the data."""
    boundary, out = Boundary("cm", sigma_min=0.05, sigma_data=0.7), noise(40, 9)
    t = torch.linspace(0.2, 0.95, 40, dtype=torch.float64) * (
        3 if isinstance(process, EDM) else process.t_max
    )
    level, x = process.sigma(t) / process.alpha(t), noise(40)
    y = over_alpha(process, x, t)
    mine, plain = cm_scalings(level, 0.7, 0.05), edm_scalings(level, 0.7)
    x0 = expand(plain.c_skip, y) * y + expand(plain.c_out, out) * out
    wanted = expand(mine.c_skip, y) * y + expand(mine.c_out, out) * out
    torch.testing.assert_close(boundary.apply(process, x0, x, t), wanted, atol=1e-12, rtol=1e-10)
    assert float(level.min()) > 0.05


def test_the_form_of_latent_consistency() -> None:
    process, x, x0 = VPScaledLinear(), noise(40), noise(40, 9)
    t = torch.arange(40)
    c_skip, c_out = lcm_scalings(t, 4.0, 0.6)
    found = Boundary("lcm", sigma_data=0.6, timestep_scaling=4.0).apply(process, x0, x, t)
    torch.testing.assert_close(found, expand(c_skip, x).double() * x + expand(c_out, x).double() * x0)


@dtypes
@pytest.mark.parametrize(
    "process", [Flow(), TrigFlow(), VPScaledLinear(zero_terminal_snr=True)], ids=["flow", "trig", "table"]
)
def test_without_any_signal_it_is_the_predicted_data(process: Process, dtype: torch.dtype) -> None:
    t = torch.full((8,), process.t_max, dtype=dtype)
    assert float(process.alpha(t).abs().max()) == 0
    found = Boundary("cm").apply(process, noise(8, 9), noise(8), t)
    assert bool(found.isfinite().all())
    assert torch.equal(found, noise(8, 9))


@processes
def test_gradients_are_finite_at_all_levels(process: Process) -> None:
    levels = level_grid(process, 18, "karras")
    boundary = boundary_at(process, levels, "x0")
    assert boundary is not None
    x, x0 = noise(18).requires_grad_(), noise(18, 9).requires_grad_()
    boundary.apply(process, x0, x, levels).square().sum().backward()
    assert x.grad is not None
    assert x0.grad is not None
    assert bool(x.grad.isfinite().all())
    assert bool(x0.grad.isfinite().all())
    assert not bool(x0.grad[-1].any())
    assert bool(x0.grad[:-1].any())


def test_where_a_prediction_is_the_identity_by_itself_there_is_no_boundary() -> None:
    for process in (Flow(), TrigFlow(), VPLinear()):
        levels = level_grid(process, 18)
        for kind in ("velocity", "eps"):
            assert boundary_at(process, levels, kind) is None
        with pytest.raises(ValueError, match=r"grid: ends at t = 0 .* expected 'karras'"):
            boundary_at(process, levels, "x0")
        # An eps or a velocity of any size leaves a clean state as it is.
        x, t = noise(8), levels[-1].expand(8)
        torch.testing.assert_close(process.convert("eps", 1e3 * noise(8, 9), x, t, "x0"), x)


def test_a_denoiser_applies_it_to_its_predicted_data_and_all_that_follows() -> None:
    process, t, x = VPCosine(), torch.linspace(0.1, 0.9, 6, dtype=torch.float64), noise(6)
    plain = mlp(process, "v", double=True)
    model = Denoiser(plain.net, process, "v", (2,), boundary=Boundary("cm", sigma_min=0.1))
    cond = Cond.nothing(6)
    x0 = model.boundary.apply(process, plain.x0(x, t, cond), x, t)
    torch.testing.assert_close(model.x0(x, t, cond), x0)
    torch.testing.assert_close(model.velocity(x, t, cond), process.convert("x0", x0, x, t, "velocity"))
    torch.testing.assert_close(model.predict("v", x, t, cond), process.convert("x0", x0, x, t, "v"))
    assert torch.equal(model(x, t, cond), plain(x, t, cond))  # the net's own answer stays its own
    assert not torch.allclose(model.x0(x, t, cond), plain.x0(x, t, cond))


@pytest.mark.parametrize(
    "boundary",
    [
        None,
        Boundary("cm", sigma_min=0.029167158151720367, sigma_data=0.6),
        Boundary("lcm", timestep_scaling=7.0),
    ],
    ids=["none", "cm", "lcm"],
)
def test_it_survives_model_json(boundary: Boundary | None, tmp_path: Path) -> None:
    net = {"_target_": "distill.nets.mlp.MLP", "shape": [2], "width": 8, "features": 8}
    torch.manual_seed(0)
    model = Denoiser(build_net(net), VPScaledLinear(), "v", (2,), coupling="few_step", boundary=boundary)
    spec = SamplerSpec(steps=1, times={1: (999.0, 0.0)}, mode="sde")
    save_model(tmp_path, model, spec)
    told = json.loads((tmp_path / "model.json").read_text())["boundary"]
    again = load_model(tmp_path).denoiser
    assert again.boundary == boundary
    assert (again.coupling, again.sampler) == ("few_step", spec)
    if boundary is None:
        assert told is None
        return
    assert told == boundary.to_dict()
    assert Boundary(**told) == boundary
    t = torch.full((5,), 3.0, dtype=torch.float64)
    x, cond = noise(5, dtype=torch.float32), Cond.nothing(5)
    assert torch.equal(again.x0(x, t, cond), model.x0(x, t, cond))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "ect"}, r"form: found 'ect', expected one of \['cm', 'lcm'\]"),
        ({"form": "cm", "sigma_min": 0.0}, "sigma_min: found 0.0, expected a positive number"),
        ({"form": "cm", "sigma_data": -1.0}, "sigma_data: found -1.0"),
        ({"form": "lcm", "timestep_scaling": 0.0}, "timestep_scaling: found 0.0"),
    ],
)
def test_wrong_boundaries(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Boundary(**options)  # type: ignore[arg-type]
