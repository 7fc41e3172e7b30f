"""Models of tokens that make code vectors by a learned flow: autoregressive diffusion, and one-step generators from it
(Distilled Decoding 2, arXiv 2510.21003)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.models.conditions import Conditions, Nothing, of_net
from distill.models.decoder import Decoder, codebook_of
from distill.models.model import Model
from distill.nets.code_flow import CodeFlowNet
from distill.nets.tokenizer import nearest_codes
from distill.process.base import at_least_float32
from distill.process.flow import Flow
from distill.process.times import default_grid
from distill.samplers.ode import euler, heun

SOLVERS = ("euler", "heun")


class CodeFlow(Model):
    """A `CodeFlowNet`. Samples are code vectors [L,C] of the decoder's codebook, or near them.

    `transport` goes through the groups of tokens in order: the noise of a group flows to code vectors given the codes before,
    of which the nearest codes are kept. A generator (coupling "endpoint") makes all positions in one call, x0 of pure noise.

    Args:
        net: K groups of L positions in all. sample_shape: [L,C]. decoder: has the codebook. Others: as of `Model`.

    Raises:
        ValueError: names the argument.
    """

    kind = "velocity"

    def __init__(
        self,
        net: nn.Module,
        sample_shape: Sequence[int],
        *,
        conditions: Conditions | None = None,
        decoder: Decoder,
        coupling: str = "independent",
        guidable: bool = False,
    ) -> None:
        if not isinstance(net, CodeFlowNet):
            raise ValueError(f"net: found {type(net).__name__}, expected a CodeFlowNet")
        if guidable:
            raise ValueError("guidable: found true, expected false: guidance is that of the teacher's scores")
        shape, book = tuple(sample_shape), codebook_of(decoder)
        if shape != (sum(net.groups), book.shape[1]):
            raise ValueError(
                f"sample_shape: found {list(shape)}, expected {[sum(net.groups), book.shape[1]]}: a code of the codebook for "
                "each position of the net"
            )
        super().__init__(net, Flow(), shape, conditions or of_net(net) or Nothing(), decoder, coupling, False)

    @property
    def code_net(self) -> CodeFlowNet:
        """The net, of its type."""
        assert isinstance(self.net, CodeFlowNet)
        return self.net

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Velocities [B,L,C] at times [B], or [B,L], one a position; see `CodeFlowNet`."""
        velocity: Tensor = self.net(x_t, t.to(at_least_float32(x_t).dtype), cond)
        return velocity

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: float | Tensor = 1.0) -> Tensor:
        """Predicted code vectors [B,L,C]."""
        if isinstance(guidance_scale, Tensor) or guidance_scale != 1:
            raise ValueError(
                f"guidance_scale: found {guidance_scale}, expected 1: this model has no guidance"
            )
        return self.process.convert("velocity", at_least_float32(self(x_t, t, cond)), x_t, t, "x0")

    def nearest(self, vectors: Tensor) -> Tensor:
        """The codes [B,L,C] that are nearest to vectors [B,L,C]."""
        book = codebook_of(self.decoder).to(vectors.device)
        return book[nearest_codes(vectors, book)].to(vectors.dtype)

    def transport(
        self,
        z: Tensor,
        cond: Cond | None = None,
        *,
        solver: str = "euler",
        steps: int | None = None,
        guidance_scale: float = 1.0,
        grid: Tensor | None = None,
        times: Sequence[float] | None = None,
    ) -> Tensor:
        """See `Model`; `solver` ("euler" or "heun"), `steps` and `grid` are those of the flow of every group, and there is no
        path."""
        if times is not None and len(times) > 1:
            raise ValueError("times: found several, but codes are made group by group; expected none")
        self.check_transport(guidance_scale, solver)
        cond = Cond.nothing(len(z)) if cond is None else cond
        grid = default_grid(self.process, 8 if steps is None else steps) if grid is None else grid
        net, solve = self.code_net, {"euler": euler, "heun": heun}[solver]
        state, last, parts = net.begin(cond), None, []
        for noise in z.split(list(net.groups), 1):
            features = net.advance(state, last)

            def velocity(x: Tensor, t: Tensor, features: Tensor = features) -> Tensor:
                return net.velocity(features, x, t[:, None].to(x.dtype).expand(x.shape[:2]))

            last = self.nearest(solve(velocity, noise, grid))
            parts.append(last)
        return torch.cat(parts, 1)[None]

    def check_transport(self, guidance_scale: float = 1.0, solver: str | None = None) -> None:
        """See `Model`."""
        if solver is not None and solver not in SOLVERS:
            raise ValueError(f"solver: found {solver!r}, expected one of {list(SOLVERS)} for a flow of codes")
        super().check_transport(guidance_scale, solver)

    def calls(self, solver: str, steps: int, guidance_scale: float = 1.0) -> int | None:
        """One a group; steps of the flow call the small head alone."""
        return len(self.code_net.groups)


def with_context(cond: Cond, codes: Tensor) -> Cond:
    """Conditions with the codes [B,L,C] that each position's group is preceded by."""
    return replace(cond, values={**cond.values, "context": codes})
