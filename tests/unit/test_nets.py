"""The U-Net: its options agree with each other, and forward-mode derivatives pass through it."""

import pytest
import torch

from distill.data.cond import Cond
from distill.nets.layers import GroupNorm, SelfAttention
from distill.nets.unet import UNet


def tiny(**options: object) -> UNet:
    torch.manual_seed(0)
    net = UNet(**{"width": 8, "num_classes": 4, "embedding": 16, "groups": 4} | options)
    for parameter in net.parameters():  # zero-initialised layers would hide most of the net
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, 1, 8, 8, generator=generator),
        torch.rand(batch, generator=generator),
        Cond.of_labels(torch.arange(batch)),
    )


@pytest.mark.parametrize("options", [{"attention": "math"}, {"plain_norm": True}, {"channels_last": False}])
def test_options_do_not_change_the_function(options):
    base, other = tiny(), tiny(**options)
    other.load_state_dict(base.state_dict())
    x, t, cond = inputs()
    assert torch.allclose(base(x, t, cond), other(x, t, cond), atol=2e-5, rtol=1e-4)


def test_plain_group_norm_and_math_attention_equal_torch():
    x = torch.randn(2, 8, 5, 5)
    plain, native = GroupNorm(4, 8, plain=True), GroupNorm(4, 8)
    for norm in (plain, native):
        torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(plain(x), native(x), atol=1e-6)
    sdpa, math = SelfAttention(8, heads=2, groups=4), SelfAttention(8, heads=2, groups=4, math=True)
    torch.nn.init.normal_(sdpa.out.weight)
    math.load_state_dict(sdpa.state_dict())
    assert torch.allclose(sdpa(x), math(x), atol=1e-6)


@pytest.mark.parametrize("channels_last", [True, False])
def test_forward_mode_derivative_matches_finite_differences(channels_last, monkeypatch):
    net = tiny(attention="math", plain_norm=True, channels_last=channels_last).double()
    x, t, cond = inputs()
    x, t = x.double(), t.double()
    dx, dt = torch.randn_like(x), torch.ones_like(t)

    step = 1e-6
    # The embedding computes in float32, whose rounding would drown a finite difference.
    frequencies, net.time_scale = net.time.frequencies, 3.0
    monkeypatch.setattr(
        net.time,
        "forward",
        lambda t: torch.cat([(t[:, None] * frequencies).sin(), (t[:, None] * frequencies).cos()], 1),
    )
    _, tangent = torch.func.jvp(lambda x, t: net(x, t, cond), (x, t), (dx, dt))
    with torch.no_grad():
        difference = (net(x + step * dx, t + step * dt, cond) - net(x - step * dx, t - step * dt, cond)) / (
            2 * step
        )
    assert torch.allclose(tangent, difference, rtol=1e-5, atol=1e-6)
    loss = (torch.func.jvp(lambda x: net(x, t, cond), (x,), (dx,))[1] ** 2).mean()
    loss.backward()  # gradients of a tangent: what continuous-time consistency needs
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_forward_mode_derivative_passes_the_net_as_it_is():
    """Float32, its own time embedding, the time scale of a flow."""
    net = tiny(attention="math", plain_norm=True)
    x, t, cond = inputs()
    value, tangent = torch.func.jvp(
        lambda x, t: net(x, t, cond), (x, t), (torch.randn_like(x), torch.ones_like(t))
    )
    assert torch.equal(value, net(x, t, cond))
    assert torch.isfinite(tangent).all()
    assert tangent.abs().mean() > 0


def test_null_label_has_its_own_embedding_and_labels_matter():
    net = tiny()
    x, t, cond = inputs()
    outputs = [net(x, t, c) for c in (cond, cond.null(), Cond.of_labels(torch.tensor([1, 2, 3])))]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


def test_errors_name_the_field():
    with pytest.raises(ValueError, match=r"attention: found 'flash'"):
        UNet(attention="flash")
    with pytest.raises(ValueError, match="groups: 12 channels"):
        UNet(width=12)
    with pytest.raises(ValueError, match="cond: this net expects one of 4 class labels"):
        tiny()(torch.randn(1, 1, 8, 8), torch.rand(1), Cond.nothing(1))
