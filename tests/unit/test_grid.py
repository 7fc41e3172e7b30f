"""Pictures: sizes, where the tiles lie, and files that appear whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.evaluation.grid import image_grid, save_png, tile


def test_grid_has_a_cell_for_every_image() -> None:
    rows = [("teacher, 50 steps", torch.zeros(5, 1, 8, 8)), ("student", torch.zeros(3, 1, 8, 8))]
    picture = image_grid(rows, scale=6, border=2)
    unlabelled = image_grid([("", images) for _, images in rows], scale=6, border=2)
    assert unlabelled.size == (5 * 50 + 2, 2 * 50 + 2)
    assert picture.height == unlabelled.height
    assert picture.width > unlabelled.width + 80
    assert image_grid([("a much longer label than teacher", rows[0][1])]).width > picture.width


def test_tiles_keep_their_place_and_colour() -> None:
    images = torch.full((2, 3, 64, 64), -1.0)
    images[1, 0] = 1  # the second image is red
    picture = tile(images, columns=2, border=1)
    assert picture.size == (2 * 65 + 1, 66)
    assert picture.getpixel((32, 32)) == (0, 0, 0)
    assert picture.getpixel((32 + 65, 32)) == (255, 0, 0)
    assert picture.getpixel((65, 32)) == (128, 128, 128)


def test_small_images_are_enlarged_smoothly() -> None:
    images = torch.full((1, 1, 8, 8), -1.0)
    images[..., 4:] = 5  # outside the range: clamped
    picture = tile(images, columns=1)
    values = [picture.getpixel((x, 26))[0] for x in range(2, 50)]  # type: ignore[index]
    assert len(values) == 48
    assert (values[0], values[-1]) == (0, 255)
    assert len(set(values)) > 4


def test_last_row_may_be_short() -> None:
    assert tile(torch.zeros(7, 1, 8, 8), columns=3, scale=6, border=2).size == (152, 152)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 1, 8, 8), "N > 0"),
        (torch.zeros(2, 4, 8, 8), "1 or 3"),
        (torch.full((2, 1, 8, 8), torch.nan), "row 'b' has non-finite"),
        (torch.zeros(2, 1, 16, 16), "tiles of"),
    ],
)
def test_errors_name_the_row(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_grid([("a", torch.zeros(2, 1, 8, 8)), ("b", images)], scale=6)


def test_png_is_written_whole_and_equal_pictures_give_equal_bytes(tmp_path: Path) -> None:
    picture = tile(torch.zeros(2, 1, 8, 8), columns=2)
    for name in ("a.png", "b.png"):
        save_png(picture, tmp_path / "new" / name)
    files = sorted((tmp_path / "new").iterdir())
    assert [file.name for file in files] == ["a.png", "b.png"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert Image.open(files[0]).size == picture.size
