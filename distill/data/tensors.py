"""Tensors as training data, for notebooks."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from distill.data.arguments import check_span, warn_of_span
from distill.data.batch import Batch
from distill.data.cond import Cond


class Tensors:
    """Samples with optional noise and labels.

    Args:
        x0: samples [n,*S].
        z: noise [n,*S] that a teacher mapped to `x0`.
        labels: classes [n], integers of at least 0.
        value_range: (-1, 1) for images, None for samples without a range (points, latents).

    Raises:
        ValueError: if lengths or shapes differ, labels are not integers of at least 0, values are not finite floats, or images
            are in another range than [-1, 1], such as [0, 255].
    """

    name = "tensors"

    def __init__(
        self,
        x0: Tensor,
        z: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        value_range: tuple[float, float] | None = (-1.0, 1.0),
    ) -> None:
        for name, values in (("x0", x0), ("z", z), ("labels", labels)):
            if values is not None and not isinstance(values, Tensor):
                raise ValueError(f"{name}: found {type(values).__name__}, expected a tensor")
            if values is not None and name != "labels" and not values.is_floating_point():
                raise ValueError(f"{name}: found values of {values.dtype}, expected floats")
            if values is not None and not bool(torch.isfinite(values).all()):
                raise ValueError(f"{name}: found values that are not finite")
        if x0.ndim < 2 or len(x0) < 1:
            raise ValueError(f"x0: expected [n, *S] with n >= 1, found shape {list(x0.shape)}")
        if z is not None and z.shape != x0.shape:
            raise ValueError(f"z: expected the shape of x0, {list(x0.shape)}, found {list(z.shape)}")
        if labels is not None and (
            labels.shape != x0.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool
        ):
            raise ValueError(
                f"labels: expected {len(x0)} integers, found {labels.dtype} {list(labels.shape)}"
            )
        if labels is not None and int(labels.min()) < 0:
            raise ValueError(f"labels: expected classes of at least 0, found {int(labels.min())}")
        if value_range not in (None, (-1.0, 1.0)):
            raise ValueError(f"value_range: found {value_range}, expected (-1, 1) or None")
        if value_range is not None:
            check_span("x0", x0)
        if value_range is not None and z is None:  # samples of a teacher are not clamped
            warn_of_span("x0", x0, stacklevel=2)
        self.images, self.z, self.labels, self.value_range = x0, z, labels, value_range
        self.sample_shape = tuple(x0.shape[1:])
        self.num_classes = 0 if labels is None else int(labels.max()) + 1

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """Return the samples at `rows` [B]; `index` [B] are their positions in the global batch."""
        cond = Cond.nothing(len(rows)) if self.labels is None else Cond.of_labels(self.labels[rows])
        return Batch(
            ids=rows, index=index, cond=cond, x0=self.images[rows], z=None if self.z is None else self.z[rows]
        )

    def fingerprint(self) -> str:
        """Return the sha256 of samples, noise and labels."""
        digest = hashlib.sha256()
        for part in (self.images, self.z, self.labels):
            if part is not None:
                digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
