"""A net given meaning: which process its input lives in and what its output predicts. Guidance is applied
here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.models.boundary import Boundary
from distill.models.conditions import Conditions, Nothing, of_net
from distill.models.decoder import Decoder, Points
from distill.models.guidance import guide
from distill.models.model import Model
from distill.process.base import Process, at_least_float32
from distill.process.times import default_grid
from distill.samplers.adaptive import rk45
from distill.samplers.multistep import dpmpp_2m, unipc
from distill.samplers.ode import ddim, euler, heun
from distill.samplers.solvers import CALLS, network_calls

SOLVERS = tuple(CALLS)


class Denoiser(Model):
    """`net(x_t, t, cond)` read as a prediction of `kind` under `process`; further attributes as of `Model`.

    Args:
        net: [B,*S], times [B], Cond -> [B,*S].
        process: the noise process that the net was trained under.
        kind: "x0", "eps", "v" or "velocity": what the net's output is.
        sample_shape: S.
        conditions: what the net is conditioned on; None: those of `models.conditions.of_net`, else nothing.
        guidable: trained with dropped conditions.
        coupling: one of `models.model.COUPLINGS`; a score can be read off "independent" alone.
        boundary: turns the predicted x0 into a consistency function; None: none is needed.
        decoder: what samples are to a user.

    `sigma_data` is the standard deviation of the data that the net's preconditioning or the process assumes, None where
    neither does; a boundary of another is refused.
    """

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        kind: str,
        sample_shape: Sequence[int],
        *,
        conditions: Conditions | None = None,
        guidable: bool = False,
        coupling: str = "independent",
        boundary: Boundary | None = None,
        decoder: Decoder = Points(),  # noqa: B008 (immutable)
    ) -> None:
        try:
            process.check_kind(kind)
        except ValueError as error:
            raise ValueError(f"kind: {error}") from None
        end = torch.tensor([process.t_max], dtype=torch.float64, device="cpu")
        if kind == "eps" and float(process.alpha(end)) == 0:
            raise ValueError(
                f"kind: found 'eps', but under {process!r} alpha is 0 at t_max, where predicted noise holds no "
                "information about the data; expected 'x0', 'v' or 'velocity'"
            )
        known = of_net(net)
        if conditions is not None and known is not None and conditions != known:
            raise ValueError(f"conditions: found {conditions.words()}, but the net takes {known.words()}")
        super().__init__(
            net, process, sample_shape, conditions or known or Nothing(), decoder, coupling, guidable
        )
        self.kind = kind
        self.sigma_data = sigma_data_of(net, process)
        if boundary is not None and boundary.form == "cm":
            check_sigma_data(self, boundary.sigma_data, "boundary.sigma_data")
        self.boundary = boundary

    def config(self) -> dict[str, Any]:
        """See `Model`; raises like `net_config`."""
        return {
            "_target_": f"{Denoiser.__module__}.{Denoiser.__qualname__}",
            "net": self.net_config(),
            "process": self.process.config(),
            "kind": self.kind,
            "sample_shape": list(self.sample_shape),
            "conditions": self.conditions.config(),
            "decoder": self.decoder.config(),
            "guidable": self.guidable,
            "coupling": self.coupling,
            "boundary": None if self.boundary is None else self.boundary.to_dict(),
        }

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: float | Tensor = 1.0) -> Tensor:
        """The prediction [B,*S] of the net's own kind at times t [B], guided: u + g (c - u), in one batched
        forward."""
        if isinstance(guidance_scale, float | int) and guidance_scale == 1.0:
            return self._call(x_t, t, cond)
        if self.embeds_guidance:
            raise ValueError(
                f"guidance_scale: found {guidance_scale}, but this model applies the guidance itself; expected 1, and "
                "guidance_w = guidance_scale - 1"
            )
        if not self.guidable:
            raise ValueError(
                f"guidance_scale: found {guidance_scale}, but this model was not trained with a null "
                "condition; expected 1"
            )
        conditional, unconditional = self.branches(x_t, t, cond)
        return guide(unconditional, conditional, guidance_scale)

    def _call(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The net's output; it gets its times in the precision of its input, not in the solvers' float64."""
        return self.net(x_t, t.to(at_least_float32(x_t).dtype), cond)

    def branches(self, x_t: Tensor, t: Tensor, cond: Cond, *, guided: bool = True) -> tuple[Tensor, Tensor]:
        """Predictions [B,*S] of the net's own kind with and without the condition, in one batched forward; where not
        `guided`, the first one twice, in a forward of one batch."""
        if not guided:
            out = self._call(x_t, t, cond)
            return out, out
        both = self._call(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.cat(cond.null()))
        conditional, unconditional = both.chunk(2)
        return conditional, unconditional

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
        if self.boundary is None:
            return self.process.convert(self.kind, out, x_t, t, kind)
        x0 = self.process.convert(self.kind, out, x_t, t, "x0")
        return self.process.convert("x0", self.boundary.apply(self.process, x0, x_t, t), x_t, t, kind)

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
        cond: Cond | None = None,
        *,
        solver: str = "euler",
        steps: int | None = None,
        guidance_scale: float | Tensor = 1.0,
        grid: Tensor | None = None,
        times: Sequence[float] | None = None,
    ) -> Tensor:
        """Carry noise z [B,*S] along the probability-flow ODE; `guidance_scale` is one scale, or one a sample [B].

        The ODE is solved on `grid` ([steps + 1] descending) or, without one, on the process's default grid of `steps`.
        Returns [K,B,*S]: the states at `times` (points of the grid, descending); K = 1, the sample alone,
        without `times`.

        `solver` is one of `SOLVERS`. "rk45" takes steps by its tolerance (1e-5) over the whole batch: `steps` and `grid` only
        set where states are returned. Where the velocity cannot be had at t_min, "heun" ends with an Euler step.
        """
        cond = Cond.nothing(len(z)) if cond is None else cond
        if grid is None:
            if steps is None or steps < 1:
                raise ValueError(f"steps: expected at least 1, found {steps}")
            grid = default_grid(self.process, steps)
        index = None if times is None else _places(times, grid)
        states = _solve(solver, self, cond, guidance_scale)(self.process.prior(z), grid, index is not None)
        return states[None] if index is None else torch.stack([states[i] for i in index])

    def check_transport(self, guidance_scale: float = 1.0, solver: str | None = None) -> None:
        """See `Model`; a net that takes the guidance as an input is no teacher."""
        super().check_transport(guidance_scale, solver)
        if self.embeds_guidance:
            raise ValueError("guidance_w: the net takes the guidance as an input; expected a model without")

    def calls(self, solver: str, steps: int, guidance_scale: float = 1.0) -> int | None:
        """See `Model`; guidance counts twice, and "rk45" chooses its own."""
        return network_calls(solver, steps, guided=guidance_scale != 1, last_euler=not velocity_at_end(self))


