"""Distances between a prediction and its target, [B, *S] each to [B]: the targets of distillation are constants.

The target is detached in every function, so no gradient can leak into the network that made it. Sums and roots are taken in at
least float32 and in forms that neither cancel nor divide by zero: a perfect prediction has distance 0 and gradient 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from distill.process.base import at_least_float32


def l1(pred: Tensor, target: Tensor) -> Tensor:
    """mean |pred - target| over the dimensions of a sample, [B].

    Raises:
        ValueError: shapes differ (nothing is broadcast); so do all functions here.
    """
    return _difference(pred, target).abs().mean(1)


def l2(pred: Tensor, target: Tensor) -> Tensor:
    """mean (pred - target)^2 over the dimensions of a sample, [B]."""
    return _difference(pred, target).square().mean(1)


def squared_norm(pred: Tensor, target: Tensor) -> Tensor:
    """||pred - target||_2^2, the SUM over the dimensions of a sample, [B]."""
    return _difference(pred, target).square().sum(1)


def pseudo_huber(pred: Tensor, target: Tensor, c: float = 0.0) -> Tensor:
    """sqrt(||pred - target||_2^2 + c^2) - c with the norm of a WHOLE sample, [B] (arXiv 2310.14189, section 3.3).

    c = 0 is the norm itself (ECT, arXiv 2406.14548); ``ict_huber_c`` gives iCT's c. Computed as n^2 / (sqrt(n^2 + c^2) + c).
    Not ``elementwise_huber``: that one takes a root per element.

    Raises:
        ValueError: ``c`` is negative.
    """
    if c < 0:
        raise ValueError(f"c: found {c}, expected at least 0")
    difference = _difference(pred, target)
    if c == 0:
        return torch.linalg.vector_norm(difference, dim=1)  # its gradient at 0 is 0, that of sqrt is not
    square = difference.square().sum(1)
    return square / (torch.sqrt(square + c**2) + c)


def elementwise_huber(pred: Tensor, target: Tensor, c: float = 0.001) -> Tensor:
    """mean of sqrt(d^2 + c^2) - c over the elements d of a sample, [B]: the Huber loss of latent consistency models.

    Raises:
        ValueError: ``c`` is not positive.
    """
    if not c > 0:
        raise ValueError(f"c: found {c}, expected a positive number")
    square = _difference(pred, target).square()
    return (square / (torch.sqrt(square + c**2) + c)).mean(1)


def ict_huber_c(size: int) -> float:
    """iCT's c = 0.00054 sqrt(D) for samples of D numbers: 0.03 for 3x32x32, 0.06 for 3x64x64 (arXiv 2310.14189).

    Raises:
        ValueError: ``size`` is below 1.
    """
    if size < 1:
        raise ValueError(f"size: found {size}, expected at least 1")
    return 0.00054 * math.sqrt(size)


def _difference(pred: Tensor, target: Tensor) -> Tensor:
    """pred - sg(target) as [B, D]."""
    if pred.shape != target.shape:
        raise ValueError(f"shapes differ: prediction {tuple(pred.shape)}, target {tuple(target.shape)}")
    return (at_least_float32(pred) - at_least_float32(target.detach())).flatten(1)


LOSSES = ("pseudo_huber", "huber", "l2", "l1")


def distance(name: str, huber_c: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A distance by its name: "pseudo_huber" of a whole sample, "huber" of its elements, "l2" or "l1" (means).

    Raises:
        ValueError: an unknown name, or a c that the Huber losses refuse.
    """
    if name == "pseudo_huber":
        chosen: Callable[[Tensor, Tensor], Tensor] = partial(pseudo_huber, c=huber_c)
    elif name == "huber":
        chosen = partial(elementwise_huber, c=huber_c)
    elif name in ("l1", "l2"):
        chosen = l1 if name == "l1" else l2
    else:
        raise ValueError(f"loss: found {name!r}, expected one of {list(LOSSES)}")
    chosen(torch.zeros(1, 1), torch.zeros(1, 1))  # raises for an invalid c
    return chosen
