"""Folders of images as data: what is read, in which order, and what is refused."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.digits import Digits
from distill.data.folder import ImageFolder
from distill.engine.fit import Fit, train
from distill.engine.schedule import Constant
from distill.engine.update import Optim
from distill.evaluation.measure import Reference
from distill.methods.flow_matching import FlowMatching
from distill.models.denoiser import Denoiser
from distill.models.features import load_digits64
from distill.nets.unet import UNet
from distill.process.flow import Flow


def write(path: Path, pixels: np.ndarray, **options) -> Path:
    """An image file of uint8 pixels [H,W] or [H,W,C], whose format its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_bytes_become_minus_one_to_one(tmp_path):
    write(tmp_path / "a.png", np.array([[0, 255], [51, 204]], dtype=np.uint8))
    data = ImageFolder(str(tmp_path))
    assert data.images.dtype == torch.float32
    assert data.images.shape == (1, 1, 2, 2)
    torch.testing.assert_close(data.images.flatten(), torch.tensor([-1.0, 1.0, -0.6, 0.6]))
    assert (data.sample_shape, data.num_classes, data.labels, data.name) == (
        (1, 2, 2),
        0,
        None,
        tmp_path.name,
    )


def test_every_format_in_any_depth_in_the_order_of_paths(tmp_path):
    colour, grey = noise(5, 4, 3), noise(5, 4)
    write(tmp_path / "b" / "c" / "lossless.WEBP", colour, lossless=True, format="WEBP")
    write(tmp_path / "a.png", grey)
    write(tmp_path / "b" / "photo.jpeg", np.full((5, 4, 3), 200, dtype=np.uint8))
    write(tmp_path / ".hidden" / "x.png", noise(9, 9))
    write(tmp_path / ".x.png", noise(9, 9))
    (tmp_path / "labels.csv").write_text("not an image")
    data = ImageFolder(str(tmp_path))
    assert data.sample_shape == (3, 5, 4)  # one file has colour, so grey ones are repeated over the channels
    assert len(data) == 3
    assert data.num_classes == 0  # one image lies in no sub-folder
    assert torch.equal(data.pixels[0], torch.from_numpy(grey).expand(3, -1, -1))
    assert (data.pixels[1].float() - 200).abs().max() <= 2
    assert torch.equal(data.pixels[2].permute(1, 2, 0), torch.from_numpy(colour))


def test_sub_folders_are_classes(tmp_path):
    for name, count in (("10", 2), ("9", 1), ("2", 3)):
        for i in range(count):
            write(tmp_path / name / "deeper" / f"{i}.png", np.full((2, 2), int(name), dtype=np.uint8))
    data = ImageFolder(str(tmp_path))
    assert data.classes == ("2", "9", "10")  # numbers are sorted as numbers
    # Rows follow the paths, labels the classes.
    assert data.labels is not None
    assert [data.classes[label] for label in data.labels.tolist()] == ["10", "10", "2", "2", "2", "9"]
    assert data.pixels[:, 0, 0, 0].tolist() == [10, 10, 2, 2, 2, 9]
    batch = data.fetch(torch.tensor([5, 2]), torch.tensor([0, 1]))
    assert batch.ids.tolist() == [5, 2]
    assert batch.cond.get("label").tolist() == [1, 0]
    assert torch.equal(batch.x0, data.images[[5, 2]])


def test_one_sub_folder_is_no_class(tmp_path):
    write(tmp_path / "all" / "a.png", noise(2, 2))
    data = ImageFolder(str(tmp_path))
    assert (data.num_classes, data.labels) == (0, None)
    assert data.fetch(torch.tensor([0]), torch.tensor([0])).cond.get("label") is None


def test_linked_folders_are_read_and_loops_refused(tmp_path):
    write(tmp_path / "elsewhere" / "a.png", noise(2, 2))
    write(tmp_path / "data" / "x" / "b.png", noise(2, 2, seed=1))
    (tmp_path / "data" / "y").symlink_to(tmp_path / "elsewhere")
    assert ImageFolder(str(tmp_path / "data")).classes == ("x", "y")
    (tmp_path / "data" / "z").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match="z: is a link to a folder that contains it"):
        ImageFolder(str(tmp_path / "data"))


@pytest.mark.filterwarnings("ignore:reference features")
def test_fingerprint_is_the_reference_digest(tmp_path):
    """What a run calls its data and what a protocol calls its reference are one number."""
    for i in range(40):
        write(tmp_path / str(i % 4) / f"{i}.png", noise(8, 8, seed=i))
    data = ImageFolder(str(tmp_path))
    reference = Reference(data.images, data.labels, load_digits64())
    assert reference.digest == data.fingerprint()
    plain = hashlib.sha256(data.images.numpy().tobytes())
    assert (
        data.fingerprint()
        == hashlib.sha256(data.images.numpy().tobytes() + data.labels.numpy().tobytes()).hexdigest()
    )
    assert data.fingerprint() != plain.hexdigest()


def test_a_changed_file_is_read_again(tmp_path):
    write(tmp_path / "a.png", np.zeros((2, 2), dtype=np.uint8))
    before = ImageFolder(str(tmp_path))
    write(tmp_path / "a.png", np.full((2, 2), 9, dtype=np.uint8))
    after = ImageFolder(str(tmp_path))
    assert after.pixels.unique().tolist() == [9]
    assert before.fingerprint() != after.fingerprint()


def test_resolution_crops_to_the_aspect_and_resizes_with_antialiasing(tmp_path):
    # One-pixel stripes have the mean 127.5 everywhere: without antialiasing, every second pixel would be taken.
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (32, 32))
    write(
        tmp_path / "wide.png",
        np.concatenate([np.zeros((32, 16), np.uint8), stripes[:, :32], np.zeros((32, 16), np.uint8)], 1),
    )
    write(tmp_path / "right.png", np.full((8, 8), 77, dtype=np.uint8))
    data = ImageFolder(str(tmp_path), resolution=8)
    assert data.sample_shape == (1, 8, 8)
    assert data.resized == "resized to 8x8 (centre crop, bicubic with antialiasing)"
    right, wide = data.pixels.float()
    assert torch.equal(right, torch.full((1, 8, 8), 77.0))  # of the right size: untouched
    assert (wide[0, :, 1:-1] - 127.5).abs().max() < 12
    assert wide.min() > 90  # the black margins are cropped away
    assert ImageFolder(str(tmp_path), resolution=[4, 16]).sample_shape == (1, 4, 16)


def test_resolution_that_changes_nothing_says_nothing(tmp_path):
    write(tmp_path / "a.png", noise(8, 8))
    assert ImageFolder(str(tmp_path), resolution=8).resized == ""


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((2, 6), dtype=np.uint8)
    pixels[:, :3] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to display
    write(tmp_path / "a.png", pixels, exif=exif)
    data = ImageFolder(str(tmp_path))
    assert data.sample_shape == (1, 6, 2)
    assert data.pixels[0, 0, 0, 0] == 255
    assert data.pixels[0, 0, -1, 0] == 0


def test_palettes_bits_and_opaque_alpha_are_read(tmp_path):
    colour = noise(4, 4, 3)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.dstack([colour, np.full((4, 4), 255, np.uint8)])).save(tmp_path / "b.png")
    Image.fromarray(noise(4, 4)).convert("1").save(tmp_path / "c.png")
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).quantize(4).save(tmp_path / "d.png")
    data = ImageFolder(str(tmp_path))
    assert torch.equal(data.pixels[1].permute(1, 2, 0), torch.from_numpy(colour))
    assert set(data.pixels[2].unique().tolist()) <= {0, 255}
    assert data.pixels[3].unique().tolist() == [9]


