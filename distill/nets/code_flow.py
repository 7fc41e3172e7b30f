"""A network of tokens whose last layer is a flow of code vectors in place of probabilities (Distilled Decoding 2, arXiv
2510.21003, after MAR, arXiv 2406.11838)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distill.data.cond import Cond
from distill.nets.layers import TimeEmbedding
from distill.nets.net import Net
from distill.nets.token_net import TokenNet

TIME_SCALE = 1000.0  # of the sines and cosines of a time in [0, 1]


class CodeFlowNet(Net):
    """The body makes a feature f_i of the codes before position i; a small head h(f_i, x_i, t_i) predicts the velocity of the
    position's code vector x_i at its own time.

    The codes before are `context` [B,L,C] of the conditions. Without one they are x itself: a generator reads the noise of
    the positions before. (A body that reads tokens, LlamaGen's, sees the nearest codes of the noise alone; the paper first
    trains such a teacher to read vectors.)

    Args:
        body: a `TokenNet` without the layer of logits, and no student. size: C. width: of the head.
        layers: residual blocks of the head.
    """

    def __init__(self, body: nn.Module, size: int, *, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        if not isinstance(body, TokenNet) or not isinstance(getattr(body, body.last, None), nn.Identity):
            raise ValueError(
                f"body: found {type(body).__name__}, expected a network of tokens with the option logits: false"
            )
        if min(size, width, layers) < 1 or width % 2:
            raise ValueError(
                f"size, width, layers: found {size}, {width}, {layers}, expected at least 1, and an even width"
            )
        self.body, self.groups, self.num_classes = body, body.groups, getattr(body, "num_classes", 0)
        self.head = FlowHead(body.width, size, width, layers)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x [n B,L,C] at times t [n B] or [n B,L] -> velocities; n states of each of the B conditions, one after the other."""
        context = x if (given := cond.get("context")) is None else given
        features = self.body(context, t, cond)
        features = features.repeat_interleave(len(x) // len(features), 0)
        return self.velocity(features, x, t if t.dim() == 2 else t[:, None].expand(x.shape[:2]))

    def velocity(self, features: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocities [B,n,C] of x [B,n,C] at times t [B,n], given features [B,n,width]."""
        out: Tensor = self.head(features, x.to(features.dtype), t)
        return out

    def begin(self, cond: Cond) -> Any:
        """See `TokenNet`."""
        return self.body.begin(cond)

    def advance(self, state: Any, codes: Tensor | None) -> Tensor:
        """Features [B,n,width] of the next group, as `TokenNet.advance` gives its logits."""
        features: Tensor = self.body.advance(state, codes)
        return features


class FlowHead(nn.Module):
    """Residual two-layer perceptrons whose layer norms are scaled, shifted and gated by feature and time."""

    def __init__(self, features: int, size: int, width: int, layers: int) -> None:
        super().__init__()
        self.time = nn.Sequential(
            TimeEmbedding(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.feature, self.enter = nn.Linear(features, width), nn.Linear(size, width)
        self.blocks = nn.ModuleList([HeadBlock(width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate, self.leave = nn.Linear(width, 2 * width), nn.Linear(width, size)

    def forward(self, features: Tensor, x: Tensor, t: Tensor) -> Tensor:
        times = self.time[1:](self.time[0](TIME_SCALE * t.flatten()).to(x.dtype)).view(*t.shape, -1)
        cond = nn.functional.silu(self.feature(features) + times)
        hidden = self.enter(x)
        for block in self.blocks:
            hidden = block(hidden, cond)
        scale, shift = self.modulate(cond).chunk(2, -1)
        out: Tensor = self.leave(self.norm(hidden) * (1 + scale) + shift)
        return out


class HeadBlock(nn.Module):
    """One residual block of `FlowHead`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift, gate = self.modulate(cond).chunk(3, -1)
        out: Tensor = x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)
        return out
