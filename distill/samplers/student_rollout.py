"""States and predictions of a few-step student during sampling: the inputs and outputs that it is trained on.

The student alternates between predicting the data and noising it again: from the state s_0 at times[0],

    x_i = predict_x0(s_i, times[i]),    s_(i+1) = alpha x_i + sigma noise[i]  at times[i+1],

and its sample is the last x_i: ``samplers.fewstep.few_step`` with fresh noise. Shared arguments: ``predict_x0(x,
t)`` maps states [B, *S] and t [B] (float64) to data; ``start`` [B, *S] is s_0, scaled as the student is sampled
(DMD2: unit noise); ``times`` are the N descending start times of the steps, without the end; ``noise`` is
standard normal, [n, B, *S] with n >= the steps taken, or a function i -> [B, *S].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distill.process.base import Process, at_least_float32, expand
from distill.samplers.integrate import Field, Noise


def check_times(process: Process, times: Sequence[float]) -> None:
    """Raise ValueError unless ``times`` can start steps: descending, up to the process's t_max, above its t_min."""
    found = list(times)
    if not found or any(not a > b for a, b in pairwise(found)):
        raise ValueError(f"times: found {found}, expected at least one time, descending")
    if not process.t_min < found[-1] <= found[0] <= process.t_max:
        raise ValueError(
            f"times: found {found}, expected times of {process!r}, above {process.t_min} and up to {process.t_max}"
        )


def visited_state(
    predict_x0: Field, process: Process, start: Tensor, times: Sequence[float], noise: Noise, k: int
) -> Tensor:
    """The state [B, *S] at times[k] after k steps of the student's own sampler, without a graph.

    DMD2's backward simulation (arXiv 2405.14867): the student is trained on the inputs that it meets in sampling
    and not on noised data. k = 0 is ``start``. With several processes k must be the same on all of them.

    Raises:
        ValueError: times (see ``check_times``), k outside 0..N-1, or fewer than k noises.
    """
    _check_steps(process, times, noise, k)
    x = at_least_float32(start)
    with torch.no_grad():
        for i in range(k):
            x0 = predict_x0(x, _at(times[i], x))
            x = process.add_noise(x0, _draw(noise, i), _at(times[i + 1], x)).to(x.dtype)
    return x


def few_step_output(
    predict_x0: Field, process: Process, start: Tensor, times: Sequence[float], noise: Noise, k: int
) -> Tensor:
    """x_k: the data [B, *S] that step k (from 0) predicts, with the graph of this one step.

    Few-step SiD trains the generator on the even mixture of the outputs of all steps: k uniform in 0..N-1, one
    for the whole batch and all processes. DMD2's multi-step generator is trained on the same output.

    Raises:
        ValueError: as ``visited_state``.
    """
    x = visited_state(predict_x0, process, start, times, noise, k)
    return at_least_float32(predict_x0(x, _at(times[k], x)))


@torch.no_grad()
def mixture_output(
    predict_x0: Field, process: Process, start: Tensor, times: Sequence[float], noise: Noise, k: Tensor
) -> Tensor:
    """x_k with a k of its own for each sample ([B] integers in 0..N-1), without a graph: the fake score's data.

    One k a batch would make the fake score run after one component of the mixture at a time. All N steps are
    run on the whole batch; a k outside the range gives NaN: checking it would wait for the device.

    Raises:
        ValueError: times, fewer than N - 1 noises, or k is not [B].
    """
    last = len(times) - 1
    _check_steps(process, times, noise, last)
    if k.shape != start.shape[:1]:
        raise ValueError(
            f"k: found shape {tuple(k.shape)}, expected one step a sample, {tuple(start.shape[:1])}"
        )
    x = at_least_float32(start)
    out = torch.full_like(x, torch.nan)
    for i in range(last + 1):
        x0 = predict_x0(x, _at(times[i], x)).to(x.dtype)
        out = torch.where(expand(k == i, x), x0, out)
        if i < last:
            x = process.add_noise(x0, _draw(noise, i), _at(times[i + 1], x)).to(x.dtype)
    return out


def _check_steps(process: Process, times: Sequence[float], noise: Noise, k: int) -> None:
    check_times(process, times)
    if not 0 <= k < len(times):
        raise ValueError(f"k: found {k}, expected a step of 0 .. {len(times) - 1}")
    if isinstance(noise, Tensor) and len(noise) < k:
        raise ValueError(f"noise: found {len(noise)} tensors, expected at least {k}, one for each re-noising")


def _draw(noise: Noise, i: int) -> Tensor:
    return noise[i] if isinstance(noise, Tensor) else noise(i)


def _at(time: float, x: Tensor) -> Tensor:
    """[B] in float64; filled on the device, so nothing is copied from the host."""
    return torch.full((len(x),), time, dtype=torch.float64, device=x.device)
