"""What samplers share: integration along a grid of times, the dtype rule, and the forms of noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.process.base import Process, at_least_float32

Field = Callable[[Tensor, Tensor], Tensor]
"""(x [B, *S], t [B]) -> [B, *S]: a velocity dx/dt, or the prediction of a network."""
OnState = Callable[[int, Tensor], None]
Noise = Tensor | Callable[[int], Tensor]
"""Standard normal numbers of step i = 0 .. N - 1: a tensor [N, B, *S], or a function i -> [B, *S]. Samplers draw nothing."""
Step = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(i, x at t, t, s) -> x at s: the step from ``times[i]`` = t to ``times[i + 1]`` = s, both scalars."""


def per_sample(t: Tensor, x: Tensor) -> Tensor:
    """One time for the whole batch, as the [B] that networks and processes take."""
    return t.expand(x.shape[0])


def integrate(
    step: Step, x: Tensor, times: Tensor, on_state: OnState | None = None, return_path: bool = False
) -> Tensor:
    """Apply ``step`` along ``times`` [N + 1]: the final state [B, *S], or all [N + 1, B, *S] with ``return_path``.

    The state is kept in at least float32 whatever a step returns; ``on_state(i, state)`` is called for i = 0 .. N.

    Raises:
        ValueError: ``times`` is not 1-D or has fewer than two entries.
    """
    count = check_times(times)
    x = at_least_float32(x)
    times = times.to(x.device, non_blocking=True)
    path = [x]
    for i in range(count + 1):
        if i > 0:
            x = step(i - 1, x, times[i - 1], times[i]).to(x.dtype)
            if return_path:
                path.append(x)
        if on_state is not None:
            on_state(i, x)
    return torch.stack(path) if return_path else x


def check_times(times: Tensor, *, descending: bool = False) -> int:
    """The number N of steps of a grid [N + 1].

    ``descending`` requires times that fall strictly; it is checked for times on the CPU alone, so that nothing waits for a
    device.

    Raises:
        ValueError: ``times`` is not 1-D, has fewer than two entries, or does not fall where it must.
    """
    if times.dim() != 1 or times.shape[0] < 2:
        raise ValueError(f"times must be 1-D with at least two entries, got shape {tuple(times.shape)}")
    if descending and times.device.type == "cpu" and not bool((times[1:] < times[:-1]).all()):
        raise ValueError(f"times: expected strictly descending times (noise to data), found {times.tolist()}")
    return times.shape[0] - 1


def check_final(final: str) -> None:
    """Raise ValueError unless ``final`` is "x0" (the last prediction of the data) or "state" (the one at ``times[-1]``)."""
    if final not in ("x0", "state"):
        raise ValueError(f"final must be 'x0' or 'state', got {final!r}")


def as_x0(predict: Field, process: Process, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """(x [B, *S], scalar t) -> the predicted data, in the dtype of x, of a network ``predict`` of ``kind``."""

    def x0(x: Tensor, t: Tensor) -> Tensor:
        here = per_sample(t, x)
        return process.convert(kind, predict(x, here), x, here, "x0").to(x.dtype)

    return x0


def noise_of(noise: Noise, x: Tensor, steps: int) -> Callable[[int], Tensor]:
    """``noise`` as a function of the step, its values checked and brought to the device and dtype of ``x``.

    Raises:
        ValueError: a tensor that is not [steps, *x.shape], or a function that returns another shape than that of ``x``.
    """
    if isinstance(noise, Tensor) and noise.shape != (steps, *x.shape):
        raise ValueError(f"noise: expected [N, B, *S] = {[steps, *x.shape]}, found {list(noise.shape)}")

    def draw(i: int) -> Tensor:
        found = noise[i] if isinstance(noise, Tensor) else noise(i)
        if found.shape != x.shape:
            raise ValueError(f"noise({i}): expected {list(x.shape)}, found {list(found.shape)}")
        return found.to(x.device, at_least_float32(x).dtype, non_blocking=True)

    return draw
