"""Decodes an image file to 8-bit pixels; errors name the file."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from distill.data.listing import FORMATS, opened

GREY, COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "P", "PA")
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the Exif tag, and its values that swap height and width
LARGEST = 2**30 // 4 // 3  # pixels; Pillow's limit for decompression bombs
PNG = b"\x89PNG\r\n\x1a\n"


class Stamp(NamedTuple):
    """Identity of a file when it was listed; checked again when it is read."""

    path: str
    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path | str, status: os.stat_result) -> Stamp:
        """Return the stamp of a file with this status."""
        return cls(
            str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )


class Header(NamedTuple):
    """`grey`: whether the pixels are grey; `size`: (height, width) as displayed."""

    grey: bool
    size: tuple[int, int]


@contextmanager
def _strict(path: str) -> Iterator[None]:
    """Add the file name to Pillow's errors, and use the defaults of Pillow's global settings."""
    truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `header` raises for these
            yield
    except Exception as error:  # decoders raise any error for a broken file
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as an image: {reason}") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated


def header(stamp: Stamp) -> Header:
    """Read the header of a file without decoding its pixels. Of an MPO file (stereo or phone picture) the first frame is read.

    Raises:
        ValueError: names the file that cannot be read, has another mode than 8-bit grey, RGB or palette, has more than 8 bits
            per channel, several frames, or more than `LARGEST` pixels.
    """
    with _strict(stamp.path), _file(stamp) as file:
        start = file.read(26)
        file.seek(0)
        with Image.open(file, formats=FORMATS) as image:
            found = _properties(image, start)
    return _checked(found, stamp.path)


def decode(stamp: Stamp) -> Image.Image:
    """Decode an image and apply its Exif orientation. Colour profiles are ignored.

    Raises:
        ValueError: names the file that is broken, has changed since it was listed, or has transparent pixels.
    """
    with _strict(stamp.path):
        with _file(stamp) as file:
            content = file.read()
        with Image.open(BytesIO(content), formats=FORMATS) as first:
            image = _decoded(first, content)
    return _opaque(image, stamp.path)


def decode_bytes(content: bytes, where: str) -> tuple[Image.Image, Header]:
    """Decode an image in memory, which `where` names in errors; raises as `header` and `decode`."""
    with _strict(where):
        first = Image.open(BytesIO(content), formats=FORMATS)
        found = _properties(first, content[:26])
    properties = _checked(found, where)
    with _strict(where), first:
        image = _decoded(first, content)
    return _opaque(image, where), properties


def to_pixels(image: Image.Image, grey: bool, size: tuple[int, int], channels: int, where: str) -> Tensor:
    """Bytes [C,H,W] uint8 of a decoded image, centre-cropped to the aspect ratio of `size` (H, W) and resized bicubically
    with antialiasing where it has another size. `grey`: of its header. Raises ValueError for colour where channels=1."""
    height, width = size
    image = image.convert("L" if channels == 1 and grey else "RGB")
    if channels == 1 and not grey:
        image = _grey(image, where)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)


def to_float(pixels: Tensor) -> Tensor:
    """float32 in [-1, 1] of bytes uint8: byte / 127.5 - 1."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def _grey(image: Image.Image, where: str) -> Image.Image:
    """Return one channel of an RGB image. Raises ValueError unless its three channels are equal."""
    red, green, blue = (np.array(band) for band in image.split())
    if not (np.array_equal(red, green) and np.array_equal(red, blue)):
        raise ValueError(f"{where}: has colour, expected a grey image (channels=1)")
    return image.getchannel(0)


class _Properties(NamedTuple):
    """What a header says; `bits`: per channel of a PNG file, else 8; `size`: (height, width) as displayed."""

    mode: str
    size: tuple[int, int]
    frames: int
    bits: int


def _properties(image: Image.Image, start: bytes) -> _Properties:
    """Those of an image that was opened; `start`: the first 26 bytes of its file."""
    mode, (width, height), kind = image.mode, image.size, image.format
    frames = 1 if kind == "MPO" else getattr(image, "n_frames", 1)
    turned = image.getexif().get(ORIENTATION) in TURNED
    bits = start[24] if start.startswith(PNG) else 8
    return _Properties(mode, (width, height) if turned else (height, width), frames, bits)


def _checked(found: _Properties, path: str) -> Header:
    """The header of an image that is read; raises as `header`."""
    if found.mode not in GREY + COLOUR:
        raise ValueError(f"{path}: found pixels of mode {found.mode}, expected grey or RGB of 8 bits")
    if found.bits > 8:
        raise ValueError(
            f"{path}: found pixels of {found.bits} bits, expected grey or RGB of 8 bits; convert the file"
        )
    if found.frames != 1:
        raise ValueError(f"{path}: found {found.frames} frames, expected one")
    height, width = found.size
    if width * height > LARGEST:
        raise ValueError(f"{path}: found {height}x{width} pixels, expected at most {LARGEST} of them")
    return Header(found.mode in GREY, found.size)


def _decoded(first: Image.Image, content: bytes) -> Image.Image:
    """The pixels of an image that was opened, as displayed."""
    if content.startswith(PNG):
        _check_png(content)
    # `exif_transpose` copies images that are not turned.
    image = ImageOps.exif_transpose(first) if first.getexif().get(ORIENTATION, 1) != 1 else first
    if image.has_transparency_data:
        image = image.convert("RGBA")
    image.load()
    return image


def _opaque(image: Image.Image, path: str) -> Image.Image:
    if "A" in image.getbands() and image.getchannel("A").getextrema() != (255, 255):
        raise ValueError(f"{path}: has transparent pixels, expected opaque ones")
    return image


@contextmanager
def _file(stamp: Stamp) -> Iterator[BinaryIO]:
    """Open the file; before and after reading, check that it matches the stamp."""
    with os.fdopen(opened(Path(stamp.path)), "rb") as file:
        _check_same(stamp, os.fstat(file.fileno()))
        yield file
        _check_same(stamp, os.fstat(file.fileno()))


def _check_same(stamp: Stamp, status: os.stat_result) -> None:
    if (
        Stamp.of(stamp.path, status)[:-1] != stamp[:-1]
    ):  # a new link to the file counts as a change of its status
        raise ValueError("it has changed since its folder was listed")


def _check_png(content: bytes) -> None:
    """Raise ValueError for a truncated PNG or wrong checksums, which Pillow does not always detect."""
    position = len(PNG)
    while position + 12 <= len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        end = position + 12 + length
        body, crc = content[position + 4 : end - 4], content[end - 4 : end]
        if end > len(content):
            break
        picture = kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
        if picture and zlib.crc32(body) != int.from_bytes(crc, "big"):
            raise ValueError(f"its {kind.decode()} chunk has a wrong checksum")
        if kind == b"IEND":
            return
        position = end
    raise ValueError("it is truncated")
