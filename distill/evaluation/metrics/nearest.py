"""Distance to the training images, in pixels of [-1, 1]: what copies are found by."""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor

from distill.evaluation.checks import as_pair
from distill.evaluation.metric import Metric
from distill.evaluation.metrics.precision import squared_distances
from distill.evaluation.samples import Samples, stratified_split

CHUNK = 2048
HELDOUT_SPLITS = 5


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


def heldout_nn(real: Samples) -> float:
    """`nn_train` of held-out real images against the remaining ones, averaged over stratified splits: what a sampler without
    copies reaches."""
    size = min(real.options.heldout, len(real) // 4)
    generator = torch.Generator("cpu").manual_seed(real.options.seed)
    splits = (stratified_split(real.labels, len(real), size, generator) for _ in range(HELDOUT_SPLITS))
    return fmean(nn_train(real.values[held], real.values[rest]) for rest, held in splits)


NN_TRAIN = Metric(
    "nn_train",
    order=150,
    measure=lambda x: nn_train(x.values, x.real.values),
    meaning="distance to the nearest training image; far below that of held-out images: copies",
    of="images",
    title="nn train",
    better="real",
    monitored=True,
    real=heldout_nn,
    real_name="heldout_nn",
    real_words="held-out real images",
)
