"""The integer times of step counts on a table of T noise levels, by the rules in use: [steps] int64, falling.

These are the times a network is called at. ``distill.process.times`` makes grids of them, which also name the end.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leading_indices(num_timesteps: int, steps: int, steps_offset: int = 0) -> Tensor:
    """diffusers' "leading" spacing: i (T // steps) + steps_offset, i = steps - 1 .. 0.

    Stable Diffusion has the offset 1: 981, 961, ..., 1 for 50 steps of 1000, which starts below pure noise.

    Raises:
        ValueError: ``steps`` outside 1 .. T, or an offset that leaves the table.
    """
    _check(num_timesteps, steps)
    stride = num_timesteps // steps
    room = num_timesteps - 1 - (steps - 1) * stride
    if not 0 <= steps_offset <= room:
        raise ValueError(f"steps_offset: found {steps_offset}, expected 0 .. {room} for {steps} steps")
    return _falling([i * stride + steps_offset for i in range(steps)])


def trailing_indices(num_timesteps: int, steps: int) -> Tensor:
    """diffusers' "trailing" spacing: round(T - i T / steps) - 1, i = 0 .. steps - 1; it starts at T - 1.

    arXiv 2305.08891, table 2. Equal to ``student_indices`` but for the rounding of exact halves. For a few counts (61 of 1000
    is the first) diffusers itself returns one index too many, -1; here ``steps`` means ``steps``.

    Raises:
        ValueError: ``steps`` outside 1 .. T.
    """
    _check(num_timesteps, steps)
    # numpy.arange counts in multiples of the difference of its first two numbers, rounded: so do the halves here.
    stride = num_timesteps - (num_timesteps - num_timesteps / steps)
    return _falling([round(num_timesteps - i * stride) - 1 for i in reversed(range(steps))])


def linspace_indices(num_timesteps: int, steps: int) -> Tensor:
    """diffusers' "linspace" spacing: ``steps`` equally spaced numbers from T - 1 to 0, both included, rounded.

    Raises:
        ValueError: ``steps`` outside 2 .. T (a single one would be 0 there: the clean end).
    """
    _check(num_timesteps, steps, least=2)
    # Multiples of the rounded spacing, as numpy.linspace has them: exact halves round as they do there.
    spacing = (num_timesteps - 1) / (steps - 1)
    return _falling([round(i * spacing) for i in range(steps - 1)] + [num_timesteps - 1])


def student_indices(num_timesteps: int, steps: int) -> Tensor:
    """Progressive distillation's noise levels: round((j + 1) T / steps) - 1, j = steps - 1 .. 0.

    Always with T - 1, and those of a student of ``steps`` are every second of its teacher's, of ``2 steps``. For 50 steps of
    1000 it is the grid of latent consistency models: 999, 979, ..., 19.

    Raises:
        ValueError: ``steps`` outside 1 .. T.
    """
    _check(num_timesteps, steps)
    return _falling([round((j + 1) * num_timesteps / steps) - 1 for j in range(steps)])


def _check(num_timesteps: int, steps: int, least: int = 1) -> None:
    if not least <= steps <= num_timesteps:
        raise ValueError(f"steps: found {steps}, expected {least} .. {num_timesteps}")


def _falling(rising: list[int]) -> Tensor:
    return torch.tensor(rising[::-1], dtype=torch.int64, device="cpu")
