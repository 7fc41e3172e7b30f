"""A folder of images as a data set: PNG, JPEG and WebP files, also in subfolders, kept in memory as bytes."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.captions import METADATA, read_captions
from distill.data.cond import Cond
from distill.data.decode import Stamp, decode, header, to_float, to_pixels
from distill.data.listing import SUFFIXES, Listing, find, find_each, utf8_path
from distill.data.plain import plain_torch

CHUNK = 1024  # images that `fingerprint` converts to float32 at once


class ImageFolder:
    """All images in a folder and its subfolders, sorted by path.

    Images are recognised by their content, not by their names. A file with several names or links is read once. Exif
    orientation is applied, colour profiles are ignored. If all images are in subfolders of `path` and there are at least two
    of these, the subfolders are the classes. Skipped files (hidden files, thumbnails of other programs, files that are not
    images) cause a warning. Memory: n * C * H * W bytes.

    Args:
        path: of the folder.
        resolution: a side or [H, W]; images of another size are centre-cropped to this aspect ratio and resized bicubically
            with antialiasing. None: all images must have the same size.
        channels: 1 or 3. None: 1 if all files are grey, else 3. With 1, colour files must have three equal channels.
        caption: the entry of captions in the lines of `metadata.jsonl` (see `captions.read_captions`), which replace classes;
            None: no captions.

    Attributes:
        images: [n,C,H,W] float32 in [-1, 1] (byte / 127.5 - 1).
        labels: [n] int64 indices of the sorted `classes` (numerically, if all names are numbers), or None.
        num_classes: 0 without classes.
        resized: a note on resizing for reports; empty if no image was resized.
        remarks: a note on skipped files, subfolders without images, and missing classes; empty if there is nothing to note.

    Raises:
        FileNotFoundError: if the folder does not exist or contains no image.
        OSError: names a folder that cannot be listed or a file that cannot be read.
        ValueError: names the first file that is broken, has another size, transparent pixels, several frames, more than 8
            bits or another image format, a broken link, or an image in two classes.
    """

    value_range = (-1.0, 1.0)

    @plain_torch()
    def __init__(
        self,
        path: str | Path,
        resolution: int | Sequence[int] | None = None,
        channels: int | None = None,
        caption: str | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        self.name = utf8_path(self.path.resolve().name)
        if channels not in (None, 1, 3) or isinstance(channels, bool):
            raise ValueError(f"channels: found {channels!r}, expected 1 (grey), 3 (RGB) or null")
        size = size_of(resolution)
        listing = find(self.path)
        if not listing.files:
            left = f"; {listing.words()}" if listing.left_out else ""
            raise FileNotFoundError(
                f"{path}: no images; expected {', '.join(SUFFIXES[:4])} files in it or below{left}"
            )
        files = [file for file, _ in listing.files]
        self._captions = None if caption is None else read_captions(self.path, caption, files)
        if caption is not None:
            listing.take(self.path / METADATA)
        tops = [parts[0] if len(parts := f.relative_to(self.path).parts) > 1 else None for f in files]
        self.classes = _classes(tops) if caption is None else ()
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
        self.remarks = _remarks(listing, tops) if caption is None else listing.words()
        self.sample_shape = tuple(self.pixels.shape[1:])
        self.num_classes = len(self.classes)
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = torch.tensor([number[str(top)] for top in tops]) if self.classes else None
        if listing.left_out:
            warnings.warn(f"{utf8_path(self.path)}: {listing.words()}", stacklevel=4)

    @property
    def images(self) -> Tensor:
        """All images [n,C,H,W] float32 in [-1, 1]; converted at each access."""
        return to_float(self.pixels)

    def __len__(self) -> int:
        return len(self.pixels)

    def captions(self) -> list[str]:
        """The captions of all images. Raises ValueError for a folder that was read without."""
        if self._captions is None:
            raise ValueError(
                "caption: found null, expected the entry of captions in metadata.jsonl, such as text"
            )
        return self._captions

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """Return images and labels at `rows`; the id of a sample is its row."""
        cond = Cond.nothing(len(rows)) if self.labels is None else Cond.of_labels(self.labels[rows])
        return Batch(ids=rows, index=index, cond=cond, x0=to_float(self.pixels[rows]))

    @plain_torch()
    def fingerprint(self) -> str:
        """Return the sha256 of float32 pixels, labels and captions; names of files matter only for order and classes."""
        digest = hashlib.sha256()
        for part in self.pixels.split(CHUNK):
            digest.update(to_float(part).numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        if self._captions is not None:
            digest.update(json.dumps(self._captions).encode())
        return digest.hexdigest()


def holds_images(folder: Path) -> bool:
    """Return whether `folder` or a subfolder contains an image. Raises as `listing.find` for the files that it reads."""
    return next(find_each(folder, Listing(folder)), None) is not None


def size_of(resolution: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Return (H, W) of the option `resolution`, or None."""
    if resolution is None:
        return None
    sides = [resolution, resolution] if isinstance(resolution, int) else list(resolution)
    if len(sides) != 2 or any(not isinstance(s, int) or isinstance(s, bool) or s < 1 for s in sides):
        raise ValueError(
            f"resolution: found {resolution!r}, expected a side or [height, width] of at least 1"
        )
    return sides[0], sides[1]


def _remarks(listing: Listing, tops: Sequence[str | None]) -> str:
    """Return `ImageFolder.remarks`."""
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
    """Return the sorted subfolders if every image is in one and there are at least two; else an empty tuple."""
    names = {top for top in tops if top is not None}
    if None in tops or len(names) < 2:
        return ()
    numbered = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if numbered else 0, name)))


@lru_cache(maxsize=2)  # a run builds its data several times: for fingerprints, training and evaluation
def _read(
    stamps: tuple[Stamp, ...], size: tuple[int, int] | None, channels: int | None
) -> tuple[Tensor, bool]:
    """Return (bytes [n,C,H,W] uint8, whether any image was resized)."""
    found = [header(stamp) for stamp in stamps]
    if size is None:
        first = found[0].size
        for stamp, (_, other) in zip(stamps, found, strict=True):
            if other != first:
                raise ValueError(
                    f"{stamp.path}: found {other[0]}x{other[1]} pixels (height x width), but {stamps[0].path} has "
                    f"{first[0]}x{first[1]}; expected one size; resolution=... resizes the images"
                )
    if channels is None:
        channels = 1 if all(grey for grey, _ in found) else 3
    height, width = found[0].size if size is None else size
    pixels = torch.empty(len(stamps), channels, height, width, dtype=torch.uint8)
    for row, stamp, (grey, _) in zip(pixels, stamps, found, strict=True):
        row.copy_(to_pixels(decode(stamp), grey, (height, width), channels, stamp.path))
    return pixels, any(other != (height, width) for _, other in found)
