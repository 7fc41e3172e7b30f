"""Finds images in a folder by their content; lists every skipped file with the reason."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP")
READ = "PNG, JPEG or WebP"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".apng", ".jfif", ".jif", ".jpe", ".mpo", ".pjp", ".pjpeg")
# Image formats that are not read. They raise, so that no image is skipped silently. Some are unknown to Pillow.
_OTHER = """
    arw avif avifs bmp cr2 cr3 dcm dds dib dng exr fits gif hdr heic heif hif icns ico j2c j2k jp2 jpc jpf jpx jxl jxr nef
    orf pbm pcx pfm pgm pnm ppm psd qoi raf raw rw2 sgi svg tga tif tiff xbm xpm
"""
OTHER_SUFFIXES = frozenset(f".{suffix}" for suffix in _OTHER.split())
# Those that Pillow recognises by their first bytes.
OTHER_FORMATS = (
    "AVIF",
    "BMP",
    "DDS",
    "FITS",
    "GIF",
    "ICNS",
    "ICO",
    "JPEG2000",
    "PCX",
    "PPM",
    "PSD",
    "QOI",
    "SGI",
    "TIFF",
)
BY_START = {
    b"\x0cJXL ": "JPEG XL",
    b"ftyphei": "HEIC",
    b"ftypmif1": "HEIC",
    b"ftypmsf1": "HEIC",
    b"v/1\x01": "OpenEXR",
}
# Folders of other programs: thumbnails, metadata, deleted files.
_FOLDERS = """
    @eadir @recycle @recently-snapshot #recycle #snapshot __macosx $recycle.bin lost+found thumbs.db desktop.ini
"""
FOREIGN = frozenset(_FOLDERS.split()) | {"system volume information"}
SHOWN = 3  # names per reason in a message


@dataclass
class Listing:
    """The images in a folder.

    Attributes:
        root: the folder.
        files: images sorted by path, those of a folder before its subfolders.
        left_out: reason -> skipped paths.
        twice: pairs of names of one image in different subfolders.
        tops: subfolders of the root, with or without images.
    """

    root: Path
    files: list[tuple[Path, os.stat_result]] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)
    twice: list[tuple[Path, Path]] = field(default_factory=list)
    tops: set[str] = field(default_factory=set)

    def leave(self, reason: str, path: Path) -> None:
        """Record a skipped path."""
        self.left_out.setdefault(reason, []).append(path)

    def take(self, path: Path) -> None:
        """Remove a path from the skipped ones: it is read after all."""
        for reason, paths in list(self.left_out.items()):
            self.left_out[reason] = [each for each in paths if each != path]
            if not self.left_out[reason]:
                del self.left_out[reason]

    def words(self) -> str:
        """Return a message with the skipped paths, without full stop; empty if there are none."""
        parts = []
        for reason, paths in self.left_out.items():
            names = sorted(utf8_path(path.relative_to(self.root)) for path in paths)
            if reason == OTHER:
                kinds = Counter(Path(name).suffix.lower() or "no suffix" for name in names)
                names = [f"{count} {kind}" for kind, count in kinds.most_common()]
            more = ", ..." if len(names) > SHOWN else ""
            parts.append(f"{len(paths)} {reason} ({', '.join(names[:SHOWN])}{more})")
        return "left out: " + "; ".join(parts) if parts else ""


HIDDEN = "hidden or of other programs"
OTHER = "not images"
SPECIAL = "not regular files"
LINKED = "links to folders that are read anyway"
NAMED = "second names of images that are read anyway"


def utf8_path(path: Path | str) -> str:
    """Return a path as UTF-8; other bytes are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def place(path: Path, root: Path) -> tuple[tuple[int, str], ...]:
    """Return the sort key of a path: files of a folder by name, then its subfolders by name."""
    *folders, name = path.relative_to(root).parts
    return (*((1, part) for part in folders), (0, name))


def find(root: Path) -> Listing:
    """List the images in `root` and its subfolders.

    Links to files and folders are followed. A file that is reached several times is listed once, by the path with the fewest
    links.

    Raises:
        FileNotFoundError: if the folder does not exist.
        OSError: names a folder that cannot be listed or a file that cannot be opened.
        ValueError: names an image of an unsupported format, a broken link, or a link to a folder that contains it.
    """
    listing = Listing(root)
    for _ in find_each(root, listing):
        pass
    listing.files.sort(key=lambda found: place(found[0], root))
    return listing


