"""Kernels of feature vectors, and the squared maximum mean discrepancy (MMD) of two sets of them (Gretton et al. 2012).

    MMD^2 = mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j)

"unbiased": the first two means are over i != j, so the value is often negative near equality; it is never clamped. "biased":
over all pairs. Everything here is differentiable. Products are taken in the type of the features, whatever autocast says: MMD^2
is a small difference of large sums, so float32 at least is required, and float64 advised above some hundred dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

CHUNK = 2048  # rows of a Gram matrix held at once: 2048 x 2048 in float64 is 32 MiB
PRECISE = (torch.float32, torch.float64)
ESTIMATORS = ("unbiased", "biased")
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
HAS: dict[str, tuple[str, ...]] = {
    "polynomial": ("degree", "c"),
    "linear": (),
    "rbf": (),
    "rbf_mixture": ("scales",),
}


@dataclass(frozen=True)
class Kernel:
    """A kernel of features of D numbers.

    Attributes:
        name: "polynomial": (gamma <a,b> + c)^degree. "linear": gamma <a,b>. "rbf": exp(-gamma |a - b|^2). "rbf_mixture": mean
            over the `scales` s of exp(-s gamma |a - b|^2).
        degree, c: of the polynomial; the defaults are the kernel of KID (1801.01401).
        gamma: a positive number; None: 1 / D; "median": 1 / the median of |a - b|^2 of real features, which `settled` sets.
        scales: of the mixture.

    Raises:
        ValueError: names the option: an unknown name, a gamma or scale that is not positive, a degree that is no integer of at
            least 1, or an option that the kernel does not have.
    """

    name: str = "polynomial"
    degree: int = 3
    c: float = 1.0
    gamma: float | Literal["median"] | None = None
    scales: list[float] = field(default_factory=lambda: list(SCALES))

    def __post_init__(self) -> None:
        if self.name not in HAS:
            raise ValueError(f"name: found {self.name!r}, expected one of {list(HAS)}")
        if isinstance(self.degree, bool) or not isinstance(self.degree, int) or self.degree < 1:
            raise ValueError(f"degree: found {self.degree!r}, expected an integer of at least 1")
        if not math.isfinite(self.c):
            raise ValueError(f"c: found {self.c}, expected a finite number")
        if not (self.gamma in (None, "median") or _positive(self.gamma)):
            raise ValueError(
                f"gamma: found {self.gamma!r}, expected a positive number, 'median', or null (1 / dimensions)"
            )
        if not self.scales or not all(_positive(scale) for scale in self.scales):
            raise ValueError(f"scales: found {self.scales}, expected a list of positive numbers")
        defaults: dict[str, Any] = {"degree": 3, "c": 1.0, "scales": list(SCALES)}
        for option, default in defaults.items():
            if option not in HAS[self.name] and (found := getattr(self, option)) != default:
                raise ValueError(
                    f"{option}: found {found!r}, which the kernel {self.name!r} does not have; expected {default!r}"
                )

    @property
    def on_distances(self) -> bool:
        """Whether it is a function of |a - b|^2."""
        return self.name in ("rbf", "rbf_mixture")

    def settled(self, real: Tensor) -> Kernel:
        """The kernel with gamma as a number where it is "median", of real features [M, D]; reads the device.

        Raises:
            ValueError: names `gamma`: half of the distances are 0.
        """
        if self.gamma != "median":
            return self
        distances = squared_distances(real, real)
        above = torch.triu_indices(len(real), len(real), offset=1, device=real.device)
        median = float(distances[above[0], above[1]].median())
        if not median > 0:
            raise ValueError(
                "gamma: found 'median', but half of the real features are equal; expected a positive number"
            )
        return replace(self, gamma=1.0 / median)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The Gram matrix [N, M] of x [N, D] and y [M, D]. Raises ValueError for half precision or differing D."""
        check_rows(x, y)
        if self.gamma == "median":
            raise ValueError("gamma: found 'median'; expected a kernel that `settled` has given a number")
        with torch.autocast(x.device.type, enabled=False):
            return self._of_distances(x, y) if self.on_distances else self._of_products(x, y)

    def _of_products(self, x: Tensor, y: Tensor) -> Tensor:
        products = x @ y.T
        assert not isinstance(self.gamma, str)
        base = products / x.shape[1] if self.gamma is None else products * self.gamma
        if self.name == "linear":
            return base
        base = base + self.c
        power = base
        for _ in range(self.degree - 1):  # `pow` takes several times as long
            power = power * base
        return power

    def _of_distances(self, x: Tensor, y: Tensor) -> Tensor:
        assert not isinstance(self.gamma, str)
        scaled = squared_distances(x, y) * -(1.0 / x.shape[1] if self.gamma is None else self.gamma)
        if self.name == "rbf":
            return scaled.exp()
        parts = [(scale * scaled).exp() for scale in self.scales]
        return torch.stack(parts).mean(0)


