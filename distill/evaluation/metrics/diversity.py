"""Spread of samples and distance to the training set, in pixels of [-1, 1].

Samples that collapse to class means gain precision and class accuracy; what falls is spread within a class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.evaluation.checks import as_pair, as_rows, check_labels
from distill.evaluation.metrics.precision import squared_distances

CHUNK = 2048


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


def nearest_distances(images: Tensor, train: Tensor) -> Tensor:
    """Euclidean pixel distance [N] of each of images [N, ...] to the nearest of train [M, ...].

    Raises ValueError for an empty set, differing sizes or non-finite pixels.
    """
    x, y = as_pair(("images", "training images"), images, train)
    nearest = []
    for rows in x.split(CHUNK):
        blocks = [squared_distances(rows, part).amin(1) for part in y.split(CHUNK)]
        nearest.append(torch.stack(blocks).amin(0).sqrt())
    return torch.cat(nearest)


def nn_train(images: Tensor, train: Tensor) -> float:
    """Mean of `nearest_distances`; clearly below the value of held-out images it means memorised samples."""
    return float(nearest_distances(images, train).mean())
