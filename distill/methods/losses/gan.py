"""Adversarial losses beside score distillation (DMD2, arXiv 2405.14867): pure functions of logits.

Logits are [B, ...]: one number a sample, several heads, or a map; they are averaged over all but the first
dimension. Positive means real. Losses are [B] in at least float32, the caller averages; a logit that is not
finite shows in its own sample's loss.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

from distill.process.base import at_least_float32


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(-real) + softplus(fake), [B]: logistic loss of a discriminator (arXiv 1406.2661, eq. 1, negated).

    DMD2 adds it with weight 1e-2 to the fake score's loss, whose network carries the features.

    Raises:
        ValueError: shapes differ (a real for every fake).
    """
    _check(real=real, fake=fake)
    return _per_sample(softplus(-at_least_float32(real))) + _per_sample(softplus(at_least_float32(fake)))


def generator_loss(fake: Tensor) -> Tensor:
    """softplus(-fake), [B]: the non-saturating loss of a generator (arXiv 1406.2661, section 3).

    DMD2's weights are 3e-3 on ImageNet-64, 5e-3 on SDXL and 1e-3 on SD 1.5. The discriminator's parameters
    are frozen; the graph from the logits to the sample is needed.
    """
    _check(fake=fake)
    return _per_sample(softplus(-at_least_float32(fake)))


def _check(**logits: Tensor) -> None:
    if len({tensor.shape for tensor in logits.values()}) > 1 or min(t.dim() for t in logits.values()) < 1:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in logits.items())
        raise ValueError(f"logits must be [B, ...] and of one shape: found {found}")


def _per_sample(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(1)
