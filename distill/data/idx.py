"""Data sets in IDX files, the format of MNIST: Fashion-MNIST as Debian packages it."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.decode import to_float
from distill.data.plain import plain_torch

FOLDER = "/usr/share/datasets/fashion-mnist"
FILES = {"train": "train", "test": "t10k"}
CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
LARGEST = 2**31  # bytes of a file


class FashionMnist:
    """Fashion-MNIST (Xiao et al. 2017; licence MIT): 60,000 or 10,000 grey images of 28x28 pixels in 10 classes, padded with
    black to 32x32 and kept in memory as bytes.

    Args:
        path: a folder with `train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz` and the two files of `t10k`, as the
            Debian package `dataset-fashion-mnist` installs them. Other data in files of these names are read as well.
        split: train or test.
        size: pixels of a side after padding, at least that of the images.

    Raises:
        FileNotFoundError: names the missing file and how to get it.
        ValueError: names the option, or the file that is truncated, of another format, or does not fit the other one.
    """

    name, classes = "fashion_mnist", CLASSES
    num_classes, value_range = len(CLASSES), (-1.0, 1.0)

    @plain_torch()
    def __init__(self, path: str = FOLDER, split: str = "train", size: int = 32) -> None:
        if split not in FILES:
            raise ValueError(f"split: found {split!r}, expected one of {list(FILES)}")
        stem = Path(path).expanduser() / FILES[split]
        self.pixels = read_idx(Path(f"{stem}-images-idx3-ubyte.gz"), 3)[:, None]
        self.labels = read_idx(Path(f"{stem}-labels-idx1-ubyte.gz"), 1).to(torch.int64)
        count, _, height, width = self.pixels.shape
        if len(self.labels) != count:
            raise ValueError(f"path: {path}: found {count} images, but {len(self.labels)} labels")
        if int(self.labels.max()) >= self.num_classes:
            raise ValueError(f"path: {path}: found the label {int(self.labels.max())}, expected 0 .. 9")
        if type(size) is not int or size < max(height, width):
            raise ValueError(f"size: found {size!r}, expected an integer of at least {max(height, width)}")
        self._pad = tuple(
            part for side in (width, height) for part in ((size - side) // 2, (size - side + 1) // 2)
        )
        self.sample_shape = (1, size, size)

    def __len__(self) -> int:
        return len(self.pixels)

    def _float(self, pixels: Tensor) -> Tensor:
        return to_float(pad(pixels, self._pad))

    @property
    def images(self) -> Tensor:
        """All images [n,1,size,size] float32 in [-1, 1]; converted at each access."""
        return self._float(self.pixels)

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """Images and labels at `rows`; the id of a sample is its row."""
        cond = Cond.of_labels(self.labels[rows])
        return Batch(ids=rows, index=index, cond=cond, x0=self._float(self.pixels[rows]))

    def fingerprint(self) -> str:
        """The sha256 of pixels and labels, and the padding."""
        digest = hashlib.sha256(self.pixels.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes() + repr(self._pad).encode())
        return digest.hexdigest()


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The bytes of a gzipped IDX file of so many dimensions, as uint8. Raises FileNotFoundError or ValueError naming it."""
    if not path.is_file():
        raise FileNotFoundError(
            f"path: {path}: missing; python scripts/data/fashion_mnist.py FOLDER gets it, or apt-get install "
            "dataset-fashion-mnist"
        )
    status = path.stat()
    return _read(path, dimensions, (status.st_size, status.st_mtime_ns)).clone()


@lru_cache(maxsize=4)  # a run builds its data several times
def _read(path: Path, dimensions: int, stamp: tuple[int, int]) -> Tensor:
    try:
        with gzip.open(path) as file:
            content = file.read(LARGEST)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"path: {path}: is truncated or not compressed with gzip: {error}") from error
    start = 4 + 4 * dimensions
    # Two zero bytes, the type (8: unsigned bytes), the number of dimensions, and their big-endian sizes.
    if len(content) < start or content[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"path: {path}: is no IDX file of bytes in {dimensions} dimensions")
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if math.prod(sizes) != len(content) - start or not all(sizes):
        raise ValueError(
            f"path: {path}: found {len(content) - start} bytes, expected {' x '.join(map(str, sizes))}"
        )
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(sizes)