class Terms(NamedTuple):
    """The three means of MMD^2, 0-d."""

    xx: Tensor
    yy: Tensor
    xy: Tensor

    @property
    def mmd2(self) -> Tensor:
        """MMD^2."""
        return self.xx + self.yy - 2 * self.xy


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 [N, M] by one product, differentiable, at least 0; rounding is about 1e-15 (|x|^2 + |y|^2) in float64."""
    sizes = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return (sizes - 2 * (x @ y.T)).clamp(min=0)


def mean_between(
    kernel: Kernel, x: Tensor, y: Tensor, classes: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Mean of k(x_i, y_j) over all i, j of x [N, D] and y [M, D]; `classes` ([N], [M]): of k(x_i, y_j) [a_i = b_j], the kernel
    of features and classes together."""
    return _sum(kernel, x, y, classes) / (len(x) * len(y))


def mean_within(
    kernel: Kernel, x: Tensor, classes: Tensor | None = None, estimator: str = "unbiased"
) -> Tensor:
    """Mean of k(x_i, x_j) of x [N, D] over i != j ("unbiased") or all i, j ("biased"). Raises ValueError for fewer than two
    rows."""
    check_estimator(estimator)
    if len(x) < 2:
        raise ValueError(f"features: found {len(x)} samples, expected at least 2 on each side")
    total = _sum(
        kernel, x, x, None if classes is None else (classes, classes), diagonal=estimator == "biased"
    )
    return total / (len(x) * (len(x) if estimator == "biased" else len(x) - 1))


def mmd2(
    x: Tensor,
    y: Tensor,
    kernel: Kernel,
    estimator: str = "unbiased",
    classes: tuple[Tensor, Tensor] | None = None,
    yy: Tensor | None = None,
) -> Terms:
    """The terms of MMD^2 between x [N, D] (generated) and y [M, D] (real), N and M free.

    `classes` ([N], [M]) multiplies the kernel by 1 where both have the same class, else by 0. `yy` is `mean_within` of y where
    it is already known.

    Raises:
        ValueError: fewer than two rows on a side, differing D, half precision, or an unknown estimator.
    """
    check_rows(x, y)
    own, other = (None, None) if classes is None else classes
    within = mean_within(kernel, y, other, estimator) if yy is None else yy
    return Terms(mean_within(kernel, x, own, estimator), within, mean_between(kernel, x, y, classes))


def _sum(
    kernel: Kernel,
    x: Tensor,
    y: Tensor,
    classes: tuple[Tensor, Tensor] | None,
    diagonal: bool = True,
) -> Tensor:
    """Sum of the Gram matrix, without its diagonal unless `diagonal`."""
    sums = []
    for start in range(0, len(x), CHUNK):
        block = kernel(x[start : start + CHUNK], y)
        if classes is not None:
            block = block * (classes[0][start : start + CHUNK, None] == classes[1])
        sums.append(block.sum() if diagonal else block.sum() - block.diagonal(offset=start).sum())
    return torch.stack(sums).sum()


def check_rows(x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless both are [N, D] of one D, in float32 or float64."""
    for name, rows in (("generated", x), ("real", y)):
        if rows.ndim != 2 or rows.dtype not in PRECISE:
            raise ValueError(
                f"features: {name}: found {list(rows.shape)} of {rows.dtype}, expected [N, D] in float32 or float64 (a kernel "
                "mean in half precision is wrong)"
            )
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"features: found {x.shape[1]} dimensions of generated and {y.shape[1]} of real samples, expected one number"
        )


def check_estimator(estimator: str) -> None:
    """Raise ValueError for an unknown estimator."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: found {estimator!r}, expected one of {list(ESTIMATORS)}")


def _positive(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )
