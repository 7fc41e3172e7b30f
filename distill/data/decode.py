"""One image file to its pixels of 8 bits, or a message that names it."""

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

from PIL import Image, ImageFile, ImageOps

from distill.data.listing import FORMATS, opened

GREY, COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "P", "PA")
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the Exif tag, and its values that swap height and width
LARGEST = 2**30 // 4 // 3  # pixels, the limit of Pillow beyond which it suspects an attack
PNG = b"\x89PNG\r\n\x1a\n"


class Stamp(NamedTuple):
    """A file as it was listed: what is read must still be that."""

    path: str
    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path | str, status: os.stat_result) -> Stamp:
        """The stamp of a status."""
        return cls(
            str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        )


class Header(NamedTuple):
    """Whether the pixels are grey, and (height, width) as displayed."""

    grey: bool
    size: tuple[int, int]


@contextmanager
def _strict(stamp: Stamp) -> Iterator[None]:
    """Errors of Pillow name the file; its global switches are as it starts with them."""
    truncated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused by `header`
            yield
    except Exception as error:  # a broken file ends in whatever its decoder stumbles over
        told = " ".join(str(error).split())
        raise ValueError(f"{stamp.path}: cannot be read as an image: {told}") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated


def header(stamp: Stamp) -> Header:
    """The header of a file, without decoding the pixels.

    Raises ValueError naming the file: not readable, of another mode than 8-bit grey, RGB or a palette, more than 8 bits a
    channel (also where Pillow would cut them), several frames (of a stereo or phone picture, MPO, the first is taken), or
    too many pixels.
    """
    with _strict(stamp), _file(stamp) as file:
        start = file.read(26)
        file.seek(0)
        with Image.open(file, formats=FORMATS) as image:
            mode, (width, height), kind = image.mode, image.size, image.format
            frames = 1 if kind == "MPO" else getattr(image, "n_frames", 1)
            turned = image.getexif().get(ORIENTATION) in TURNED
    path = stamp.path
    if mode not in GREY + COLOUR:
        raise ValueError(f"{path}: found pixels of mode {mode}, expected grey or RGB of 8 bits")
    if start.startswith(PNG) and start[24] > 8:
        raise ValueError(
            f"{path}: found pixels of {start[24]} bits, expected grey or RGB of 8 bits; convert it first"
        )
    if frames != 1:
        raise ValueError(f"{path}: found {frames} frames, expected one")
    if width * height > LARGEST:
        raise ValueError(f"{path}: found {height}x{width} pixels, expected at most {LARGEST} of them")
    return Header(mode in GREY, (width, height) if turned else (height, width))


def decode(stamp: Stamp) -> Image.Image:
    """The image as displayed (Exif orientation applied), opaque; values are those of the file, whatever colour profile it
    names. Raises ValueError naming a file that is broken, has changed or has transparent pixels."""
    with _strict(stamp):
        with _file(stamp) as file:
            content = file.read()
        if content.startswith(PNG):
            _check_png(content)
        with Image.open(BytesIO(content), formats=FORMATS) as first:
            image = ImageOps.exif_transpose(first)
            if image.has_transparency_data:
                image = image.convert("RGBA")
            image.load()
    if "A" in image.getbands() and image.getchannel("A").getextrema() != (255, 255):
        raise ValueError(f"{stamp.path}: has transparent pixels, expected opaque ones")
    return image


@contextmanager
def _file(stamp: Stamp) -> Iterator[BinaryIO]:
    """The open file, which is the one of the stamp before and after it is read."""
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
    """Raise ValueError for a PNG that is cut off, or whose picture does not have its checksums: Pillow reads some of them."""
    position = len(PNG)
    while position + 12 <= len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        end = position + 12 + length
        body, crc = content[position + 4 : end - 4], content[end - 4 : end]
        if end > len(content):
            break
        picture = kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT")
        if picture and zlib.crc32(body) != int.from_bytes(crc, "big"):
            raise ValueError(f"its {kind.decode()} chunk does not have its checksum")
        if kind == b"IEND":
            return
        position = end
    raise ValueError("it is cut off")
