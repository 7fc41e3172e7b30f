"""A model of another process as a flow: the trajectories stay the same."""

from __future__ import annotations

import pytest
import torch

from distill.data.cond import Cond
from distill.models.analytic import exact_denoiser
from distill.models.build import build_model
from distill.models.denoiser import Denoiser
from distill.nets.converted import Converted
from distill.nets.unet import UNet
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.vp import VPScaledLinear
from distill.stages.adapt import Adapt, adapted, as_flow
from distill.typed import parse

MEANS = [[1.0, 0.0], [-0.5, 0.8]]


def teacher(process=None) -> Denoiser:
    return exact_denoiser(process or VPScaledLinear(), MEANS, 0.1)


def test_the_flow_follows_the_teacher() -> None:
    """Euler in the flow is DDIM in the teacher's process, between the times that both know."""
    model, process, flow = teacher(), VPScaledLinear(), Flow()
    student = as_flow(model, "converted")
    indices = torch.tensor([950.0, 700.0, 400.0, 100.0, 1.0], dtype=torch.float64)
    times = flow.time_of(process.log_ratio(indices))
    z, cond = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), Cond.nothing(5)
    scale = torch.rsqrt((1 - times).square() + times.square())
    start = z / float(scale[0])
    made = student.transport(start, cond, solver="euler", grid=times, times=times.tolist())
    wanted = model.transport(
        z, cond, solver="ddim", grid=torch.cat([indices, torch.zeros(1)]), times=indices.tolist()
    )
    torch.testing.assert_close(made * scale.float()[:, None, None], wanted, atol=1e-4, rtol=1e-4)


def test_one_step_from_noise_is_the_teacher_s_data() -> None:
    model, z, cond = teacher(), torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), Cond.nothing(5)
    made = as_flow(model, "converted").transport(z, cond, solver="euler", steps=1)[0]
    wanted = model.x0(z, torch.full((5,), 999.0), cond)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-5)
    assert float((made - z).abs().max()) > 0.1


def test_a_variance_exploding_teacher() -> None:
    model, cond = teacher(EDM()), Cond.nothing(4)
    t = torch.full((4,), 0.6)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    made = as_flow(model, "converted").velocity(x, t, cond)
    torch.testing.assert_close(made, teacher(Flow()).velocity(x, t, cond), atol=1e-4, rtol=1e-4)


def test_a_flow_stays_as_it_is_and_raw_scales_times() -> None:
    flow = teacher(Flow())
    assert as_flow(flow, "converted") is flow
    net = UNet(width=8, embedding=16, groups=4, time_scale=1.0)
    model = Denoiser(net, VPScaledLinear(), "v", (1, 8, 8))
    raw = adapted(model, {"process": "flow", "start": "raw"})
    x, cond = torch.randn(2, 1, 8, 8), Cond.of_labels([1, 2])
    with torch.no_grad():
        made = raw.velocity(x, torch.full((2,), 0.5), cond)
        torch.testing.assert_close(made, net(x, torch.full((2,), 999.0 / 2), cond))
    assert raw.conditions == model.conditions
    assert type(adapted(model, {"process": "flow"}).net) is Converted
    again = build_model(adapted(model, {"process": "flow"}).config())
    assert again.process.config() == Flow().config()


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"adapt.start: found 'raw' without `process: flow`"):
        parse(Adapt, {"start": "raw"}, "adapt")
    with pytest.raises(ValueError, match=r"adapt.kind: found 'v', but a flow"):
        parse(Adapt, {"process": "flow", "kind": "v"}, "adapt")
    with pytest.raises(ValueError, match="endpoint student"):
        as_flow(teacher().with_(coupling="endpoint"), "converted")
