"""How straight a flow is: S(v) of rectified flow (arXiv 2209.03003, section 2.2)."""

from __future__ import annotations

from torch import Tensor

from distill.process.base import at_least_float32


def straightness(path: Tensor, velocities: Tensor) -> tuple[Tensor, Tensor]:
    """(S, S_norm), scalars: S = mean over steps and samples of |(z - x0) - v_i|^2, summed over dims.

    ``path`` [N + 1, B, *S] runs on a uniform grid from noise z at t = 1 to data x0 at t = 0 and
    ``velocities`` [N, B, *S] are dx/dt at the left points (``rollout`` returns both). S_norm = S / mean |z -
    x0|^2 is free of scale. On such a grid S = mean |v_i|^2 - mean |z - x0|^2 exactly. The value depends on N
    (it falls towards the integral as N grows), so report N beside it; 10 is the least useful N, 100 the
    default of the specification.

    Raises:
        ValueError: N < 2, where S is zero whatever the field; or shapes that do not belong together.
    """
    steps = velocities.shape[0]
    if path.shape != (steps + 1, *velocities.shape[1:]):
        raise ValueError(
            f"a path [N+1, B, *S] needs velocities [N, B, *S]: got {tuple(path.shape)} and "
            f"{tuple(velocities.shape)}"
        )
    if steps < 2:
        raise ValueError(
            f"straightness is identically zero for one Euler step; it needs N >= 2, got N = {steps}"
        )
    path, velocities = at_least_float32(path), at_least_float32(velocities)
    chord = path[0] - path[-1]
    deviation = (chord - velocities).square().flatten(2).sum(2).mean()
    return deviation, deviation / chord.square().flatten(1).sum(1).mean()
