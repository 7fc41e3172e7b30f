"""Schedules over training of the consistency family: pure functions of (step, total), plain numbers in and out.

A step counts optimizer updates of the student from 0; ``total`` is the length of training. The results size grids (``scales``
is the number of noise levels N of ``karras_levels``) and averages, so they are host numbers; only ``ect_r`` takes a tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.process.base import at_least_float32

EMA_MODES = ("fixed", "adaptive")
SCALE_MODES = ("fixed", "progressive")
ECT_MAPPINGS = ("const", "sigmoid")


def progressive_scales(step: int, total: int, start: int = 2, end: int = 150) -> int:
    """Number of noise levels N(k) of consistency training (arXiv 2303.01469, appendix C).

    N = ceil(sqrt(k / K ((end + 1)^2 - start^2) + start^2) - 1) + 1, at least 2: from ``start`` to ``end + 1``.

    Raises:
        ValueError: step outside 0 .. total, total below 1, or not 1 <= start <= end.
    """
    _check_progress(step, total)
    _check_scales(start, end)
    square = step / total * ((end + 1) ** 2 - start**2) + start**2
    return max(math.ceil(math.sqrt(square) - 1), 1) + 1


def adaptive_ema(step: int, total: int, ema: float = 0.9, start: int = 2, end: int = 150) -> float:
    """Decay of consistency training's target network, mu(k) = exp(start ln(ema) / (N(k) - 1)).

    N(k) is ``progressive_scales``. The released code divides by N - 1, the paper by N; this is the code, with which the
    published results were made. At k = 0 it gives ema^start (0.81 of 0.9), below ``ema`` itself.

    Raises:
        ValueError: ``ema`` outside (0, 1), or what ``progressive_scales`` refuses.
    """
    if not 0 < ema < 1:
        raise ValueError(f"ema: found {ema}, expected a number in (0, 1)")
    return math.exp(start * math.log(ema) / (progressive_scales(step, total, start, end) - 1))


def ema_and_scales(
    step: int,
    total: int,
    *,
    ema: float,
    start: int,
    end: int,
    ema_mode: str = "adaptive",
    scale_mode: str = "progressive",
) -> tuple[float, int]:
    """(decay of the target network, number of noise levels) at a step, by the modes of the consistency-models code.

    ``fixed`` scales are ``start`` (``end`` and the progress then have no meaning and are not looked at); a ``fixed`` decay is
    ``ema``, which may then be 0 (the student itself).

    Raises:
        ValueError: an unknown mode, adaptive decay with fixed scales (it is a function of them), a decay outside [0, 1), or
        what the schedules refuse.
    """
    if ema_mode not in EMA_MODES:
        raise ValueError(f"ema_mode: found {ema_mode!r}, expected one of {list(EMA_MODES)}")
    if scale_mode not in SCALE_MODES:
        raise ValueError(f"scale_mode: found {scale_mode!r}, expected one of {list(SCALE_MODES)}")
    if scale_mode == "fixed" and ema_mode == "adaptive":
        raise ValueError("ema_mode: found 'adaptive' with fixed scales, which it follows; expected 'fixed'")
    if not 0 <= ema < 1:
        raise ValueError(f"ema: found {ema}, expected a number in [0, 1)")
    if scale_mode == "fixed":
        if start < 2:
            raise ValueError(f"start: found {start}, expected at least 2 noise levels")
        return ema, start
    scales = progressive_scales(step, total, start, end)
    return (adaptive_ema(step, total, ema, start, end) if ema_mode == "adaptive" else ema), scales


def doubling_scales(step: int, total: int, start: int = 10, end: int = 1280) -> int:
    """Number of noise levels of improved consistency training (arXiv 2310.14189, section 3.4).

    N(k) = min(start 2^floor(k / K'), end) + 1 with K' = floor(K / (log2(floor(end / start)) + 1)).

    Raises:
        ValueError: step outside 0 .. total, not 1 <= start <= end, or fewer steps than stages.
    """
    _check_progress(step, total)
    _check_scales(start, end)
    stages = math.log2(end // start) + 1
    length = math.floor(total / stages)
    if length < 1:
        raise ValueError(f"total: found {total}, expected at least {math.ceil(stages)} steps, one a stage")
    return min(start * 2 ** (step // length), end) + 1


def ect_ratio(stage: int, q: float = 2.0, max_ratio: float = 1.0) -> float:
    """r / t of easy consistency tuning at a stage (arXiv 2406.14548): 1 - q^-(stage + 1), at most ``max_ratio``.

    Raises:
        ValueError: stage below 0, q not above 1, or max_ratio outside (0, 1].
    """
    return 1 - _ect_decay(stage, q, max_ratio)


def ect_r(
    t: Tensor,
    stage: int,
    q: float = 2.0,
    mapping: str = "sigmoid",
    k: float = 8.0,
    b: float = 1.0,
    max_ratio: float = 1.0,
) -> Tensor:
    """The smaller noise level r [B] that easy consistency tuning pairs with t [B] at a stage (arXiv 2406.14548).

    With d = q^-(stage + 1) (at least 1 - max_ratio): ``const`` r = t (1 - d); ``sigmoid`` r = max(t (1 - d (1 + k sigmoid(-b
    t))), 0). Where r = 0 the target is the clean image; at stage 0 with q = 2 this is every t below about 2, so that training
    starts as plain denoising.

    Raises:
        ValueError: an unknown mapping, k or b negative, stage below 0, q not above 1, or max_ratio outside (0, 1].
    """
    if mapping not in ECT_MAPPINGS:
        raise ValueError(f"mapping: found {mapping!r}, expected one of {list(ECT_MAPPINGS)}")
    if k < 0 or b < 0:
        raise ValueError(f"k, b: found {k} and {b}, expected numbers of at least 0")
    decay = _ect_decay(stage, q, max_ratio)
    t = at_least_float32(t)
    if mapping == "const":
        return t * (1 - decay)
    return (t * (1 - decay * (1 + k * torch.sigmoid(-b * t)))).clamp(min=0)


def _ect_decay(stage: int, q: float, max_ratio: float) -> float:
    if stage < 0:
        raise ValueError(f"stage: found {stage}, expected at least 0")
    if not q > 1:
        raise ValueError(f"q: found {q}, expected a number above 1")
    if not 0 < max_ratio <= 1:
        raise ValueError(f"max_ratio: found {max_ratio}, expected a number in (0, 1]")
    return max(q ** -(stage + 1), 1 - max_ratio)


def _check_progress(step: int, total: int) -> None:
    if not 0 <= step <= total or total < 1:
        raise ValueError(
            f"step, total: found {step} and {total}, expected 0 <= step <= total, total at least 1"
        )


def _check_scales(start: int, end: int) -> None:
    if not 1 <= start <= end:
        raise ValueError(f"start, end: found {start} and {end}, expected 1 <= start <= end")
