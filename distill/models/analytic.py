"""The exact teacher: data from a Gaussian mixture, whose denoiser, score and velocity have closed forms under every process.

    x0 ~ (1/K) sum_k N(m_k, s^2 I),   x_t = alpha x0 + sigma eps
    E[x0 | x_t] = sum_k w_k [m_k + alpha s^2 / v (x_t - alpha m_k)],   v = alpha^2 s^2 + sigma^2,
    w = softmax_k(-|x_t - alpha m_k|^2 / (2 v))

With it a sampler's order, a method's target and a trained student's error are known to machine precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distill.data.arguments import check_range
from distill.data.cond import Cond
from distill.data.points import mixture_sample, ring_means
from distill.models.denoiser import Denoiser
from distill.nets.net import Net
from distill.process.base import Process, at_least_float32


class GaussianMixture(Net):
    """The posterior mean of an even mixture as a net: (x_t [B,*S], t [B], Cond) -> E[x0 | x_t] [B,*S], computed in float64.

    Args:
        means: [K, D] component means (D the size of a sample).
        std: standard deviation s of every component; 0 makes the data the means themselves.
        process: the process that x_t lives in, or its config.
        shape: S; None: (D,).
        labelled: component k has the label k, and the null condition means the whole mixture.
    """

    means: Tensor

    def __init__(
        self,
        means: Sequence[Sequence[float]],
        std: float,
        process: Process,
        *,
        shape: Sequence[int] | None = None,
        labelled: bool = False,
    ) -> None:
        super().__init__()
        points = torch.tensor(means, dtype=torch.float64, device="cpu")
        if points.ndim != 2 or len(points) < 1:
            raise ValueError(f"means: expected [K, D] with K >= 1, found shape {list(points.shape)}")
        if std < 0:
            raise ValueError(f"std: expected at least 0, found {std}")
        self.register_buffer("means", points)
        self.std, self.process = float(std), process
        self.shape = (points.shape[1],) if shape is None else tuple(shape)
        if math.prod(self.shape) != points.shape[1]:
            raise ValueError(
                f"shape: {list(self.shape)} does not hold the {points.shape[1]} numbers of a mean"
            )
        self.num_classes = len(points) if labelled else 0

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """E[x0 | x_t] in the dtype of x_t (float32 at least)."""
        x = x_t.flatten(1).double()[:, None]  # [B, 1, D]
        time = t.double()
        alpha, sigma = self.process.alpha(time)[:, None, None], self.process.sigma(time)[:, None, None]
        variance = alpha.square() * self.std**2 + sigma.square()
        from_mean = x - alpha * self.means
        logits = -from_mean.square().sum(2) / (2 * variance[:, :, 0])
        label = cond.get("label")
        if self.num_classes and label is not None:
            check_range("label", label, self.num_classes)
            component = torch.arange(self.num_classes, device=x.device)
            others = (label[:, None] >= 0) & (component != label[:, None])
            logits = logits.masked_fill(others, -math.inf)
        weight = torch.softmax(logits, 1)[:, :, None]
        x0 = (weight * (self.means + alpha * self.std**2 / variance * from_mean)).sum(1)
        return x0.to(at_least_float32(x_t).dtype).reshape(x_t.shape)

    def draw(self, component: Tensor, noise: Tensor) -> Tensor:
        """Data [B,*S] in float64 from component numbers [B] and standard normal numbers [B,*S]."""
        return mixture_sample(self.means, self.std, component, noise.flatten(1)).reshape(noise.shape)


def exact_denoiser(
    process: Process,
    means: Sequence[Sequence[float]] | None = None,
    std: float = 0.1,
    *,
    labelled: bool = False,
    shape: Sequence[int] | None = None,
) -> Denoiser:
    """The exact teacher of a mixture (default: the ring of 8 of radius 1.5) under a process; float64 in, float64 out."""
    net = GaussianMixture(
        ring_means() if means is None else means, std, process, shape=shape, labelled=labelled
    )
    return Denoiser(net, process, "x0", net.shape, guidable=labelled)
