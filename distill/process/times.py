"""Time grids for samplers and time samplers for losses: pure functions, in this package's time (0 = data).

A grid is a 1-D float64 tensor [N + 1] from noisy to clean, falling strictly; it is built once, on the host, and ``grid``
finds it by name. A time sampler maps given uniform or normal draws to times or noise levels, so the caller decides where its
randomness comes from; it runs in training steps and reads no tensor on the host. A noise level is sigma / alpha, the time of
the ``EDM`` process: ``process.matching_time(EDM(), level)`` is that of another.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill.process.base import Process
from distill.process.edm import EDM, RHO, SIGMA_MAX, SIGMA_MIN
from distill.process.flow import Flow
from distill.process.indices import leading_indices, linspace_indices, student_indices, trailing_indices
from distill.process.tables import VPTable

MAX_STEPS = 100_000
"""The longest grid; more steps are taken for a mistake."""


def uniform_grid(process: Process, steps: int, device: torch.device | str | None = None) -> Tensor:
    """``steps + 1`` equally spaced times from ``process.t_max`` down to ``process.t_min``, float64.

    For a flow these are InstaFlow's network times divided by 1000 (1000 (1 - i/N), N of them and the end).

    Raises:
        ValueError: ``steps`` is below 1.
    """
    _check_steps(steps)
    return torch.linspace(process.t_max, process.t_min, steps + 1, dtype=torch.float64, device=device)


def default_grid(process: Process, steps: int, device: torch.device | str | None = None) -> Tensor:
    """The grid for where none is named: ``karras_grid`` for EDM, ``uniform_grid`` for every other process."""
    make = karras_grid if isinstance(process, EDM) else uniform_grid
    return make(process, steps, device=device)


def grid(name: str, process: Process, steps: int, **options: Any) -> Tensor:
    """The grid [steps + 1] that ``name`` names (a key of ``GRIDS``), with the options of its function.

    Raises:
        ValueError: an unknown name or option, or what the grid's function refuses.
    """
    if name not in GRIDS:
        raise ValueError(f"grid: found {name!r}, expected one of {sorted(GRIDS)}")
    known = [
        option for option in inspect.signature(GRIDS[name]).parameters if option not in ("process", "steps")
    ]
    for option in options:
        if option not in known:
            raise ValueError(f"grid {name!r}: {option}: no such key; expected {', '.join(known)}")
    return GRIDS[name](process, steps, **options)


def shifted_grid(
    process: Process, steps: int, factor: float = 3.0, device: torch.device | str | None = None
) -> Tensor:
    """The uniform grid of a flow moved towards noise by ``shift``: both ends stay.

    Raises:
        ValueError: another process than ``Flow``, ``factor`` not positive, or ``steps`` below 1.
    """
    if not isinstance(process, Flow):
        raise ValueError(f"process: found {process!r}, but only flow times can be shifted; expected Flow()")
    if not factor > 0:
        raise ValueError(f"factor: found {factor}, expected a positive number")
    return shift(uniform_grid(process, steps, device), factor)


def karras_levels(
    count: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Tensor:
    """EDM's noise levels (arXiv 2206.00364, eq. 5) from sigma_max down to sigma_min, [count] float64.

    (sigma_max^(1/rho) + i / (count - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho; both ends are exact, and a count of 1
    is sigma_max alone.

    Raises:
        ValueError: count below 1, not 0 < sigma_min < sigma_max, or rho is not positive.
    """
    if count < 1:
        raise ValueError(f"count: found {count}, expected at least 1 noise level")
    _check_levels(sigma_min, sigma_max, rho)
    fraction = torch.linspace(1, 0, count, dtype=torch.float64, device="cpu")
    levels = karras_level(fraction, sigma_min, sigma_max, rho)
    levels[-1] = sigma_min
    levels[0] = sigma_max
    return levels


def karras_grid(
    process: Process,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float | None = None,
    clean_end: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """EDM's grid for any process: the times of ``karras_levels``, then t_min.

    With ``clean_end`` these are ``steps`` noise levels and the process's t_min (EDM: exactly 0), without it ``steps + 1``
    levels, the last of them sigma_min (the discretisation of consistency models). Where t_min is itself a noise level (index
    0 of a table) and the levels reach it, nothing is appended: ``steps + 1`` levels end there.

    The defaults are those of the ``EDM`` process, brought into the range of other processes (Stable Diffusion's table: 0.029
    to 14.6). The grid starts at t_max exactly, also where that is noisier than the default sigma_max (a flow's pure noise),
    since a sampler starts there; with a ``sigma_max`` of one's own it starts at that level.

    Raises:
        ValueError: ``steps`` below 1, levels outside the range of the process, not 0 < sigma_min < sigma_max, or rho is not
        positive.
    """
    _check_steps(steps)
    ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64, device="cpu")
    cleanest, noisiest = torch.exp(-process.log_ratio(ends)).tolist()
    own = process if isinstance(process, EDM) else EDM()
    for name, level in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        if level is not None and not cleanest <= level <= noisiest:
            raise ValueError(
                f"{name}: found {level}, expected a noise level of {process!r}: {cleanest:.4g} .. {noisiest:.4g}"
            )
    low = max(own.sigma_min, cleanest) if sigma_min is None else sigma_min
    high = min(own.sigma_max, noisiest) if sigma_max is None else sigma_max
    append = clean_end and low > cleanest
    levels = karras_levels(steps if append else steps + 1, low, high, own.rho if rho is None else rho)
    times = levels if isinstance(process, EDM) else process.time_of(-torch.log(levels))
    if low == cleanest:
        times[-1] = process.t_min
    if sigma_max is None:
        times[0] = process.t_max
    if append:
        times = torch.cat([times, ends[:1]])
    return times.to(device)


def leading_grid(
    process: Process, steps: int, steps_offset: int = 1, device: torch.device | str | None = None
) -> Tensor:
    """``leading_indices`` of a table (Stable Diffusion: 981, 961, ..., 1 for 50 steps), then index 0.

    It does not start at pure noise, as those pipelines do not. Ending on index 0 is diffusers' ``set_alpha_to_one=False``;
    ``ddim(final="x0")`` ends on clean data instead. An offset of 0 is refused: its last time would be the end itself.

    Raises:
        ValueError: no table, more steps than fit, or an offset outside its range.
    """
    return _index_grid(leading_indices(_table_size("leading", process), steps, steps_offset), device)


def trailing_grid(process: Process, steps: int, device: torch.device | str | None = None) -> Tensor:
    """``trailing_indices`` of a table (Stable Diffusion: 999, 979, ..., 19 for 50 steps), then index 0.

    Raises:
        ValueError: no table, or so many steps that the last time would be the end itself.
    """
    return _index_grid(trailing_indices(_table_size("trailing", process), steps), device)


def linspace_grid(process: Process, steps: int, device: torch.device | str | None = None) -> Tensor:
    """``linspace_indices`` of a table for ``steps + 1``: the last of them is index 0, where this grid ends.

    Raises:
        ValueError: no table, or more steps than it has intervals.
    """
    _check_steps(steps)
    indices = linspace_indices(_table_size("linspace", process), steps + 1)
    return _index_grid(indices[:-1], device)


def student_grid(process: Process, steps: int, device: torch.device | str | None = None) -> Tensor:
    """``student_indices`` of a table, the noise levels of progressive distillation, then index 0.

    Raises:
        ValueError: no table, or so many steps that the last time would be the end itself.
    """
    return _index_grid(student_indices(_table_size("student", process), steps), device)


GRIDS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform_grid,
    "shifted": shifted_grid,
    "karras": karras_grid,
    "leading": leading_grid,
    "trailing": trailing_grid,
    "linspace": linspace_grid,
    "student": student_grid,
}
"""Name -> (process, steps, **options) -> [steps + 1] float64."""


def shift(t: Tensor, factor: float) -> Tensor:
    """Flow times moved towards noise: factor t / (1 + (factor - 1) t) (SD3, arXiv 2403.03206, eq. 23).

    ``factor`` is sqrt of the ratio of resolutions; 1 changes nothing, 3 is SD3's sampler. t in [0, 1], any
    shape.
    """
    return factor * t / (1 + (factor - 1) * t)


def uniform_times(u: Tensor, t_min: float, t_max: float) -> Tensor:
    """u ~ U[0, 1] of any shape -> times uniform in [t_min, t_max]."""
    return t_min + (t_max - t_min) * u


def logit_normal(n: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """n ~ N(0, 1) of any shape -> sigmoid(mean + std n) in (0, 1) (arXiv 2403.03206, eq. 19).

    A positive ``mean`` favours noise. Libraries that call the case (0, 1) "lognormal" use tau = 1 - t, i.e.
    -n here.
    """
    return torch.sigmoid(mean + std * n)


def truncated_exponential(u: Tensor, rate: float = 4.0) -> Tensor:
    """u ~ U[0, 1] -> the exponential of ``rate`` truncated to [0, 1], by its quantile function.

    -ln(1 - u (1 - e^-rate)) / rate. Densest at 0; u = 0 gives 0 and u = 1 gives 1.
    """
    return -torch.log1p(u * math.expm1(-rate)) / rate


def u_shaped(u: Tensor, rate: float = 4.0) -> Tensor:
    """u ~ U[0, 1] -> even mixture of ``truncated_exponential`` and its mirror (arXiv 2405.20320).

    One draw decides both the side and the place: q(2u) for u <= 1/2, else 1 - q(2 - 2u) with q the quantile
    above, so that u_shaped(1 - u) = 1 - u_shaped(u) and the direction of time does not matter.
    """
    clean_half = u <= 0.5
    place = truncated_exponential(torch.where(clean_half, 2 * u, 2 - 2 * u), rate)
    return torch.where(clean_half, place, 1 - place)


def skewed(n: Tensor, mean: float = -1.2, std: float = 1.2, t_max: float = 1 - 1e-4) -> Tensor:
    """n ~ N(0, 1) -> EDM's log-normal noise level s = exp(mean + std n) as a flow time, s / (1 + s) <= t_max.

    This is flow_matching's "skewed" sampler (there tau = 1 - t = 1 / (1 + s), clipped below at 1e-4);
    densities of arXiv 2206.00364, table 1.
    """
    return torch.sigmoid(mean + std * n).clamp(max=t_max)


def lognormal_level(n: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """n ~ N(0, 1) of any shape -> noise levels exp(mean + std n) (arXiv 2206.00364, table 1).

    (-1.2, 1.2) is EDM's training distribution; consistency training uses (-1.1, 2.0), continuous-time models (-1.0, 1.4).
    """
    return torch.exp(mean + std * n)


def karras_level(
    fraction: Tensor, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Tensor:
    """Fraction in [0, 1] of any shape -> noise level: 0 is sigma_min, 1 sigma_max, linear in sigma^(1/rho) between them."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + fraction * (high - low)) ** rho


def sid_level(
    u: Tensor,
    t_max: float = 800.0,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> Tensor:
    """u ~ U[0, 1) of any shape -> noise levels of SiD's generator update (arXiv 2404.04057): ``karras_level(u t_max / 1000)``.

    ``t_max`` removes the HIGH noise end: u = 0 is always sigma_min, and u = 1 is 80 for t_max 1000, 24.4 for 800.

    Raises:
        ValueError: t_max outside (0, 1000], not 0 < sigma_min < sigma_max, or rho is not positive.
    """
    if not 0 < t_max <= 1000:
        raise ValueError(f"t_max: found {t_max}, expected a number in (0, 1000]")
    _check_levels(sigma_min, sigma_max, rho)
    return karras_level(u * (t_max / 1000), sigma_min, sigma_max, rho)


def uniform_index(u: Tensor, low: int, high: int) -> Tensor:
    """u ~ U[0, 1] of any shape -> integers uniform on low .. high, both included, int64.

    Raises:
        ValueError: ``low`` is above ``high``.
    """
    if low > high:
        raise ValueError(f"low, high: found {low} and {high}, expected low <= high")
    # A draw just below 1 rounds up to the count in float32.
    return (low + torch.floor(u.double() * (high - low + 1)).long()).clamp(low, high)


def karras_index_level(
    u: Tensor,
    low: int = 20,
    high: int = 980,
    count: int = 1000,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
) -> Tensor:
    """u ~ U[0, 1] of any shape -> noise level at a uniform index low .. high of DMD2's table, float64 (arXiv 2405.14867).

    The table is ``karras_level(i / (count - 1))``, i = 0 .. count - 1, rising: 20 .. 980 are the levels 0.0032 .. 72 of the
    generator's update, 0 .. 999 those of the fake score and of the discriminator.

    Raises:
        ValueError: not 0 <= low <= high < count, not 0 < sigma_min < sigma_max, or rho is not positive.
    """
    if not 0 <= low <= high < count:
        raise ValueError(f"low, high: found {low} and {high}, expected 0 <= low <= high < {count}")
    _check_levels(sigma_min, sigma_max, rho)
    return karras_level(uniform_index(u, low, high).double() / max(count - 1, 1), sigma_min, sigma_max, rho)


def lognormal_step_weights(levels: Tensor, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """Probability of each step of a grid of noise levels [N], falling: [N - 1] float64, sum 1 (arXiv 2310.14189, eq. 10).

    Step i, from level i to level i + 1, has the mass of a log-normal distribution between them, erf((ln s_i - mean) /
    (sqrt(2) std)) - erf((ln s_{i+1} - mean) / (sqrt(2) std)), normalised over the grid. (The paper indexes rising levels.) A
    last level of 0 is allowed.

    Raises:
        ValueError: fewer than two levels, or ``std`` is not positive.
    """
    if levels.dim() != 1 or len(levels) < 2:
        raise ValueError(f"levels: found shape {tuple(levels.shape)}, expected [N] with N >= 2")
    if not std > 0:
        raise ValueError(f"std: found {std}, expected a positive number")
    mass = -torch.erf((torch.log(levels.double()) - mean) / (math.sqrt(2) * std)).diff()
    return mass / mass.sum()


def index_of(u: Tensor, weights: Tensor) -> Tensor:
    """u ~ U[0, 1] of any shape -> index i with probability weights[i] (weights [N], sum 1), by the quantile function."""
    edges = torch.cumsum(weights, 0)[:-1]
    return torch.searchsorted(edges, u.to(edges.dtype).contiguous(), right=True)


def _check_steps(steps: int) -> None:
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"a grid needs at least one step and at most {MAX_STEPS}, got {steps}")


def _check_levels(sigma_min: float, sigma_max: float, rho: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"sigma_min, sigma_max: found {sigma_min} and {sigma_max}, need 0 < sigma_min < sigma_max"
        )
    if not rho > 0:
        raise ValueError(f"rho: found {rho}, expected a positive number")


def _table_size(name: str, process: Process) -> int:
    if not isinstance(process, VPTable):
        raise ValueError(f"grid {name!r}: found {process!r}, expected a table of noise levels (a VPTable)")
    return process.num_timesteps


def _index_grid(indices: Tensor, device: torch.device | str | None) -> Tensor:
    """Falling indices above 0, and the end 0."""
    if indices[-1] <= 0:
        raise ValueError(
            f"steps: found {len(indices)}, of which the last starts at index 0, where the grid ends; expected fewer, or a "
            "larger steps_offset"
        )
    return torch.cat([indices.double(), torch.zeros(1, dtype=torch.float64, device="cpu")]).to(device)