def break_file(folder: Path, name: str) -> None:
    """Put one file that cannot be used into a folder of good ones."""
    path = folder / name
    if name == "cut.png":
        whole = write(folder / "whole.png", noise(8, 8)).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif name == "text.jpg":
        path.write_text("not an image")
    elif name == "empty.webp":
        path.write_bytes(b"")
    elif name == "large.png":
        write(path, noise(8, 9))
    elif name == "deep.png":
        Image.fromarray(noise(8, 8).astype(np.uint16)).save(path)
    elif name == "ink.jpg":
        Image.fromarray(noise(8, 8, 4), mode="CMYK").save(path)
    elif name == "clear.png":
        write(path, np.dstack([noise(8, 8), noise(8, 8)]))
    elif name == "moving.webp":
        first, *rest = [Image.fromarray(noise(8, 8, 3, seed=i)) for i in range(3)]
        first.save(path, save_all=True, append_images=rest)
    else:
        Image.fromarray(noise(8, 8)).save(path)


@pytest.mark.filterwarnings("ignore:'mode' parameter")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cut.png", "cut.png: cannot be read as an image"),
        ("text.jpg", "text.jpg: cannot be read as an image"),
        ("empty.webp", "empty.webp: cannot be read as an image"),
        ("large.png", "large.png: found 8x9 pixels (height x width), but "),
        ("deep.png", "deep.png: found pixels of mode I;16, expected grey or RGB of 8 bits"),
        ("ink.jpg", "ink.jpg: found pixels of mode CMYK"),
        ("clear.png", "clear.png: has transparent pixels"),
        ("moving.webp", "moving.webp: found 3 frames, expected one"),
        ("other.bmp", "other.bmp: found a .bmp file, expected .png, .jpg, .jpeg, .webp"),
        ("other.tiff", "other.tiff: found a .tiff file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, expected):
    write(tmp_path / "a.png", noise(8, 8))
    break_file(tmp_path, name)
    with pytest.raises(ValueError, match=re.escape(expected)) as raised:
        ImageFolder(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_folders_without_images_and_wrong_resolutions(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        ImageFolder(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match="no images"):
        ImageFolder(str(tmp_path))
    write(tmp_path / "a.png", noise(8, 8))
    for wrong in (0, [8], [8, 0], [8, 8, 3], ["8", "8"]):
        with pytest.raises(ValueError, match="resolution: found"):
            ImageFolder(str(tmp_path), resolution=wrong)


def test_a_method_trains_on_it_as_on_the_embedded_data(tmp_path):
    """The same pixels from files and from memory give the same weights."""
    digits = Digits()
    kept = torch.arange(40)
    for i in kept.tolist():
        # Bytes of 17 levels: 255 / 16 is no whole number, so the folder's pixels are the rounded ones.
        pixels = (digits.images[i, 0] + 1).mul(127.5).round().to(torch.uint8).numpy()
        write(tmp_path / "files" / str(int(digits.labels[i])) / f"{i:03d}.png", pixels)
    folder = ImageFolder(str(tmp_path / "files"))
    assert folder.num_classes == 10
    assert (folder.images - digits.images[_order(digits, kept)]).abs().max() <= 1.001 / 255

    def trained(source) -> torch.Tensor:
        torch.manual_seed(0)
        net = UNet(width=8, embedding=16, groups=4, num_classes=10)
        method = FlowMatching(Denoiser(net, Flow(), "velocity", (1, 8, 8), guidable=True))
        optim = Optim(partial(torch.optim.AdamW, lr=1e-3), Constant())
        method.prepare({"student": optim}, seed=0)
        train(method, source, Fit(steps=2, batch_size=8), folder=tmp_path / source.name, config={})
        return torch.cat([p.flatten() for p in method.student.parameters()])

    class InMemory:
        name, num_classes, sample_shape = "memory", 10, (1, 8, 8)
        images, labels = folder.images, folder.labels

        def __len__(self):
            return len(self.images)

        fetch = Digits.fetch

    assert torch.equal(trained(folder), trained(InMemory()))


def _order(digits: Digits, rows: torch.Tensor) -> torch.Tensor:
    """Rows in the order of the paths <label>/<row>.png."""
    return torch.tensor(sorted(rows.tolist(), key=lambda i: (int(digits.labels[i]), i)))
