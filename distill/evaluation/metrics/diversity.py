"""Spread of samples, in pixels of [-1, 1].

Samples that collapse to class means gain precision and class accuracy; what falls is spread within a class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.evaluation.checks import as_rows, check_labels
from distill.evaluation.metric import Metric
from distill.evaluation.samples import Samples


def pixel_std(images: Tensor) -> float:
    """Standard deviation over samples of each pixel (divisor N - 1), averaged over pixels.

    images [N, ...]; raises ValueError for N < 2 or non-finite pixels.
    """
    return float(as_rows("images", images, at_least=2).std(0).mean())


def class_std(images: Tensor, labels: Tensor) -> float:
    """Standard deviation of each pixel over one class' samples, averaged over pixels, then over classes.

    images [N, ...], labels [N] integer. Every class that occurs weighs the same, so the value does not move
    with the class frequencies; a class that never occurs does not enter. Raises ValueError if a class that
    occurs has one sample only.
    """
    rows = as_rows("images", images, at_least=2)
    check_labels("class_std", labels, len(rows))
    labels = labels.to(rows.device)
    spreads = []
    for label in labels.unique().tolist():
        members = rows[labels == label]
        if len(members) < 2:
            raise ValueError(f"class_std: class {label} has one sample, its deviation is undefined")
        spreads.append(members.std(0).mean())
    return float(torch.stack(spreads).mean())


def _class_std(x: Samples) -> float | None:
    """None without labels, or where a class has one sample only (a smoke run)."""
    if x.labels is None or int(x.labels.unique(return_counts=True)[1].min()) < 2:
        return None
    return class_std(x.values, x.labels)


def _pixel_std(x: Samples) -> float:
    return pixel_std(x.values)


CLASS_STD = Metric(
    "class_std",
    order=130,
    measure=_class_std,
    meaning="spread of a pixel within a class",
    of="images",
    title="class std",
    better="real",
    monitored=True,
    reads=("values", "labels"),
    real=_class_std,
)
PIXEL_STD = Metric(
    "pixel_std",
    order=140,
    measure=_pixel_std,
    meaning="spread of a pixel over all samples",
    of="images",
    form="",
    better="real",
    monitored=True,
    real=_pixel_std,
)
