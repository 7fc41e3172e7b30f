"""The discrepancy between features of samples and of real data, with what is known of the real ones before training."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.methods.families.feature_space import RealRows
from distill.models.kernels import Kernel, Terms, check_estimator, mean_within, mmd2

SMALL, LARGE = (
    1e-3,
    10.0,
)  # mean gamma |y|^2 of kernels of products beyond which the kernel hardly sees, or only sees, sizes


class Discrepancy:
    """MMD^2 with a kernel.

    Args:
        kernel: where its gamma is "median", `learn` sets it. estimator: see `models.kernels`.
        classes: the kernel is 0 between samples of different classes.
        scale: "none", or "rms": features are to be divided by the root mean square of the real ones.

    Attributes:
        measured: `scale` and, where it is learned, `gamma`: numbers of real features, for checkpoints. Empty before `learn`.

    Raises:
        ValueError: an unknown estimator or scale.
    """

    def __init__(self, kernel: Kernel, estimator: str, classes: bool, scale: str) -> None:
        check_estimator(estimator)
        if scale not in ("none", "rms"):
            raise ValueError(f"feature_scale: found {scale!r}, expected 'none' or 'rms'")
        self.kernel, self.estimator, self.classes, self.rms = kernel, estimator, classes, scale == "rms"
        self.measured: dict[str, float] = {}
        self.bank: RealRows | None = None
        self.yy: Tensor | None = None

    @torch.no_grad()
    def learn(self, real: RealRows, *, keep: bool) -> float:
        """Measure real features [M, D], unless `measured` has the numbers already; `keep` them as the bank that samples are
        compared with. Returns the scale that features are to be divided by. Reads the device.

        Raises:
            ValueError: features that have no scale, or no classes where classes are compared.
        """
        if self.classes and real.classes is None:
            raise ValueError("classes: found true, but the real samples have no labels; expected false")
        if not self.measured:
            self.measured = self._measure(real.rows)
        scale = self.measured["scale"]
        if "gamma" in self.measured:
            self.kernel = replace(self.kernel, gamma=self.measured["gamma"])
        rows = real.rows / scale
        self._warn(rows)
        if keep:
            self.bank = RealRows(rows, real.classes)
            self.yy = mean_within(self.kernel, rows, real.classes if self.classes else None, self.estimator)
        return scale

    def _measure(self, rows: Tensor) -> dict[str, float]:
        found = {"scale": float(rows.square().mean().sqrt()) if self.rms else 1.0}
        if not found["scale"] > 0:
            raise ValueError("feature_scale: found 'rms', but all real features are 0; expected 'none'")
        if self.kernel.gamma == "median":
            gamma = self.kernel.settled(rows / found["scale"]).gamma
            assert isinstance(gamma, float)
            found["gamma"] = gamma
        return found

    def _warn(self, rows: Tensor) -> None:
        """Warn of features whose size does not suit the kernel."""
        if self.kernel.on_distances:
            return
        gamma = self.kernel.gamma
        assert not isinstance(gamma, str)
        size = float(rows.square().sum(1).mean()) * (1 / rows.shape[1] if gamma is None else gamma)
        if not SMALL <= size <= LARGE:
            warnings.warn(
                f"kernel: gamma |y|^2 of real features is {size:.3g} on average, where the kernel {self.kernel.name!r} expects "
                f"{SMALL:g} .. {LARGE:g}; use feature_scale=rms",
                stacklevel=2,
            )

    def labels(self, cond: Cond) -> Tensor:
        """The class labels [B] of conditions. Raises ValueError where they have none."""
        found = cond.get("label")
        if found is None:
            raise ValueError("classes: found true, but the data have no labels; expected false")
        return found

    def __call__(
        self, rows: Tensor, labels: Tensor | None, real: Tensor | None, real_labels: Tensor | None
    ) -> Terms:
        """The terms of MMD^2 of samples' rows [N, D] and `real` ones [M, D], or with None the bank's; labels: [N], [M], where
        classes are compared."""
        if real is None:
            if self.bank is None:
                raise ValueError(
                    "bank: is not filled; call before_training(source), as the engine does, before the first step"
                )
            real, real_labels = self.bank.rows, self.bank.classes
        pair = None
        if labels is not None and real_labels is not None:
            pair = (labels, real_labels)
        return mmd2(rows, real, self.kernel, self.estimator, pair, None if self.bank is None else self.yy)
