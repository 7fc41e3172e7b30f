"""The flow from noise to the vectors of a finite codebook, in closed form (Distilled Decoding, arXiv 2412.17153, section 3.2;
its score is arXiv 2510.21003, eq. 1).

The data are the codes c_j, j = 1 .. V, with probabilities p_j, and x_t = (1 - t) c + t eps (`process.flow.Flow`). Then

    log w_j(x, t) = log p_j + [(1 - t) x.c_j - (1 - t)^2 |c_j|^2 / 2] / t^2 + const,   w = softmax(log w)
    D(x, t) = sum_j w_j c_j                       E[c | x_t = x]
    v(x, t) = (x - D) / t                         dx/dt = E[eps - c | x_t = x]
    s(x, t) = -(x - (1 - t) D) / t^2              grad log p_t(x)

The flow carries N(0, I) to p, so it maps each noise to one code: a partition of the space of noises into V cells of mass p_j.
Codes with p_j = 0 (log p = -inf) have weight 0 and are never reached.

Shapes: N positions, C numbers a code; x [N,C], t [N] or a scalar tensor, log_p [N,V], codes [V,C]. Everything is computed in
float32 at least, in chunks of positions, with products of matrices: nothing of shape [N,V,C] exists.

The papers do not give the solver. Ours: steps x <- (u / t) x + (1 - u / t) D(x, t) from t to u < t, which are Euler's and
DDIM's and exact at u = 0, or Heun's of the same velocity with a last step of Euler; the code is the one of the largest
weight of the last evaluation, never the one that is nearest to x. `tests/identities/test_token_map.py` compares the
frequencies of codes with p.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from distill.process.base import at_least_float32
from distill.samplers.integrate import check_times

SOLVERS = ("euler", "heun")
LEAST_TIME = 1e-4  # nothing is divided by a smaller t
CHUNK = 2**26  # weights that exist at once


def log_weights(x: Tensor, t: Tensor, log_p: Tensor, codes: Tensor) -> Tensor:
    """log w [N,V] at times t in (0, 1], without the constant; times below 1e-4 count as 1e-4, where the largest weight is that
    of the nearest code with p > 0."""
    t = t.to(x.dtype).clamp(min=LEAST_TIME).expand(len(x))[:, None]
    keep = 1 - t
    return log_p + (keep * (x @ codes.T) - keep.square() * codes.square().sum(1) / 2) / t.square()


def denoise(x: Tensor, t: Tensor, log_p: Tensor, codes: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """D(x, t) [N,C], the expected code; at t = 0 the nearest code with p > 0."""
    t = t.expand(len(x))
    rows = _rows(codes, chunk)
    parts = zip(x.split(rows), t.split(rows), log_p.split(rows), strict=True)
    return torch.cat([_denoise(*part, codes)[0] for part in parts])


def velocity(x: Tensor, t: Tensor, log_p: Tensor, codes: Tensor) -> Tensor:
    """v(x, t) [N,C]. Raises ValueError for t = 0 on the CPU, where the flow has ended."""
    check_not_clean(t)
    return (x - denoise(x, t, log_p, codes)) / t.to(x.dtype).expand(len(x))[:, None]


def score(x: Tensor, t: Tensor, log_p: Tensor, codes: Tensor) -> Tensor:
    """s(x, t) [N,C]. Raises ValueError for t = 0 on the CPU, where there is no density."""
    check_not_clean(t)
    time = t.to(x.dtype).expand(len(x))[:, None]
    return -(x - (1 - time) * denoise(x, t, log_p, codes)) / time.square()


def check_not_clean(t: Tensor) -> None:
    """Raise ValueError where a time on the CPU is 0."""
    if t.device.type == "cpu" and bool((t == 0).any()):
        raise ValueError(
            "t: found 0, where velocity and score of codes do not exist; expected t > 0 (denoise has t = 0)"
        )


def token_map(
    noise: Tensor,
    log_p: Tensor,
    codes: Tensor,
    times: Tensor,
    *,
    solver: str = "heun",
    chunk: int = CHUNK,
    return_path: bool = False,
) -> tuple[Tensor, Tensor]:
    """(indices [N] int64 of the codes that noise [N,C] flows to, the end point D [N,C] of the last step).

    Args:
        times: [n + 1] falling from 1 to exactly 0.
        solver: "heun" (2 n - 1 evaluations) or "euler" (n).
        return_path: the states [n + 1,N,C] at `times` in place of the end point.

    Raises:
        ValueError: names the argument: an unknown solver, times that do not fall from 1 to 0 or with one in (0, 1e-4), or
        shapes that do not fit.
    """
    _check(noise, log_p, codes, times, solver)
    if noise.dtype in (torch.float16, torch.bfloat16):
        warnings.warn(f"noise: found {noise.dtype}; the map is computed in float32", stacklevel=2)
    noise, log_p = at_least_float32(noise), at_least_float32(log_p)
    dtype = torch.promote_types(noise.dtype, log_p.dtype)
    log_p, codes, steps = log_p.to(dtype), codes.to(noise.device, dtype), times.to(noise.device, dtype)
    found, ends = [], []
    rows = _rows(codes, chunk)
    for part, probabilities in zip(noise.to(dtype).split(rows), log_p.split(rows), strict=True):
        index, path = _integrate(part, probabilities, codes, steps, solver, return_path)
        found.append(index)
        ends.append(path)
    return torch.cat(found), torch.cat(ends, dim=1 if return_path else 0)


def _integrate(
    x: Tensor, log_p: Tensor, codes: Tensor, times: Tensor, solver: str, return_path: bool
) -> tuple[Tensor, Tensor]:
    """(indices, end point or path) of one chunk."""
    path = [x]
    weights = log_p
    last = len(times) - 2
    for i in range(len(times) - 1):
        t, u = times[i], times[i + 1]
        mean, weights = _denoise(x, t, log_p, codes)
        moved = (u / t) * x + (1 - u / t) * mean
        if solver == "heun" and i < last:
            there, _ = _denoise(moved, u, log_p, codes)
            moved = x + (u - t) / 2 * ((x - mean) / t + (moved - there) / u)
        x = moved
        if return_path:
            path.append(x)
    return weights.argmax(1), torch.stack(path) if return_path else x


def _denoise(x: Tensor, t: Tensor, log_p: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """(D [N,C], log w [N,V])."""
    found = log_weights(x, t, log_p, codes)
    return found.softmax(1) @ codes, found


def _rows(codes: Tensor, chunk: int) -> int:
    """Positions whose weights exist at once."""
    return max(1, chunk // len(codes))


def _check(noise: Tensor, log_p: Tensor, codes: Tensor, times: Tensor, solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver: found {solver!r}, expected one of {list(SOLVERS)}")
    check_times(times, descending=True)
    clean = [time for time in times.tolist() if time < LEAST_TIME]
    if float(times[0]) != 1 or clean != [0.0]:
        raise ValueError(
            f"times: found {times.tolist()}, expected times that fall from 1 to exactly 0, the others at least {LEAST_TIME:g}"
        )
    if noise.dim() != 2 or noise.shape[1] != codes.shape[1]:
        raise ValueError(f"noise: found shape {list(noise.shape)}, expected [N, {codes.shape[1]}]")
    if log_p.shape != (len(noise), len(codes)):
        raise ValueError(
            f"log_p: found shape {list(log_p.shape)}, expected {[len(noise), len(codes)]}: a probability for each of the "
            f"{len(codes)} codes of the codebook"
        )