def sigma_data_of(net: nn.Module, process: Process) -> float | None:
    """The standard deviation of the data that a net and its process assume, or None.

    Raises:
        ValueError: they assume different ones.
    """
    found = {
        type(part).__name__: float(value)
        for part in (*net.modules(), process)
        if isinstance(value := getattr(part, "sigma_data", None), float | int)
    }
    if len(set(found.values())) > 1:
        values = " and ".join(f"{value} of {name}" for name, value in found.items())
        raise ValueError(f"sigma_data: found {values}, expected one standard deviation of the data")
    return next(iter(found.values()), None)


def check_sigma_data(model: Denoiser, sigma_data: float, where: str = "sigma_data") -> None:
    """Refuse a standard deviation of the data that is not the one that the model's net or process assumes.

    Raises:
        ValueError: starts with `where`, names both.
    """
    if model.sigma_data is not None and sigma_data != model.sigma_data:
        raise ValueError(
            f"{where}: found {sigma_data}, but the model's own sigma_data is {model.sigma_data}; expected the same"
        )


def check_same_samples(student: Model, teacher: Model) -> None:
    """Refuse a teacher whose samples or times mean something else to the student.

    Raises:
        ValueError: names `teacher`.
    """
    if teacher.process.config() != student.process.config():
        raise ValueError(
            f"teacher: lives under {teacher.process!r}, the student under {student.process!r}; expected one process"
        )
    check_same("teacher", teacher, "student", student)


def check_same(role: str, model: Model, other_role: str, other: Model) -> None:
    """Raise ValueError naming `role` where two models differ in the shape of samples or in their conditions."""
    if model.sample_shape != other.sample_shape:
        raise ValueError(
            f"{role}.sample_shape: found {model.sample_shape}, expected the {other_role}'s {other.sample_shape}"
        )
    if model.conditions != other.conditions:
        raise ValueError(
            f"{role}.conditions: found {model.conditions.words()}, expected the {other_role}'s {other.conditions.words()}"
        )


def _places(times: Sequence[float], grid: Tensor) -> list[int]:
    """Indices of the times on a grid (on the CPU)."""
    points = grid.tolist()
    places = [min(range(len(points)), key=lambda i: abs(points[i] - time)) for time in times]
    if any(abs(points[i] - time) > 1e-6 for i, time in zip(places, times, strict=True)):
        raise ValueError(f"times: {list(times)} are not all points of the solver's grid {points}")
    return places


def _solve(
    solver: str, model: Denoiser, cond: Cond, guidance_scale: float | Tensor
) -> Callable[[Tensor, Tensor, bool], Tensor]:
    """(start, grid, keep the path) -> final state or path, with the named solver."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return model.velocity(x, t, cond, guidance_scale)

    kind = model.kind if model.boundary is None else "x0"

    def prediction(x: Tensor, t: Tensor) -> Tensor:
        return model.predict(kind, x, t, cond, guidance_scale)

    if solver == "euler":
        return lambda x, grid, path: euler(velocity, x, grid, return_path=path)
    if solver == "heun":
        singular = not velocity_at_end(model)
        return lambda x, grid, path: heun(velocity, x, grid, return_path=path, last_euler=singular)
    if solver == "rk45":
        return lambda x, grid, path: rk45(prediction, model.process, x, grid, kind=kind, return_path=path)[0]
    by_prediction: dict[str, Callable[..., Tensor]] = {"ddim": ddim, "dpmpp_2m": dpmpp_2m, "unipc": unipc}
    if solver in by_prediction:
        return lambda x, grid, path: by_prediction[solver](
            prediction, model.process, x, grid, kind=kind, return_path=path
        )
    raise ValueError(f"solver: found {solver!r}, expected one of {list(SOLVERS)}")


def velocity_at_end(model: Denoiser) -> bool:
    """Whether a model's velocity can be had at t_min: not where it is singular, nor from predicted data where no noise is
    left."""
    end = torch.tensor([model.process.t_min], dtype=torch.float64, device="cpu")
    clean = float(model.process.sigma(end)) == 0
    return model.process.regular_end and not (clean and (model.kind == "x0" or model.boundary is not None))
