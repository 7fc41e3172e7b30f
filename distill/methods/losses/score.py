"""Losses of score distillation: SiD, Diff-Instruct, DMD / DMD2 and the fake score; pure functions.

Three networks: the generator G, the frozen teacher T and the fake score F, which follows G's samples. With x
= G(z), x_t = alpha x + sigma eps, yT = T(x_t) and yF = F(x_t) as predictions of the data, the difference yF -
yT is, up to a positive weight, the gradient on x of the reverse KL divergence at that noise level. What the
gradient flows through distinguishes the methods:

==================  ==============================================  =================================
loss                value, per sample                               its gradient reaches x through
==================  ==============================================  =================================
``sid_loss``        (yT - yF) ((yT - x) - alpha (yT - yF)) / sg(m)  x, and the inputs of T and of F
``diff_instruct``   sg(yF - yT) x                                   x alone
``dmd_loss``        |x - sg(x - (yF - yT) / m)|^2 / 2               x alone
``fake_score``      weight(t) |prediction - target|^2               nothing: it trains F
==================  ==============================================  =================================

All tensors are [B, *S] of one shape; every loss is [B] in at least float32 and the caller averages. A sample
that is not finite makes its own loss not finite and no other; nothing is replaced by zero, so that the
engine can skip the step. (The references drop such samples and still divide by B.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.process.base import Process, at_least_float32, expand
from distill.process.scalings import edm_weight

FAKE_SCORE_KINDS = {"edm": "x0", "eps": "eps", "v": "v", "flow": "velocity"}
"""Weighting of ``fake_score_loss`` -> the kind of prediction that it compares."""


def sid_loss(
    x: Tensor,
    y_teacher: Tensor,
    y_fake: Tensor,
    *,
    alpha: float = 1.0,
    floor: float = 1e-5,
    loss_scale_g: float = 1.0,
    reduction: str = "sum",
) -> Tensor:
    """SiD's generator loss, [B] (arXiv 2404.04057): loss_scale_g (yT - yF) ((yT - x) - alpha (yT - yF)) / m.

    m is the mean of |x - yT| over a sample, at least ``floor``; it is a weight and carries no gradient.
    Everything else does: ``y_teacher`` and ``y_fake`` must be computed WITH the graph from x through both
    networks' inputs (never under no_grad; their parameters frozen), or the training is plausible and wrong.

    The value is no measure of progress: with an exact F and m = 1 its mean is (1 - alpha) E|yT - yF|^2, zero
    for alpha = 1 and negative above.

    Args:
        alpha: 1.2 in the paper's best runs on CIFAR-10, ImageNet and FFHQ, 1 on AFHQ-v2 and in SiDA; from 1
            down the student provably contracts towards a Gaussian teacher.
        floor: of m, in units of the data.
        loss_scale_g: the reference trains with 100, which under Adam with beta1 = 0 only moves the gradient
            away from its epsilon. Log the loss without it.
        reduction: "sum" over the dimensions of a sample (the reference) or "mean".

    Raises:
        ValueError: shapes differ, alpha is not finite, or an unknown reduction.
    """
    x, y_teacher, y_fake = _same(x=x, y_teacher=y_teacher, y_fake=y_fake)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha: found {alpha}, expected a finite number")
    m = _mean_abs(x.detach() - y_teacher.detach()).clamp(min=floor)
    difference = y_teacher - y_fake
    product = difference * ((y_teacher - x) - alpha * difference) / expand(m, x)
    return loss_scale_g * _reduce(product, reduction)


def diff_instruct_loss(x: Tensor, y_teacher: Tensor, y_fake: Tensor, *, reduction: str = "sum") -> Tensor:
    """Diff-Instruct's generator loss, [B] (arXiv 2305.18455): sg(yF - yT) x, with weight 1 in data space.

    Its gradient on x is yF - yT. ``reduction`` acts on the dimensions of a sample: "sum" (the reference) or
    "mean".

    Raises:
        ValueError: shapes differ, or an unknown reduction.
    """
    x, y_teacher, y_fake = _same(x=x, y_teacher=y_teacher, y_fake=y_fake)
    return _reduce((y_fake - y_teacher).detach() * x, reduction)


def dmd_gradient(x: Tensor, y_teacher: Tensor, y_fake: Tensor, *, floor: float = 1e-3) -> Tensor:
    """DMD's direction, [B, *S] without a graph: (yF - yT) / m (arXiv 2311.18828, eq. 7 with the weight of eq. 8).

    m is the mean of |x - yT| over a sample, at least ``floor`` times the sample's root mean square, so that
    scaling x, yT and yF together changes nothing. ``y_teacher`` is the prediction after guidance. The
    references have no floor (``floor=0``); then m can be near 0 where a sample has few components, and a single
    step can destroy the generator.

    Raises:
        ValueError: shapes differ, or floor < 0.
    """
    x, y_teacher, y_fake = _same(x=x.detach(), y_teacher=y_teacher.detach(), y_fake=y_fake.detach())
    if not floor >= 0:
        raise ValueError(f"floor: found {floor}, expected at least 0")
    least = floor * x.square().reshape(len(x), -1).mean(1).sqrt()
    m = torch.maximum(_mean_abs(x - y_teacher), least)  # eq. 8: 1 / m, up to a factor of t alone
    return (y_fake - y_teacher) / expand(m, x)  # eq. 7: s_fake - s_real, in predictions of x0


def descend(x: Tensor, direction: Tensor, *, reduction: str = "mean") -> Tensor:
    """|x - sg(x - direction)|^2 / 2 of each sample, [B]: a loss whose gradient on x is the direction.

    Written so that its value is |direction|^2 / 2 without cancellation. A weight on samples (f-distill's)
    multiplies the direction, not the loss. ``reduction``: "mean" over the dimensions of a sample (DMD2) or
    "sum"; the gradient is divided accordingly.

    Raises:
        ValueError: shapes differ, or an unknown reduction.
    """
    x, direction = _same(x=x, direction=direction.detach())
    return _reduce(0.5 * ((x - x.detach()) + direction).square(), reduction)


def dmd_loss(
    x: Tensor, y_teacher: Tensor, y_fake: Tensor, *, floor: float = 1e-3, reduction: str = "mean"
) -> Tensor:
    """DMD's and DMD2's generator loss, [B] (arXiv 2311.18828, 2405.14867): ``descend`` along ``dmd_gradient``.

    DisBack's second stage is the same with a degraded teacher for T (arXiv 2408.15991).

    Raises:
        ValueError: shapes differ, floor < 0, or an unknown reduction.
    """
    return descend(x, dmd_gradient(x, y_teacher, y_fake, floor=floor), reduction=reduction)


def fake_score_weight(process: Process, t: Tensor, weighting: str, *, sigma_data: float = 0.5) -> Tensor:
    """The weight of ``fake_score_loss`` at times t [B], [B] in the dtype of the process's functions.

    With snr = (alpha / sigma)^2: "edm" snr + 1 / sigma_data^2, EDM's weight at the level sigma / alpha (arXiv
    2206.00364, table 1); "v" snr / (1 + snr); "eps" and "flow" 1.

    Raises:
        ValueError: unknown weighting, or ("edm") sigma_data <= 0.
    """
    if weighting not in FAKE_SCORE_KINDS:
        raise ValueError(f"weighting: found {weighting!r}, expected one of {sorted(FAKE_SCORE_KINDS)}")
    log_ratio = process.log_ratio(t)
    if weighting == "edm":
        return edm_weight(torch.exp(-log_ratio), sigma_data)
    return torch.sigmoid(2 * log_ratio) if weighting == "v" else torch.ones_like(log_ratio)


def fake_score_loss(
    prediction: Tensor,
    x: Tensor,
    eps: Tensor,
    t: Tensor,
    process: Process,
    *,
    weighting: str = "edm",
    sigma_data: float = 0.5,
    reduction: str = "sum",
) -> Tensor:
    """Denoising score matching of the fake score on generated samples (arXiv 2311.18828, eq. 6), [B].

    It is weight(t) |prediction - target|^2. ``prediction`` [B, *S] was made at x_t = alpha x + sigma eps, time t [B], in the
    kind that the weighting compares (``FAKE_SCORE_KINDS``); the target is that kind's true value, and carries no gradient to
    the generator. Weightings: "edm" (SiD, Diff-Instruct and DMD2 on EDM teachers), "eps" (DMD2 and DisBack on Stable
    Diffusion: plain), "v" (SiD-LSG), "flow" (plain, the velocity). Guidance inside the training prediction (SiD-LSG's kappa
    1) is the caller's.

    Args:
        sigma_data: of "edm".
        reduction: over the dimensions of a sample, "sum" (SiD, Diff-Instruct) or "mean" (DMD2, DisBack). They
            differ by the number of dimensions, which matters to clipping, to Adam's epsilon and beside GAN
            losses.

    Raises:
        ValueError: shapes differ, unknown weighting or reduction, sigma_data <= 0, or "v" where alpha^2 +
            sigma^2 is not 1.
    """
    weight = fake_score_weight(process, t, weighting, sigma_data=sigma_data)
    prediction, x, eps = _same(prediction=prediction, x=x.detach(), eps=eps.detach())
    error = prediction - process.target(FAKE_SCORE_KINDS[weighting], x, eps, t)
    return weight.to(error.dtype) * _reduce(error.square(), reduction)


def _same(**tensors: Tensor) -> list[Tensor]:
    """The tensors in at least float32, after a check that nothing would be broadcast."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {found}")
    return [at_least_float32(tensor) for tensor in tensors.values()]


def _mean_abs(difference: Tensor) -> Tensor:
    """Mean of |.| over each sample, [B]."""
    return difference.abs().reshape(len(difference), -1).mean(1)


def _reduce(values: Tensor, reduction: str) -> Tensor:
    """[B, *S] -> [B]."""
    flat = values.reshape(len(values), -1)
    if reduction == "sum":
        return flat.sum(1)
    if reduction == "mean":
        return flat.mean(1)
    raise ValueError(f"reduction: found {reduction!r}, expected 'sum' or 'mean'")
