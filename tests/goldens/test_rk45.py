"""RK45 against rectified flow's scipy solver (data/rectified_flow/README.md, ``euler_rollouts``): float64 to 1e-8."""

from __future__ import annotations

import torch
from conftest import Load
from translate import close, flip_field, flip_time

from distill.process.base import expand
from distill.process.flow import Flow
from distill.samplers.adaptive import rk45

FAMILY = "rectified_flow"
START = 1e-3
"""RectifiedFlow's smallest tau, the README's eps."""


def test_rk45_from_eps(load: Load) -> None:
    """The same steps as scipy's on the flattened batch, so the same numbers, far inside rtol of the exact solution."""
    file = load(FAMILY, "euler_rollouts")
    A, b, c = file["A"], file["b"], file["c"]
    field = flip_field(lambda x, tau: x @ A.T + b + expand(tau, x) * c)
    times = flip_time(torch.tensor([START, 1.0], dtype=torch.float64))
    final, calls = rk45(field, Flow(), file["x0"], times, kind="velocity")
    close(final, file["rk45_rtol1e-5_from_eps"])
    close(final, file["exact_from_eps"], 1e-4, 1e-4)
    assert calls >= 14  # two for the first size and six a step
    exact, more = rk45(field, Flow(), file["x0"], times, kind="velocity", rtol=1e-11, atol=1e-11)
    close(exact, file["exact_from_eps"])
    assert more > calls
    # Alone, a sample is solved as well, by steps of its own.
    alone, _ = rk45(field, Flow(), file["x0"][:1], times, kind="velocity")
    close(alone, file["exact_from_eps"][:1], 1e-4, 1e-4)
