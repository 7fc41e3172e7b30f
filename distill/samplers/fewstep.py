"""Few-step samplers: predict the data, noise it again to the next level, repeat. Pure, differentiable in the initial noise.

Arguments are those of ``samplers.ode``: ``x`` [B, *S] is the state at ``times[0]``; ``times`` [N + 1] descends; the network is
called N times, at all of them but the last, where the sample lies. Fresh noise is passed in as ``noise(i)`` [B, *S], the noise
added after step i = 0 .. N-2, so a sample depends on its own numbers alone and its caller owns the generators.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from distill.process.base import Process, combine
from distill.process.indices import student_indices
from distill.process.scalings import lcm_scalings
from distill.samplers.integrate import Field, Noise, OnState, integrate, per_sample
from distill.samplers.ode import ddim


def few_step(
    predict_x0: Field,
    process: Process,
    x: Tensor,
    times: Tensor,
    noise: Noise | None = None,
    *,
    noise_scale: float = 1.0,
    noise_floor: float = 0.0,
    on_state: OnState | None = None,
    return_path: bool = False,
) -> Tensor:
    """x0 = predict_x0(x, t_i); x = alpha x0 + sigma noise_scale noise(i) at t_{i+1}; the last x0 is the sample.

    Multistep consistency sampling (arXiv 2303.01469, algorithm 1) under any process. ``noise=None`` is the deterministic
    variant: the noise that x and x0 imply is used again (DDIM).

    Args:
        noise_scale: multiplies the fresh noise; 1 changes no bit.
        noise_floor: the level sigma / alpha of the noise that the predictions still hold, which the fresh noise has not to
            bring: sqrt(sigma^2 - (alpha floor)^2) of it is added, none below the floor. Consistency models that are the
            identity at sigma_min = 0.002 use 0.002; ECT (arXiv 2406.14548), flows and latent consistency models 0.

    Raises:
        ValueError: a negative scale or floor, either of them without ``noise``, or what ``samplers.ode`` refuses.
    """
    if noise_scale < 0 or noise_floor < 0:
        raise ValueError(
            f"noise_scale, noise_floor: found {noise_scale} and {noise_floor}, expected at least 0"
        )
    if noise is None:
        if (noise_scale, noise_floor) != (1.0, 0.0):
            raise ValueError("noise_scale, noise_floor: need fresh noise, but noise is None (deterministic)")
        return ddim(predict_x0, process, x, times, on_state=on_state, return_path=return_path)
    steps = len(times) - 1

    def step(i: int, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x0 = predict_x0(x, per_sample(t, x))
        if i == steps - 1:
            return x0
        there = per_sample(s.double(), x)
        alpha = process.alpha(there)
        variance = process.sigma(there).square() - (alpha * noise_floor).square()
        return combine(
            alpha,
            x0,
            noise_scale * variance.clamp(min=0).sqrt(),
            noise[i] if isinstance(noise, Tensor) else noise(i),
        )

    return integrate(step, x, times, on_state, return_path)


def renoise(process: Process, x: Tensor, s: Tensor, m: Tensor, noise: Tensor) -> Tensor:
    """Take a state x [B, *S] from time s back up to a noisier m, both [B], with fresh noise [B, *S].

    x_m = (alpha_m / alpha_s) x_s + sqrt(sigma_m^2 - (alpha_m / alpha_s)^2 sigma_s^2) noise, the process's own transition: the
    second half of a step of guided distillation's stochastic sampler (arXiv 2210.03142). The root is taken as sigma_m
    sqrt(1 - SNR_m / SNR_s), without cancellation; s >= m gives NaN.
    """
    s, m = s.double(), m.double()
    lost = torch.expm1(2 * (process.log_ratio(m) - process.log_ratio(s)))
    return combine(process.alpha(m) / process.alpha(s), x, process.sigma(m) * torch.sqrt(-lost), noise)


def multistep_times(levels: Tensor, indices: Sequence[int]) -> Tensor:
    """Times of a multistep sampler as places on a grid of levels [K], descending: (0, 22, 39) of ``karras_levels(40)``.

    The last place is the sampler's end, so three places are two network calls.

    Raises:
        ValueError: fewer than two places, the first not 0, not rising, or outside the grid.
    """
    places = list(indices)
    rising = all(a < b for a, b in itertools.pairwise(places))
    if len(places) < 2 or places[0] != 0 or not rising or places[-1] >= len(levels):
        raise ValueError(
            f"indices: found {places}, expected at least two rising places from 0 up to {len(levels) - 1}"
        )
    return levels[places]


def spread_times(levels: Tensor, counts: Sequence[int], t_end: float) -> dict[int, tuple[float, ...]]:
    """Times for each number of steps: every (K / n)-th of K falling levels, from the first, and the end mark ``t_end``.

    Raises:
        ValueError: no counts, or counts outside 1 .. K - 1 (the last level is where a sampler ends).
    """
    if not counts or not all(isinstance(n, int) and 1 <= n < len(levels) for n in counts):
        raise ValueError(
            f"sample_steps: found {list(counts)}, expected step counts in 1 .. {len(levels) - 1}"
        )
    places = {n: [round(i * (len(levels) - 1) / n) for i in range(n)] for n in counts}
    return {n: (*(float(levels[i]) for i in at), t_end) for n, at in places.items()}


# ---- latent consistency models ----


def lcm_boundary(
    x0_hat: Tensor, x: Tensor, t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> Tensor:
    """The consistency function c_skip(t) x + c_out(t) x0_hat of a latent consistency model (arXiv 2310.04378), [B, *S].

    x0_hat [B, *S] is predicted at (x, t), t [B] in steps of the table; at t = 0 this is x, from a few steps on x0_hat.

    Raises:
        ValueError: ``timestep_scaling`` is not positive, or shapes that differ.
    """
    c_skip, c_out = lcm_scalings(t, timestep_scaling, sigma_data)
    return combine(c_skip, x, c_out, x0_hat)


def lcm_predictor(predict: Field, process: Process, kind: str, timestep_scaling: float = 10.0) -> Field:
    """A network ``predict(x, t)`` of ``kind`` as the x0 that ``few_step`` takes: ``lcm_boundary`` of its prediction."""
    process.check_kind(kind)

    def consistency(x: Tensor, t: Tensor) -> Tensor:
        x0_hat = process.convert(kind, predict(x, t), x, t, "x0")
        return lcm_boundary(x0_hat, x, t, timestep_scaling)

    return consistency


def lcm_times(
    steps: int, *, num_timesteps: int = 1000, original_steps: int = 50, strength: float = 1.0
) -> Tensor:
    """Times of the latent consistency sampler, [steps + 1] float64, the last of them the end mark 0.

    ``steps`` entries, every (L / steps)-th rounded down, of the training grid 999, 979, ..., 19 of ``original_steps`` levels,
    of which ``strength`` < 1 (image to image) keeps the L = int(original_steps * strength) cleanest. These are diffusers'
    ``LCMScheduler`` timesteps: 999, 759, 499, 259 for 4. With ``few_step`` and ``lcm_predictor`` they are its sampler.

    Raises:
        ValueError: ``original_steps`` does not divide ``num_timesteps``, strength outside (0, 1], or ``steps`` outside 1 .. L.
    """
    grid = lcm_grid(num_timesteps, original_steps)
    if not 0 < strength <= 1:
        raise ValueError(f"strength: found {strength}, expected a number in (0, 1]")
    kept = int(original_steps * strength)
    if not 1 <= steps <= kept:
        raise ValueError(
            f"steps: found {steps}, expected 1 .. {kept} (original_steps {original_steps}, strength {strength})"
        )
    grid = grid[:kept].flip(0)
    # The product of rounded numbers, as in numpy.linspace: 14.999... is 14 there (22 of 30 levels) and so it is here.
    chosen = grid[[int(i * (kept / steps)) for i in range(steps)]]
    return torch.cat([chosen, torch.zeros(1, dtype=torch.int64)]).double()


def lcm_custom_times(timesteps: Sequence[int], num_timesteps: int = 1000, strength: float = 1.0) -> Tensor:
    """A custom list of latent consistency timesteps as times, [n + 1] float64, the last of them the end mark 0.

    ``strength`` < 1 keeps the int(n * strength) cleanest, and no noise follows the last of them. (diffusers' scheduler counts
    the untrimmed list and noises its own result.)

    Raises:
        ValueError: an empty list, timesteps that do not descend strictly or leave 1 .. num_timesteps - 1, strength outside
        (0, 1] or one that keeps none.
    """
    times = [int(t) for t in timesteps]
    falling = all(a > b for a, b in itertools.pairwise(times))
    if not times or not falling or times[0] >= num_timesteps or times[-1] < 1:
        raise ValueError(
            f"timesteps: found {times}, expected strictly descending numbers in {num_timesteps - 1} .. 1"
        )
    kept = int(len(times) * strength)
    if not 0 < strength <= 1 or kept < 1:
        raise ValueError(
            f"strength: found {strength}, expected a number in (0, 1] that keeps one of {len(times)} timesteps"
        )
    return torch.tensor([*times[-kept:], 0], dtype=torch.float64)


def lcm_grid(num_timesteps: int = 1000, ddim_steps: int = 50) -> Tensor:
    """The training grid G_j = (j + 1) T / k - 1 of latent consistency distillation, j = 0 .. k - 1, rising, [k] int64.

    Raises:
        ValueError: ``ddim_steps`` is not in 1 .. T or does not divide T, which a rounded-down skip would hide.
    """
    whole = isinstance(ddim_steps, int)
    if not whole or not 1 <= ddim_steps <= num_timesteps or num_timesteps % ddim_steps:
        raise ValueError(
            f"ddim_steps: found {ddim_steps}, expected a divisor of the {num_timesteps} timesteps"
        )
    return student_indices(num_timesteps, ddim_steps).flip(0)
