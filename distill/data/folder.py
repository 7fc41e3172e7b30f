"""A folder of images as a data set: PNG, JPEG and WebP files in any depth, read once and kept as bytes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.decode import Stamp, decode, header
from distill.data.listing import SUFFIXES, Listing, find, utf8_path, walk
from distill.data.plain import plain_torch

CHUNK = 1024  # images that the fingerprint converts to float32 at once


class ImageFolder:
    """Every image below `path`, in the order of the paths. Which files are images is told by their content, not by their
    names; each is read once, under whatever names and links it is found.

    `images` [n,C,H,W] float32 in [-1, 1] (byte / 127.5 - 1); C is 1 where all files are grey, else 3, unless `channels`
    says which: 1 takes colour files whose three channels are equal as grey, 3 repeats grey ones. Where all images lie in
    at least two sub-folders of `path`, the sub-folder is the class: `labels` [n] int64 number the sorted `classes`
    (numerically, where all names are numbers); else `labels` is None and `num_classes` 0.
    All images must have one size, unless `resolution` (a side, or [H, W]) is given: then those of another size are
    cropped around their centre to its aspect and resized bicubically with antialiasing; `resized` says so in words,
    and is "" where nothing was resized. The bytes stay in memory: n * C * H * W of them.
    `remarks` says in words what was left out (hidden files, thumbnails of other programs, second names of one image, files
    that are no images), which sub-folders hold no image, and why there are no classes; "" for nothing. What was left out
    is also a warning. Exif orientation is applied, a colour profile is not. Raises FileNotFoundError without a folder or an
    image in it, OSError naming what cannot be listed or read, and ValueError naming the first file that is broken, has
    another size, transparent pixels, several frames or more than 8 bits, an image of a kind that is not read, a broken
    link, or one image in two classes.
    """

    @plain_torch()
    def __init__(
        self,
        path: str | Path,
        resolution: int | Sequence[int] | None = None,
        channels: int | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        self.name = utf8_path(self.path.resolve().name)
        if channels not in (None, 1, 3) or isinstance(channels, bool):
            raise ValueError(f"channels: found {channels!r}, expected 1 (grey), 3 (RGB) or null")
        size = _size(resolution)
        listing = find(self.path)
        if not listing.files:
            left = f"; {listing.words()}" if listing.left_out else ""
            raise FileNotFoundError(
                f"{path}: no images; expected {', '.join(SUFFIXES[:4])} files in it or below{left}"
            )
        files = [file for file, _ in listing.files]
        tops = [parts[0] if len(parts := f.relative_to(self.path).parts) > 1 else None for f in files]
        self.classes = _classes(tops)
        if self.classes and listing.twice:
            first, second = listing.twice[0]
            raise ValueError(
                f"{second}: is the same file or folder as {first}, under another class; expected each image in one class"
            )
        self.pixels, resized = _read(
            tuple(Stamp.of(file, status) for file, status in listing.files), size, channels
        )
        self.resized = ""
        if size is not None and resized:
            self.resized = f"resized to {size[0]}x{size[1]} (centre crop, bicubic with antialiasing)"
        self.remarks = _remarks(listing, tops)
        self.sample_shape = tuple(self.pixels.shape[1:])
        self.num_classes = len(self.classes)
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = torch.tensor([number[str(top)] for top in tops]) if self.classes else None
        if listing.left_out:
            warnings.warn(f"{utf8_path(self.path)}: {listing.words()}", stacklevel=4)

    @property
    def images(self) -> Tensor:
        """All images [n,C,H,W] float32 in [-1, 1]; converted anew at each call."""
        return _to_float(self.pixels)

    def __len__(self) -> int:
        return len(self.pixels)

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """Images and labels at `rows`; the id of a sample is its row."""
        cond = Cond.nothing(len(rows)) if self.labels is None else Cond.of_labels(self.labels[rows])
        return Batch(ids=rows, index=index, cond=cond, x0=_to_float(self.pixels[rows]))

    @plain_torch()
    def fingerprint(self) -> str:
        """sha256 over the float32 pixels and the labels: where the files lie and what they are called does not
        matter, except for their order and classes."""
        digest = hashlib.sha256()
        for part in self.pixels.split(CHUNK):
            digest.update(_to_float(part).numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


def holds_images(folder: Path) -> bool:
    """Whether at least one image lies in `folder` or below. Raises what reading them would for a file that it meets."""
    return next(walk(folder, Listing(folder)), None) is not None


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def _size(resolution: int | Sequence[int] | None) -> tuple[int, int] | None:
    """(H, W) of the option `resolution`."""
    if resolution is None:
        return None
    sides = [resolution, resolution] if isinstance(resolution, int) else list(resolution)
    if len(sides) != 2 or any(not isinstance(s, int) or isinstance(s, bool) or s < 1 for s in sides):
        raise ValueError(
            f"resolution: found {resolution!r}, expected a side or [height, width] of at least 1"
        )
    return sides[0], sides[1]


def _remarks(listing: Listing, tops: Sequence[str | None]) -> str:
    """`ImageFolder.remarks`."""
    parts = [words] if (words := listing.words()) else []
    left = {path for paths in listing.left_out.values() for path in paths}
    empty = sorted(name for name in listing.tops - set(tops) if listing.root / name not in left)
    if empty:
        shown = ", ".join(utf8_path(name) for name in empty[:3]) + (", ..." if len(empty) > 3 else "")
        parts.append(f"{len(empty)} sub-folders without images ({shown})")
    loose = tops.count(None)
    if loose and len(set(tops)) > 2:
        parts.append(f"no classes, since {loose} images lie in no sub-folder")
    return "; ".join(parts)


def _classes(tops: Sequence[str | None]) -> tuple[str, ...]:
    """The sorted sub-folders, where every image lies in one and there are at least two."""
    names = {top for top in tops if top is not None}
    if None in tops or len(names) < 2:
        return ()
    numbered = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbered else 0, name)))


@lru_cache(maxsize=2)  # a run asks for its data several times: to fingerprint them, to train, to measure
def _read(
    stamps: tuple[Stamp, ...], size: tuple[int, int] | None, channels: int | None
) -> tuple[Tensor, bool]:
    """(bytes [n,C,H,W] uint8, whether any image was resized) of files as they were listed."""
    found = [header(stamp) for stamp in stamps]
    if size is None:
        first = found[0].size
        for stamp, (_, other) in zip(stamps, found, strict=True):
            if other != first:
                raise ValueError(
                    f"{stamp.path}: found {other[0]}x{other[1]} pixels (height x width), but {stamps[0].path} has "
                    f"{first[0]}x{first[1]}; expected one size, or resolution=..., which resizes"
                )
    if channels is None:
        channels = 1 if all(grey for grey, _ in found) else 3
    height, width = found[0].size if size is None else size
    pixels = torch.empty(len(stamps), channels, height, width, dtype=torch.uint8)
    for row, stamp, (grey, _) in zip(pixels, stamps, found, strict=True):
        image = decode(stamp).convert("L" if channels == 1 and grey else "RGB")
        if channels == 1 and not grey:
            image = _grey(image, stamp)
        if image.size != (width, height):
            # The largest centred part of the wanted aspect, so that nothing is stretched.
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        row.copy_(torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1))
    return pixels, any(other != (height, width) for _, other in found)


def _grey(image: Image.Image, stamp: Stamp) -> Image.Image:
    """The one channel of an RGB image of three equal ones."""
    red, green, blue = (np.array(band) for band in image.split())
    if not (np.array_equal(red, green) and np.array_equal(red, blue)):
        raise ValueError(f"{stamp.path}: has colour, expected a grey image (channels=1)")
    return image.getchannel(0)
