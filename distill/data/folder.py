"""A folder of images as a data set: PNG, JPEG and WebP files in any depth, read once and kept as bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from distill.data.batch import Batch
from distill.data.cond import Cond

FORMATS = ("PNG", "JPEG", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# Images as well, but not read: a folder that holds some would be measured without them.
OTHER_IMAGES = (".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".jxl", ".ppm", ".pgm")
GREY, COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "P", "PA")
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the Exif tag, and its values that swap height and width
CHUNK = 1024  # images that the fingerprint converts to float32 at once


class ImageFolder:
    """Every image below `path` (hidden folders and files of other kinds left out), in the order of their paths.

    `images` [n,C,H,W] float32 in [-1, 1] (byte / 127.5 - 1); C is 1 where all files are grey, else 3. Where all
    images lie in at least two sub-folders of `path`, the sub-folder is the class: `labels` [n] int64 number the
    sorted `classes` (numerically, where all names are numbers); else `labels` is None and `num_classes` 0.
    All images must have one size, unless `resolution` (a side, or [H, W]) is given: then those of another size are
    cropped around their centre to its aspect and resized bicubically with antialiasing; `resized` says so in words,
    and is "" where nothing was resized. The bytes stay in memory: n * C * H * W of them.
    Exif orientation is applied. Raises FileNotFoundError without a folder or an image in it, and ValueError naming
    the first file that cannot be read, has another size, transparent pixels, several frames or more than 8 bits.
    """

    def __init__(self, path: str, resolution: int | Sequence[int] | None = None) -> None:
        self.path = Path(path).expanduser()
        self.name = self.path.resolve().name
        size = _size(resolution)
        files = tuple(_files(self.path))
        if not files:
            raise FileNotFoundError(f"{path}: no images; expected {', '.join(SUFFIXES)} files in it or below")
        stamps = tuple((str(f), (s := f.stat()).st_mtime_ns, s.st_size) for f in files)
        self.pixels, resized = _read(stamps, size)
        self.resized = ""
        if size is not None and resized:
            self.resized = f"resized to {size[0]}x{size[1]} (centre crop, bicubic with antialiasing)"
        self.sample_shape = tuple(self.pixels.shape[1:])
        tops = [parts[0] if len(parts := f.relative_to(self.path).parts) > 1 else None for f in files]
        self.classes = _classes(tops)
        self.num_classes = len(self.classes)
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = torch.tensor([number[str(top)] for top in tops]) if self.classes else None

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
    """Whether at least one image lies in `folder` or below."""
    return next(_files(folder), None) is not None


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


def _files(folder: Path) -> Iterator[Path]:
    """The image files below `folder`, folder by folder in sorted order; links to folders are followed."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a folder of images")
    for root, folders, names in os.walk(folder, followlinks=True):
        here = Path(root)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (here / name).is_symlink() and here.resolve().is_relative_to((here / name).resolve()):
                raise ValueError(f"{here / name}: links back to a folder that it lies in")
        for name in sorted(names):
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                continue
            if suffix in OTHER_IMAGES:
                raise ValueError(f"{here / name}: found a {suffix} file, expected {', '.join(SUFFIXES)}")
            if suffix in SUFFIXES:
                yield here / name


def _classes(tops: Sequence[str | None]) -> tuple[str, ...]:
    """The sorted sub-folders, where every image lies in one and there are at least two."""
    names = {top for top in tops if top is not None}
    if None in tops or len(names) < 2:
        return ()
    numbered = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbered else 0, name)))


@lru_cache(maxsize=2)  # a run asks for its data several times: to fingerprint them, to train, to measure
def _read(stamps: tuple[tuple[str, int, int], ...], size: tuple[int, int] | None) -> tuple[Tensor, bool]:
    """(bytes [n,C,H,W] uint8, whether any image was resized) of files known by path, time and length."""
    files = [Path(path) for path, _, _ in stamps]
    found = [_header(file) for file in files]
    if size is None:
        for file, (_, other) in zip(files, found, strict=True):
            if other != found[0][1]:
                raise ValueError(
                    f"{file}: found {other[0]}x{other[1]} pixels (height x width), but {files[0]} has "
                    f"{found[0][1][0]}x{found[0][1][1]}; expected one size, or resolution=..., which resizes"
                )
    channels = 1 if all(grey for grey, _ in found) else 3
    height, width = found[0][1] if size is None else size
    pixels = torch.empty(len(files), channels, height, width, dtype=torch.uint8)
    for row, file in zip(pixels, files, strict=True):
        image = _decode(file).convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            # The largest centred part of the wanted aspect, so that nothing is stretched.
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        row.copy_(torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1))
    return pixels, any(other != (height, width) for _, other in found)


def _header(file: Path) -> tuple[bool, tuple[int, int]]:
    """(whether grey, (H, W) as displayed), without decoding the pixels."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            mode, (width, height), frames = image.mode, image.size, getattr(image, "n_frames", 1)
            turned = image.getexif().get(ORIENTATION) in TURNED
    except Exception as error:  # a broken file ends in whatever its decoder stumbles over
        raise ValueError(f"{file}: cannot be read as an image: {error}") from error
    if mode not in GREY + COLOUR:
        raise ValueError(f"{file}: found pixels of mode {mode}, expected grey or RGB of 8 bits")
    if frames != 1:
        raise ValueError(f"{file}: found {frames} frames, expected one")
    return mode in GREY, (width, height) if turned else (height, width)


def _decode(file: Path) -> Image.Image:
    """The image as displayed, opaque."""
    try:
        with Image.open(file, formats=FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
            image.load()
    except Exception as error:
        raise ValueError(f"{file}: cannot be read as an image: {error}") from error
    if "A" in image.getbands() and image.getchannel("A").getextrema() != (255, 255):
        raise ValueError(f"{file}: has transparent pixels, expected opaque ones")
    return image
