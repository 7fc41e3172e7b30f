"""Pictures of samples: a labelled row a model, a column a noise. Tiles are upscaled bicubically, with thin borders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from distill.data.arguments import pixels as checked
from distill.files import write_atomic
from distill.terminal import line

BACKGROUND = (255, 255, 255)
BORDER = (128, 128, 128)
BORDER_WIDTH = 2  # pixels
INK = (0, 0, 0)
TILE = 48  # pixels that a tile gets at least when the scale is left open
FONT_SIZE = 13
PADDING = 8


def to_tiles(name: str, images: Tensor, scale: int | None = None) -> list[Image.Image]:
    """RGB tiles of images [N, C, H, W] in [-1, 1] (clamped), C 1 or 3, `scale` times as large.

    Without a scale the smallest whole factor is taken that makes a tile 48 pixels high. Raises ValueError for
    other shapes, an empty set, a scale below 1, non-finite pixels or values in another range.
    """
    if (
        not isinstance(images, Tensor)
        or images.ndim != 4
        or images.shape[1] not in (1, 3)
        or len(images) == 0
    ):
        raise ValueError(
            f"{name}: expected [N, 1 or 3, H, W] with N > 0, got {list(getattr(images, 'shape', []))}"
        )
    images = checked(name, images)
    if not torch.isfinite(images).all():
        raise ValueError(f"{name} has non-finite pixels")
    height, width = images.shape[2:]
    scale = -(-TILE // height) if scale is None else scale
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    pixels = images.detach().cpu().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
    tiles = [Image.fromarray(tile.numpy()) for tile in pixels]
    size = (width * scale, height * scale)
    return [tile if scale == 1 else tile.resize(size, Image.Resampling.BICUBIC) for tile in tiles]


def image_grid(
    rows: Sequence[tuple[str, Tensor]],
    scale: int | None = None,
    border: int = BORDER_WIDTH,
    font_size: int = FONT_SIZE,
) -> Image.Image:
    """RGB picture of rows (label, images [n, C, H, W] in [-1, 1]), labels to the left; rows may differ in n.

    Raises ValueError for no rows or rows whose tiles differ in size, and what `to_tiles` raises.
    """
    if not rows:
        raise ValueError("a grid needs at least one row")
    rows = [(line(label), images) for label, images in rows]
    tiles = [to_tiles(f"row {label!r}", images, scale) for label, images in rows]
    width, height = tiles[0][0].size
    for (label, _), row in zip(rows, tiles, strict=True):
        if row[0].size != (width, height):
            raise ValueError(f"row {label!r} has tiles of {row[0].size}, the first row of {(width, height)}")
    font = ImageFont.load_default(font_size)
    boxes = [font.getbbox(label) for label, _ in rows]
    margin = int(max(box[2] for box in boxes)) + 2 * PADDING if any(label for label, _ in rows) else 0
    cell = max(height, font_size + 4) + border
    columns = max(len(row) for row in tiles)
    size = (margin + columns * (width + border) + border, len(rows) * cell + border)
    canvas = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for i, ((label, _), row) in enumerate(zip(rows, tiles, strict=True)):
        top = border + i * cell
        draw.text((PADDING, top + height / 2), label, fill=INK, font=font, anchor="lm")
        right = margin + len(row) * (width + border) + border - 1
        draw.rectangle((margin, top - border, right, top + height + border - 1), fill=BORDER)
        for j, tile in enumerate(row):
            canvas.paste(tile, (margin + border + j * (width + border), top))
    return canvas


def tile(images: Tensor, columns: int, scale: int | None = None, border: int = BORDER_WIDTH) -> Image.Image:
    """RGB picture of images [N, C, H, W] in [-1, 1], `columns` in a row, without labels."""
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    return image_grid([("", part) for part in images.split(columns)], scale, border)


def save_png(image: Image.Image, path: Path | str, software: str | None = None) -> None:
    """Write a PNG under a temporary name and rename it, so that `path` never holds half a picture.

    software: the PNG's `Software` entry, if any."""
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"image: found {type(image).__name__}, expected a picture, such as that of tile(images, 8)"
        )
    info = PngInfo()
    if software is not None:
        info.add_text("Software", software)
    write_atomic(Path(path), lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


def save_samples(
    samples: Tensor, columns: int, path: Path, software: str | None = None, *, images: bool = True
) -> None:
    """PNG of `images` [N, C, H, W], `columns` in a row, or else of points [N, D] in the plane; raises what `tile` and
    `trajectories.save_scatter` raise."""
    if not images:
        from distill.evaluation.trajectories import save_scatter  # matplotlib is slow to import

        save_scatter(samples, path, software=software)
    else:
        save_png(tile(samples, columns), path, software=software)
