"""A sampler that adds noise at each step: DDIM with eta.

It draws nothing: ``noise`` gives the standard normal numbers of each step (``Noise``), so a sample is a function of its own
noises, whatever the batch. With fixed noises it is differentiable in the initial noise. Other arguments are those of
``distill.samplers.ode``, with ``predict(x, t)`` a network of ``kind``; ``times`` falls strictly.
"""

from __future__ import annotations

from torch import Tensor

from distill.process.base import Process
from distill.samplers.integrate import (
    Field,
    Noise,
    OnState,
    check_final,
    check_times,
    integrate,
    noise_of,
    per_sample,
)


def stochastic_ddim(
    predict: Field,
    process: Process,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    eta: float = 1.0,
    kind: str = "x0",
    on_state: OnState | None = None,
    return_path: bool = False,
    final: str = "x0",
) -> Tensor:
    """DDIM with noise (arXiv 2010.02502, eq. 12 and 16); eta = 0 is ``ddim``, eta = 1 ancestral sampling (DDPM's posterior).

    x_s = alpha_s x0_hat + sqrt(sigma_s^2 - c^2) eps_hat + c n with c = eta sigma_s sqrt(1 - SNR_t / SNR_s): eq. 16 for any
    process, since c / eta is the standard deviation of q(x_s | x_t, x0) (SNR = alpha^2 / sigma^2). Finite at both ends: from
    pure noise c = eta sigma_s, into clean data 0. ``final`` as in ``ddim``; the noise of a last step that returns x0_hat is
    not drawn. One call a step, order 1.

    Raises:
        ValueError: ``eta`` outside [0, 1], ``noise`` of another shape, ``times`` does not fall strictly, ``final`` is
        neither, or the kind does not exist.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: found {eta}, expected a number in [0, 1]")
    steps = check_times(times, descending=True)
    check_final(final)
    draw = noise_of(noise, x, steps)
    alpha, sigma = process.alpha(times.double()), process.sigma(times.double())
    # 1 - SNR_t / SNR_s, from the weights: no infinite ratio at either end.
    renewed = (1 - (alpha[:-1] * sigma[1:] / (sigma[:-1] * alpha[1:])).square()).clamp(min=0)
    kept, fresh = sigma[1:] * (1 - eta**2 * renewed).sqrt(), sigma[1:] * eta * renewed.sqrt()

    def step(i: int, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        here = per_sample(t, x)
        out = predict(x, here)
        x0 = process.convert(kind, out, x, here, "x0")
        if final == "x0" and i == steps - 1:
            return x0
        eps = process.convert(kind, out, x, here, "eps")
        return alpha[i + 1] * x0 + kept[i] * eps + fresh[i] * draw(i)

    return integrate(step, x, times, on_state, return_path)