def find_each(root: Path, listing: Listing) -> Iterator[Path]:
    """Yield the images of `find`, those behind fewer links first; fills `listing`."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected a folder of images")
    folders: dict[tuple[int, int], tuple[Path, int]] = {}
    images: dict[tuple[int, int], tuple[Path, int]] = {}
    starts = [root]
    linked: list[tuple[Path, os.stat_result]] = []
    links = 0
    while starts or linked:
        found, next_starts = list(linked), []
        linked = []
        for start in sorted(starts, key=lambda path: place(path, root) if path != root else ()):
            for path, status, is_link in _below(start, folders, listing, links):
                if not is_link:
                    found.append((path, status))
                elif stat.S_ISDIR(status.st_mode):
                    next_starts.append(path)
                else:
                    linked.append((path, status))
        for path, status in sorted(found, key=lambda item: place(item[0], root)):
            if not is_image(path, status):
                listing.leave(OTHER, path)
                continue
            if _new(images, status, path, links, listing, NAMED):
                listing.files.append((path, status))
                yield path
        starts, links = next_starts, links + 1


def _below(
    start: Path, seen: dict[tuple[int, int], tuple[Path, int]], listing: Listing, links: int
) -> Iterator[tuple[Path, os.stat_result, bool]]:
    """Yield (path, status, whether it is a link) of regular files below `start` and of links to folders.

    The status is that of the link's target. Linked folders are not entered."""
    if not _new(seen, _status(start, False), start, links, listing, LINKED):
        return
    waiting = [start]
    while waiting:
        here = waiting.pop()
        for name, link in _entries(here):
            path = here / name
            if name.startswith(".") or name.lower() in FOREIGN:
                listing.leave(HIDDEN, path)
                continue
            status = _status(path, link)
            if stat.S_ISREG(status.st_mode):
                yield path, status, link
            elif not stat.S_ISDIR(status.st_mode):
                listing.leave(SPECIAL, path)
            else:
                if here == listing.root:
                    listing.tops.add(name)
                if link and here.resolve().is_relative_to(path.resolve()):
                    raise ValueError(f"{path}: is a link to a folder that contains it; remove the link")
                if link:
                    yield path, status, link
                elif _new(seen, status, path, links, listing, LINKED):
                    waiting.append(path)


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """Return (name, whether it is a link) of a folder's entries, sorted."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry.name, entry.is_symlink()) for entry in entries)
    except OSError as error:
        message = f"{folder}: cannot be listed ({error.strerror}); expected a readable folder"
        raise type(error)(message) from error


def _status(path: Path, link: bool) -> os.stat_result:
    """Return the status of a path; links are followed."""
    try:
        return os.stat(path)
    except OSError as error:
        if link and not isinstance(error, PermissionError):
            raise ValueError(
                f"{path}: is a broken link to {os.readlink(path)}; restore the file or remove the link"
            ) from error
        raise type(error)(f"{path}: cannot be read ({error.strerror})") from error


def _new(
    seen: dict[tuple[int, int], tuple[Path, int]],
    status: os.stat_result,
    path: Path,
    links: int,
    listing: Listing,
    reason: str,
) -> bool:
    """Return whether a file or folder is seen for the first time; if not, record `path` as skipped."""
    # On file systems without inode numbers, files are identified by path.
    key = (status.st_dev, status.st_ino) if status.st_ino else (-1, hash(path))
    first, through = seen.setdefault(key, (path, links))
    if first == path:
        return True
    listing.leave(reason, path)
    if through == links and _top(first, listing.root) != _top(path, listing.root):
        listing.twice.append((first, path))
    return False


def _top(path: Path, root: Path) -> tuple[str, ...]:
    """Return the first component of a path below the root."""
    return path.relative_to(root).parts[:1]


def opened(path: Path) -> int:
    """Open a regular file; returns its descriptor. Raises OSError naming the file, also if it is no longer regular."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise type(error)(f"{path}: cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path}: was replaced by something that is not a file")
    return descriptor


def is_image(path: Path, status: os.stat_result) -> bool:
    """Return whether a file is an image in one of `FORMATS`.

    Raises ValueError for images of other formats, and for files that have the suffix of an image but are not one."""
    with os.fdopen(opened(path), "rb") as file:
        start = file.read(32)
    suffix = path.suffix.lower()
    if (
        start[:8] == b"\x89PNG\r\n\x1a\n"
        or start[:3] == b"\xff\xd8\xff"
        or start[:4] + start[8:12] == b"RIFFWEBP"
    ):
        return True
    if suffix in OTHER_SUFFIXES:
        raise ValueError(f"{path}: found a {suffix} file, expected {', '.join(SUFFIXES[:4])}")
    named = suffix in SUFFIXES
    if named and not start:
        raise ValueError(f"{path}: cannot be read as an image: it is empty")
    if (other := _other(path, start)) is not None:
        raise ValueError(f"{path}: found a {other} image, expected {READ}")
    if named:
        raise ValueError(f"{path}: cannot be read as an image: it is not {READ}")
    return False


def _other(path: Path, start: bytes) -> str | None:
    """Return the format of an image that is not read, or None."""
    for mark, kind in BY_START.items():
        if mark in start[:12]:
            return kind
    try:
        with os.fdopen(opened(path), "rb") as file, Image.open(file, formats=OTHER_FORMATS) as image:
            return image.format
    except UnidentifiedImageError:
        return None
    except Image.DecompressionBombError:
        return "very large"
    except Exception:  # the first bytes are those of an image, but the rest is not
        return None
