"""The deterministic solvers by name, and what they cost."""

from __future__ import annotations

CALLS = {"euler": 1, "heun": 2, "ddim": 1, "dpmpp_2m": 1, "unipc": 1, "rk45": None}
"""Network calls a step; None: chosen by the solver."""


def network_calls(solver: str, steps: int, *, guided: bool = False, last_euler: bool = False) -> int | None:
    """Network calls that a sample of ``steps`` steps takes; None for ``rk45``, which chooses its own.

    Args:
        guided: with and without the condition, which doubles every call.
        last_euler: ``heun`` ends with an Euler step, which saves a call (``Denoiser.network_calls`` knows where).

    Raises:
        ValueError: an unknown solver.
    """
    if solver not in CALLS:
        raise ValueError(f"solver: found {solver!r}, expected one of {list(CALLS)}")
    calls = CALLS[solver]
    if calls is None:
        return None
    saved = 1 if solver == "heun" and last_euler else 0
    return (steps * calls - saved) * (2 if guided else 1)
