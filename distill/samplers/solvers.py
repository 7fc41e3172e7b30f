"""The deterministic solvers by name, and what they cost."""

from __future__ import annotations

CALLS = {"euler": 1, "heun": 2, "ddim": 1, "dpmpp_2m": 1, "unipc": 1, "rk45": None}
"""Network calls a step; None: chosen by the solver."""


def calls_per_step(solver: str) -> int | None:
    """Network calls that a step of ``solver`` makes; None for ``rk45``, which chooses its own.

    ``heun`` saves one call of a whole run where it ends with an Euler step (``last_euler``). Guidance doubles every call.

    Raises:
        ValueError: an unknown solver.
    """
    if solver not in CALLS:
        raise ValueError(f"solver: found {solver!r}, expected one of {list(CALLS)}")
    return CALLS[solver]
