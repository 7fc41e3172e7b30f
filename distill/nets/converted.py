"""Nets of another process as the velocity of a flow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.nets.net import Net
from distill.process.base import Process, expand
from distill.process.flow import Flow

FLOW = Flow()


class Retimed(Net):
    """A net that gets its times multiplied by `scale`: net(x, scale t, cond)."""

    def __init__(self, net: nn.Module, scale: float) -> None:
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Output of the net [B,*S]."""
        out: Tensor = self.net(x, self.scale * t, cond)
        return out


class Converted(Net):
    """The velocity eps - x0 of `process.flow.Flow` from a net that predicts `kind` under `process`.

    A flow state x = (1 - t) x0 + t eps is c x in the other process at the time of the same signal-to-noise ratio. Where that
    process preserves variance, c = ((1 - t)^2 + t^2)^(-1/2): the state then has unit variance also where t is noisier than the
    process's last time, which the net gets there. At such times the velocity is (x - x0) / t, so that one Euler step from t = 1
    ends on the predicted data.
    """

    def __init__(self, net: nn.Module, process: Process, kind: str) -> None:
        super().__init__()
        process.check_kind(kind)
        self.net, self.process, self.kind = net, process, kind

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocity [B,*S] at states x [B,*S] and flow times t [B]."""
        process = self.process
        time = process.matching_time(FLOW, t)
        if process.variance_preserving:
            scale = torch.rsqrt((1 - t).square() + t.square())
        else:
            scale = process.matching_scale(FLOW, t)
        state = expand(scale.to(x.dtype), x) * x
        out = self.net(state, time.to(x.dtype), cond)
        x0 = process.convert(self.kind, out, state, time, "x0")
        eps = process.convert(self.kind, out, state, time, "eps")
        beyond = (t > 0.5) & ~process.covers(FLOW.log_ratio(t))
        return torch.where(expand(beyond, x), (x - x0) / expand(t.clamp_min(0.5).to(x.dtype), x), eps - x0)
