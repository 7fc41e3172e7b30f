"""A net given meaning: which process its input lives in and what its output predicts. Guidance is applied
here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.models.guidance import guide
from distill.process.base import Process, at_least_float32
from distill.process.times import uniform_grid
from distill.samplers.ode import ddim, euler, heun

SOLVERS = ("euler", "heun", "ddim")


class Denoiser(nn.Module):
    """`net(x_t, t, cond)` read as a prediction of `kind` under `process`.

    Args:
        net: [B,*S], times [B], Cond -> [B,*S].
        process: the noise process that the net was trained under.
        kind: "x0", "eps", "v" or "velocity": what the net's output is.
        sample_shape: S.
        num_classes: class labels that the net is conditioned on; 0 for none.
        guidable: trained with dropped conditions, so guidance scales other than 1 make sense.
        coupling: which pairs of noise and data it was trained on: "independent" (the velocity is a score in
            disguise), "paired" (reflow; no score can be read off) or "endpoint" (a one-step student, valid at
            t_max alone).
    """

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        kind: str,
        sample_shape: Sequence[int],
        *,
        num_classes: int = 0,
        guidable: bool = False,
        coupling: str = "independent",
    ) -> None:
        super().__init__()
        process.check_kind(kind)
        if kind == "eps" and float(process.alpha(torch.tensor([process.t_max], dtype=torch.float64))) == 0:
            raise ValueError(
                f"kind: found 'eps', but under {process!r} nothing of the data is left at t_max, where predicted noise "
                "says nothing about it; expected 'x0', 'v' or 'velocity'"
            )
        if coupling not in ("independent", "paired", "endpoint"):
            raise ValueError(f"coupling: found {coupling!r}, expected 'independent', 'paired' or 'endpoint'")
        self.net, self.process, self.kind, self.num_classes = net, process, kind, num_classes
        self.sample_shape, self.guidable, self.coupling = tuple(sample_shape), guidable, coupling

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: float | Tensor = 1.0) -> Tensor:
        """The prediction [B,*S] of the net's own kind at times t [B], guided: u + g (c - u), in one batched
        forward."""
        if isinstance(guidance_scale, float | int) and guidance_scale == 1.0:
            return self.net(x_t, t, cond)
        if not self.guidable:
            raise ValueError(
                f"guidance_scale: found {guidance_scale}, but this model was not trained with a null "
                "condition; expected 1"
            )
        both = self.net(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.cat(cond.null()))
        conditional, unconditional = both.chunk(2)
        return guide(unconditional, conditional, guidance_scale)

    def predict(
        self, kind: str, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: float | Tensor = 1.0
    ) -> Tensor:
        """The prediction converted to `kind`, in float32 at least."""
        if kind in ("score", "eps") and self.coupling != "independent" and kind != self.kind:
            raise ValueError(
                f"{kind}: a model trained on {self.coupling} noise and data is a transport, not a score; "
                "only models with independent coupling have one"
            )
        out = at_least_float32(self(x_t, t, cond, guidance_scale))
        return self.process.convert(self.kind, out, x_t, t, kind)

    def x0(self, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: float | Tensor = 1.0) -> Tensor:
        """Predicted data."""
        return self.predict("x0", x_t, t, cond, guidance_scale)

    def eps(self, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: float | Tensor = 1.0) -> Tensor:
        """Predicted noise."""
        return self.predict("eps", x_t, t, cond, guidance_scale)

    def velocity(self, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: float | Tensor = 1.0) -> Tensor:
        """dx/dt along the probability-flow ODE."""
        return self.predict("velocity", x_t, t, cond, guidance_scale)

    def score(self, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: float | Tensor = 1.0) -> Tensor:
        """Gradient of the log density of x_t."""
        return self.predict("score", x_t, t, cond, guidance_scale)

    def transport(
        self,
        z: Tensor,
        cond: Cond,
        *,
        solver: str = "euler",
        steps: int | None = None,
        guidance_scale: float = 1.0,
        grid: Tensor | None = None,
        times: Sequence[float] | None = None,
    ) -> Tensor:
        """Carry noise z [B,*S] along the probability-flow ODE.

        The ODE is solved on `grid` ([steps + 1] descending) or, without one, on the uniform grid of `steps`.
        Returns [K,B,*S]: the states at `times` (points of the grid, descending); K = 1, the sample alone,
        without `times`.
        """
        if grid is None:
            if steps is None or steps < 1:
                raise ValueError(f"steps: expected at least 1, found {steps}")
            grid = uniform_grid(self.process, steps)
        index = None if times is None else _places(times, grid)
        on_device = grid.to(z.device, non_blocking=True)
        states = _solve(solver, self, cond, guidance_scale)(
            self.process.prior(z), on_device, index is not None
        )
        return states[None] if index is None else torch.stack([states[i] for i in index])


def _places(times: Sequence[float], grid: Tensor) -> list[int]:
    """Where the times stand on a grid (on the CPU)."""
    points = grid.tolist()
    places = [min(range(len(points)), key=lambda i: abs(points[i] - time)) for time in times]
    if any(abs(points[i] - time) > 1e-6 for i, time in zip(places, times, strict=True)):
        raise ValueError(f"times: {list(times)} are not all points of the solver's grid {points}")
    return places


def _solve(
    solver: str, model: Denoiser, cond: Cond, guidance_scale: float
) -> Callable[[Tensor, Tensor, bool], Tensor]:
    """(start, grid, keep the path) -> final state or path, with the named solver."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return model.velocity(x, t, cond, guidance_scale)

    def prediction(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, cond, guidance_scale)

    if solver == "euler":
        return lambda x, grid, path: euler(velocity, x, grid, return_path=path)
    if solver == "heun":
        singular = not model.process.regular_end
        return lambda x, grid, path: heun(velocity, x, grid, return_path=path, last_euler=singular)
    if solver == "ddim":
        return lambda x, grid, path: ddim(
            prediction, model.process, x, grid, kind=model.kind, return_path=path
        )
    raise ValueError(f"solver: found {solver!r}, expected one of {list(SOLVERS)}")
