"""Every kind of thing that lies in folders of pictures: read once, refused by name, or left out with a word."""

from __future__ import annotations

import io
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from distill.data import decode, listing
from distill.data.folder import ImageFolder, holds_images

pytestmark = pytest.mark.filterwarnings("ignore:.*left out")
NOBODY = 65534


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, seed: int = 0, *, grey: bool = True, **options: object) -> Path:
    """An 8x8 image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = noise(8, 8, seed=seed) if grey else noise(8, 8, 3, seed=seed)
    Image.fromarray(pixels).save(path, **options)  # type: ignore[arg-type]
    return path


def encoded(kind: str, seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(noise(8, 8, 3, seed=seed)).save(out, format=kind, lossless=True)
    return out.getvalue()


def seeds(data: ImageFolder, count: int = 9) -> list[int]:
    """Which of the images of `write` the rows are."""
    known = {noise(8, 8, seed=seed).tobytes(): seed for seed in range(count)}
    return [known[row.numpy().tobytes()] for row in data.pixels[:, 0]]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(colour: int, bits: int, rows: bytes) -> bytes:
    """A PNG of 4x4 pixels from its raw rows (each with its filter byte)."""
    header = struct.pack(">IIBBBBB", 4, 4, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    "name",
    ["x.jfif", "x.JPE", "x.apng", "x.pjpeg", "x", "x.txt", "x.bmp", "x.tiff", "x.PNG", "x.json", "x.mpo"],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_names_do_not_decide(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(encoded("PNG", 1))
    (tmp_path / name).write_bytes(encoded(kind))
    data = ImageFolder(str(tmp_path))
    assert len(data) == 2
    assert data.remarks == ""
    if kind != "JPEG":
        assert np.array_equal(data.pixels[-1].permute(1, 2, 0).numpy(), noise(8, 8, 3))


@pytest.mark.parametrize("suffix", sorted(listing.OTHER_SUFFIXES))
def test_images_that_are_not_read_are_refused_by_their_suffix(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "a.png")
    (tmp_path / f"b{suffix.upper()}").write_bytes(b"whatever it holds")
    with pytest.raises(
        ValueError, match=re.escape(f"found a {suffix} file, expected .png, .jpg, .jpeg, .webp")
    ):
        ImageFolder(str(tmp_path))


@pytest.mark.parametrize("name", ["b", "b.dat", "b.png", "b.jpg"])
@pytest.mark.parametrize(
    "kind", ["BMP", "GIF", "TIFF", "PPM", "JPEG2000", "ICO", "QOI", "AVIF", "HEIC", "JPEG XL"]
)
def test_images_that_are_not_read_are_refused_by_their_content(tmp_path: Path, kind: str, name: str) -> None:
    write(tmp_path / "a.png")
    made = {"HEIC": b"\0\0\0\x18ftypheic\0\0\0\0", "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n"}
    if kind in made:
        content = made[kind]
    else:
        out = io.BytesIO()
        Image.fromarray(noise(16, 16, 3)).save(out, format=kind)
        content = out.getvalue()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: found a {kind} image, expected PNG, JPEG or WebP"):
        ImageFolder(str(tmp_path))


def test_what_is_no_image_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    for name in ("a.txt", "b.TXT", "c.json", "d.h5", "README", "e.npz"):
        (tmp_path / name).write_bytes(b"P5 and BM are words, and so is II*")
    with pytest.warns(UserWarning, match="left out: 6 not images"):
        data = ImageFolder(str(tmp_path))
    assert len(data) == 1
    assert data.remarks == "left out: 6 not images (2 .txt, 1 no suffix, 1 .json, ...)"


def test_hidden_files_and_thumbnails_are_left_out_with_a_word(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"{i}.png", i)
    for place in ("@eaDir/0.png/SYNO.png", ".thumbnails/1.png", "__MACOSX/2.png", ".hidden.png", "._0.png"):
        write(tmp_path / place, 8)
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    data = ImageFolder(str(tmp_path))
    assert seeds(data) == [0, 1, 2]
    assert data.remarks == "left out: 6 hidden or of other programs (._0.png, .hidden.png, .thumbnails, ...)"


def test_a_folder_of_thumbnails_alone_holds_no_images(tmp_path: Path) -> None:
    write(tmp_path / "@eaDir" / "a.png")
    with pytest.raises(FileNotFoundError, match=r"no images; .*left out: 1 hidden or of other programs"):
        ImageFolder(str(tmp_path))
    assert not holds_images(tmp_path)


def test_links_between_classes_count_nothing_twice(tmp_path: Path) -> None:
    write(tmp_path / "a" / "0.png", 0)
    write(tmp_path / "b" / "1.png", 1)
    (tmp_path / "a" / "to_b").symlink_to("../b")
    (tmp_path / "b" / "to_a").symlink_to("../a")
    (tmp_path / "a" / "again.png").symlink_to("0.png")
    (tmp_path / "a" / "other.png").symlink_to("../b/1.png")
    data = ImageFolder(str(tmp_path))
    assert seeds(data) == [0, 1]
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1]
    assert "2 links to folders that are read anyway (a/to_b, b/to_a)" in data.remarks
    assert "2 second names of images that are read anyway (a/again.png, a/other.png)" in data.remarks


def test_what_fewer_links_lead_to_has_its_place(tmp_path: Path) -> None:
    """Both classes are links, and the first holds a link into the second."""
    write(tmp_path / "store" / "x" / "0.png", 0)
    write(tmp_path / "store" / "y" / "1.png", 1)
    (tmp_path / "store" / "x" / "to_y").symlink_to("../y")
    data = tmp_path / "data"
    data.mkdir()
    (data / "a").symlink_to(tmp_path / "store" / "x")
    (data / "b").symlink_to(tmp_path / "store" / "y")
    found = ImageFolder(str(data))
    assert found.classes == ("a", "b")
    assert seeds(found) == [0, 1]
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1]


def test_a_link_to_a_file_elsewhere_counts_once(tmp_path: Path) -> None:
    one, two = write(tmp_path / "store" / "one.png", 1), write(tmp_path / "store" / "two.bin.png", 2)
    (tmp_path / "data").mkdir()
    for name, target in (("a", one), ("b.png", two), ("c.png", one)):
        (tmp_path / "data" / name).symlink_to(target)
    data = ImageFolder(str(tmp_path / "data"))
    assert seeds(data) == [1, 2]
    assert "1 second names of images that are read anyway (c.png)" in data.remarks


def test_hard_links_count_once_and_never_in_two_classes(tmp_path: Path) -> None:
    write(tmp_path / "a" / "0.png", 0)
    os.link(tmp_path / "a" / "0.png", tmp_path / "a" / "1.png")
    data = ImageFolder(str(tmp_path))
    assert seeds(data) == [0]
    assert "second names" in data.remarks
    write(tmp_path / "b" / "2.png", 2)
    os.link(tmp_path / "a" / "0.png", tmp_path / "b" / "3.png")
    with pytest.raises(
        ValueError, match=r"b/3.png: is the same file or folder as .*a/0.png, under another class"
    ):
        ImageFolder(str(tmp_path))


def test_one_folder_under_two_classes_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "store" / "0.png")
    (tmp_path / "data").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "store")
    write(tmp_path / "data" / "bird" / "1.png", 1)
    with pytest.raises(ValueError, match=r"dog: is the same file or folder as .*cat, under another class"):
        ImageFolder(str(tmp_path / "data"))


def test_the_order_is_that_of_a_plain_walk(tmp_path: Path) -> None:
    """Files of a folder by name, then its sub-folders by name, links among them: fingerprints depend on it."""
    outside = tmp_path / "outside"
    write(outside / "z.png", 4)
    root = tmp_path / "data"
    for seed, name in enumerate(("b.png", "a/c.png", "a/b/x.png", "B.png")):
        write(root / name, seed)
    (root / "a" / "bb").symlink_to(outside)
    (root / "c").mkdir()
    write(root / "c" / "1.png", 5)
    expected = []
    for here, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        expected += [Path(here) / name for name in sorted(names)]
    found = listing.find(root)
    assert [path for path, _ in found.files] == expected
    assert seeds(ImageFolder(str(root))) == [3, 0, 1, 2, 4, 5]


def test_pipes_sockets_and_devices_are_never_opened(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "linked.png").symlink_to("pipe.png")
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # a socket's path must be short
        try:
            server.bind("socket.png")
        finally:
            os.chdir(here)
        found: list[str] = []
        thread = threading.Thread(
            target=lambda: found.append(ImageFolder(str(tmp_path)).remarks), daemon=True
        )
        thread.start()
        thread.join(30)
    assert found == ["left out: 4 not regular files (device.png, linked.png, pipe.png, ...)"]


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    (tmp_path / "b").symlink_to("gone.png")
    with pytest.raises(ValueError, match=r"b: is a broken link to gone.png"):
        ImageFolder(str(tmp_path))
    (tmp_path / "b").unlink()
    (tmp_path / "c").symlink_to("c")
    with pytest.raises(ValueError, match=r"c: is a broken link to c"):
        ImageFolder(str(tmp_path))


@pytest.mark.parametrize("what", ["folder", "file", "names"])
def test_what_may_not_be_read_is_an_error(tmp_path: Path, what: str) -> None:
    """In a process without the rights, since root may read everything."""
    tmp_path.chmod(0o755)
    for i in range(3):
        write(tmp_path / "data" / str(i) / "x.png", i)
    place = tmp_path / "data" / "1" / ("x.png" if what == "file" else "")
    place.chmod({"folder": 0o000, "file": 0o000, "names": 0o444}[what])
    program = (
        f"import os, sys; sys.path[:0] = {sys.path!r}\n"
        "from distill.data.listing import find\nfrom pathlib import Path\n"
        f"[os.chmod(p, 0o755) for p in Path({str(tmp_path)!r}).parents if p.stat().st_uid == 0 and 'pytest' in str(p)]\n"
        f"os.getuid() or os.setuid({NOBODY})\n"
        f"try: print(len(find(Path({str(tmp_path / 'data')!r})).files))\n"
        "except PermissionError as error: print('refused:', error)\n"
    )
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    finally:
        place.chmod(0o755)
    told = done.stdout.strip()
    assert told.startswith(f"refused: {place}: cannot be") or told.startswith(
        f"refused: {place}/x.png: cannot be"
    )


def test_an_error_of_listing_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a" / "0.png")
    write(tmp_path / "b" / "1.png")
    scandir = os.scandir

    def broken(path: Path):  # type: ignore[no-untyped-def]
        if Path(path).name == "b":
            raise OSError(5, "Input/output error")
        return scandir(path)

    monkeypatch.setattr(listing.os, "scandir", broken)
    with pytest.raises(OSError, match=r"b: cannot be listed \(Input/output error\)"):
        ImageFolder(str(tmp_path))


def test_a_file_that_changes_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.png")
    target = write(tmp_path / "b.png", 1)
    header = decode.header

    def meanwhile(stamp: decode.Stamp) -> decode.Header:
        found = header(stamp)
        if stamp.path == str(target):
            write(target, 2)
            os.utime(target, ns=(0, 0))
        return found

    monkeypatch.setattr("distill.data.folder.header", meanwhile)
    with pytest.raises(ValueError, match=r"b\.png: .*changed since its folder was listed"):
        ImageFolder(str(tmp_path))


def test_the_same_time_and_length_do_not_hide_a_change(tmp_path: Path) -> None:
    for seed in (0, 1):
        Image.fromarray(noise(8, 8, seed=seed)).save(tmp_path / "a.png", compress_level=0)
        os.utime(tmp_path / "a.png", ns=(10**18, 10**18))
        assert seeds(ImageFolder(str(tmp_path))) == [seed]


@pytest.mark.parametrize("name", ["b.png", "b.jpg", "b.webp"])
def test_files_cut_anywhere_are_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the caller has told Pillow to fill in what is missing."""
    write(tmp_path / "a.png", grey=False)
    whole = encoded({"b.png": "PNG", "b.jpg": "JPEG", "b.webp": "WEBP"}[name])
    (tmp_path / name).write_bytes(whole)
    expected = ImageFolder(str(tmp_path)).pixels[1]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    told: list[str] = []
    for length in range(0, len(whole), max(1, len(whole) // 25)):
        (tmp_path / name).write_bytes(whole[:length])
        try:
            found = ImageFolder(str(tmp_path)).pixels[1]
        except ValueError as error:
            told.append(str(error))
        else:  # only padding was cut off
            assert np.array_equal(found, expected), length
    assert len(told) > 15
    assert all(f"{name}: cannot be read as an image" in text and "\n" not in text for text in told)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_flipped_bit_in_a_png_is_refused(tmp_path: Path) -> None:
    """Of stored pixels, which Pillow reads whatever their checksum is."""
    out = io.BytesIO()
    Image.fromarray(noise(8, 8)).save(out, format="PNG", compress_level=0)
    content = bytearray(out.getvalue())
    content[content.index(b"IDAT") + 30] ^= 4
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png: cannot be read as an image"):
        ImageFolder(str(tmp_path))


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_refused_for_all_colour_types(tmp_path: Path, colour: int, channels: int) -> None:
    """Pillow reads grey of 16 bits as such and cuts the others to their high byte."""
    write(tmp_path / "a.png")
    rows = (b"\0" + b"\xff" * 8 * channels) * 4
    (tmp_path / "b.png").write_bytes(png(colour, 16, rows))
    with pytest.raises(ValueError, match=r"b\.png: found pixels of .*16.*, expected grey or RGB of 8 bits"):
        ImageFolder(str(tmp_path))


@pytest.mark.parametrize(
    ("bits", "row", "expected"), [(1, b"\x50", 255), (2, b"\x1b", 85), (4, b"\x01\x23", 17)]
)
def test_fewer_bits_are_spread_over_the_range(tmp_path: Path, bits: int, row: bytes, expected: int) -> None:
    (tmp_path / "a.png").write_bytes(png(0, bits, (b"\0" + row) * 4))
    found = ImageFolder(str(tmp_path)).pixels[0, 0, 0].tolist()
    assert found == ([0, 255, 0, 255] if bits == 1 else [expected * i for i in range(4)])


def test_a_picture_of_a_phone_is_its_first_frame(tmp_path: Path) -> None:
    first, second = (Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (60, 200))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "a.jpg") as image:
        assert (image.format, image.n_frames) == ("MPO", 2)  # type: ignore[attr-defined]
    data = ImageFolder(str(tmp_path))
    assert len(data) == 1
    assert (data.pixels.float() - 60).abs().max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_moving_pictures_are_refused(tmp_path: Path, kind: str) -> None:
    first, *rest = [Image.fromarray(noise(8, 8, 3, seed=i)) for i in range(3)]
    first.save(tmp_path / "a.img", format=kind, save_all=True, append_images=rest)
    with pytest.raises(ValueError, match=r"a\.img: found (3 frames, expected one|a GIF image)"):
        ImageFolder(str(tmp_path))


def test_very_large_pictures_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the header alone, whatever limit the caller has given to Pillow."""
    header = struct.pack(">IIBBBBB", 100_000, 1_000, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(content)
    for limit in (None, 10**6, 89_478_485):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"a\.png: "):
            ImageFolder(str(tmp_path))


@pytest.mark.filterwarnings("ignore:'mode' parameter")
@pytest.mark.parametrize("mode", ["CMYK", "I;16", "transparent grey", "transparent colour"])
def test_other_pixels_are_refused_by_name(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "CMYK":
        Image.fromarray(noise(8, 8, 4), mode="CMYK").save(path)
    elif mode == "I;16":
        Image.fromarray(noise(8, 8).astype(np.uint16)).save(path)
    elif mode == "transparent grey":
        Image.fromarray(np.full((8, 8), 7, np.uint8)).save(path, transparency=7)
    else:
        Image.fromarray(noise(8, 8, 4)).save(path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
        ImageFolder(str(tmp_path))


def test_equal_channels_are_grey_where_that_is_asked_for(tmp_path: Path) -> None:
    grey = noise(8, 8)
    Image.fromarray(np.dstack([grey] * 3)).save(tmp_path / "a.png")
    Image.fromarray(grey).save(tmp_path / "b.png")
    assert ImageFolder(str(tmp_path)).sample_shape == (3, 8, 8)
    one = ImageFolder(str(tmp_path), channels=1)
    assert one.sample_shape == (1, 8, 8)
    assert np.array_equal(one.pixels[0, 0], grey)
    assert np.array_equal(one.pixels[1, 0], grey)
    (tmp_path / "a.png").unlink()
    three = ImageFolder(str(tmp_path), channels=3)
    assert np.array_equal(three.pixels[0], np.stack([grey] * 3))
    write(tmp_path / "c.png", grey=False)
    with pytest.raises(ValueError, match=r"c\.png: has colour, expected a grey image \(channels=1\)"):
        ImageFolder(str(tmp_path), channels=1)
    with pytest.raises(ValueError, match="channels: found 2"):
        ImageFolder(str(tmp_path), channels=2)


def test_names_in_any_bytes(tmp_path: Path) -> None:
    root = os.fsencode(tmp_path) + b"/caf\xe9"
    for folder in (b"\xe9", b"e"):
        os.makedirs(root + b"/" + folder)
        write(Path(os.fsdecode(root + b"/" + folder + b"/\xff.png")))
    Path(os.fsdecode(root + b"/e/\xfe.txt")).write_text("")
    Path(os.fsdecode(root + b"/.\xfe")).write_text("")
    data = ImageFolder(os.fsdecode(root))
    assert (len(data), data.num_classes, data.name) == (2, 2, "caf\\xe9")
    for text in (data.name, data.remarks):
        text.encode()
    assert ".\\xfe" in data.remarks


def test_classes_without_images_and_images_without_class_are_told(tmp_path: Path) -> None:
    for name in "02":
        write(tmp_path / name / "x.png", int(name))
    (tmp_path / "1").mkdir()
    assert ImageFolder(str(tmp_path)).remarks == "1 sub-folders without images (1)"
    write(tmp_path / "loose.png", 3)
    data = ImageFolder(str(tmp_path))
    assert data.labels is None
    assert data.remarks.endswith("; no classes, since 1 images lie in no sub-folder")


def test_orientation_of_every_kind(tmp_path: Path) -> None:
    pixels = np.zeros((2, 6), dtype=np.uint8)
    pixels[:, :3] = 255
    turned: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.T,
        6: lambda p: np.rot90(p, -1),
        7: lambda p: np.rot90(p, 2).T,
        8: lambda p: np.rot90(p),
    }
    for number, turn in turned.items():
        for name in ("a.png", "a.webp"):
            exif = Image.Exif()
            exif[0x0112] = number
            path = tmp_path / f"{number}{name}" / name
            path.parent.mkdir()
            Image.fromarray(pixels).save(path, exif=exif, **({"lossless": True} if name == "a.webp" else {}))
            assert np.array_equal(ImageFolder(str(path.parent)).pixels[0, 0], turn(pixels)), (number, name)
