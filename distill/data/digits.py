"""The data set of handwritten digits in scikit-learn: 1,797 images of 8x8 pixels in 10 classes (UCI optdigits)."""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.plain import plain_torch


class Digits:
    """The digits.

    Attributes:
        images: [1797,1,8,8] float32 in [-1, 1] (pixel / 8 - 1).
        labels: [1797] int64 in 0..9. classes: their names, "0".."9".
    """

    name = "digits"
    num_classes, value_range = 10, (-1.0, 1.0)
    classes = tuple(str(digit) for digit in range(10))
    sample_shape = (1, 8, 8)

    @plain_torch()
    def __init__(self) -> None:
        images, labels = _read()
        self.images: Tensor = images.clone()
        self.labels: Tensor = labels.clone()

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """Return images and labels at `rows`; the id of a sample is its row."""
        return Batch(ids=rows, index=index, cond=Cond.of_labels(self.labels[rows]), x0=self.images[rows])

    def fingerprint(self) -> str:
        """Return the sha256 of pixels and labels."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


@cache
def _read() -> tuple[Tensor, Tensor]:
    """Return (images, labels). Cached: every stage builds the data, and parsing the text file is slow."""
    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.float32).div_(8.0).sub_(1.0).unsqueeze(1).contiguous()
    return images, torch.from_numpy(data.target).to(torch.int64)
