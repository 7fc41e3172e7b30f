"""Boundary conditions of consistency functions: what makes f(x, t) the identity at the clean end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from distill.process.base import Process, at_least_float32, combine
from distill.samplers.fewstep import lcm_boundary

FORMS = ("cm", "lcm")


@dataclass(frozen=True)
class Boundary:
    """f(x_t, t) from a predicted x0; saved with the model, applied wherever it predicts x0.

    Attributes:
        form: "cm": the identity at the noise level sigma_min (arXiv 2303.01469, appendix C), for any process through its
            noise level s = sigma / alpha and its state in EDM's coordinates x / alpha:

                f = a x_t + b x0,  b = (s - sigma_min) / s,  a = [c_skip(s - sigma_min) - b c_skip(s)] / alpha,

            with c_skip(s) = sd^2 / (s^2 + sd^2): the paper's scalings written over a prediction of x0 in place of F.
            "lcm": c_skip(t) x_t + c_out(t) x0 over the times of a table (arXiv 2310.04378).
        sigma_min, sigma_data: of "cm". timestep_scaling: of "lcm".
    """

    form: str
    sigma_min: float = 0.002
    sigma_data: float = 0.5
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form: found {self.form!r}, expected one of {list(FORMS)}")
        for name in ("sigma_min", "sigma_data", "timestep_scaling"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected a positive number")

    def apply(self, process: Process, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """f [B,*S] from the predicted x0 [B,*S] at (x_t, t), t [B]."""
        if self.form == "lcm":
            return lcm_boundary(x0, x_t, t, self.timestep_scaling, self.sigma_data)
        time = at_least_float32(t)
        alpha, sigma = process.alpha(time), process.sigma(time)
        # Times alpha throughout, so that nothing is infinite where alpha is 0; in tensors of one dtype, so that at the
        # noise level sigma_min itself `above` is exactly 0.
        above = sigma - alpha * torch.full_like(alpha, self.sigma_min)
        b = above / sigma
        square = self.sigma_data**2
        skip = alpha * square / (above**2 + square * alpha**2)
        own = alpha * square / (sigma**2 + square * alpha**2)
        return combine(skip - b * own, x_t, b, x0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)
