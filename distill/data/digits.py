"""The embedded data set: 1,797 handwritten digits of 8x8 pixels in 10 classes (UCI optdigits, shipped inside
scikit-learn)."""

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
    """All 1,797 digits as `images` [n,1,8,8] float32 in [-1, 1] (pixel / 8 - 1) with `labels` [n] int64 in
    0..9, which are also the names of the `classes`."""

    name = "digits"
    num_classes = 10
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
        """Images and labels at `rows`; the id of a sample is its row."""
        return Batch(ids=rows, index=index, cond=Cond.of_labels(self.labels[rows]), x0=self.images[rows])

    def fingerprint(self) -> str:
        """sha256 over the pixels and the labels."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


@cache
def _read() -> tuple[Tensor, Tensor]:
    """(images, labels), read once a process: a plan builds the data of every stage, and the file is text."""
    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.float32).div_(8.0).sub_(1.0).unsqueeze(1).contiguous()
    return images, torch.from_numpy(data.target).to(torch.int64)
