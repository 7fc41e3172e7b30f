"""Pictures of points: what is drawn where, and files that appear whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill.evaluation.grid import save_samples
from distill.evaluation.trajectories import Panel, save_scatter, save_trajectories

DATA = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0]])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def coloured(path: Path) -> np.ndarray:
    """Which pixels are neither black, white nor grey."""
    image = pixels(path)
    return image.max(2) - image.min(2) > 60


def line(*points: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(points)[:, None]


def test_a_path_is_a_coloured_line_from_its_noise_to_its_sample(tmp_path):
    save_trajectories([Panel("a", line((-1.5, 0.0), (1.5, 0.0)))], DATA, tmp_path / "flat.png")
    rows, columns = coloured(tmp_path / "flat.png").nonzero()
    height, width = pixels(tmp_path / "flat.png").shape[:2]
    assert np.ptp(columns) > 0.5 * width  # three of the five units that the axes span
    assert np.ptp(rows) < 0.05 * height
    image = pixels(tmp_path / "flat.png")[rows, columns]
    assert (image[:, 2] > image[:, 0] + 60).mean() > 0.95  # noise to the left: cyan
    save_trajectories([Panel("a", line((0.0, -1.5), (0.0, 1.5)))], DATA, tmp_path / "upright.png")
    rows, columns = coloured(tmp_path / "upright.png").nonzero()
    assert np.ptp(columns) < 0.05 * width
    assert np.ptp(rows) > 0.5 * width
    save_trajectories([Panel("a", line((-1.5, 0.0), (0.0, 1.5), (1.5, 0.0)))], DATA, tmp_path / "bent.png")
    rows, _ = coloured(tmp_path / "bent.png").nonzero()
    assert np.ptp(rows) > 0.2 * height  # states between the ends are drawn
    assert not list(tmp_path.glob(".*"))


def test_panels_stand_in_columns(tmp_path):
    panels = [Panel(f"model {i}", torch.randn(4, 7, 2)) for i in range(3)]
    save_trajectories(panels, DATA, tmp_path / "wide.png")
    save_trajectories(panels, DATA, tmp_path / "tall.png", columns=1)
    wide, tall = pixels(tmp_path / "wide.png").shape, pixels(tmp_path / "tall.png").shape
    assert wide[1] == 3 * tall[1]
    assert tall[0] > 2.5 * wide[0]


def test_panels_share_their_axes(tmp_path):
    """The second panel's far point moves the first panel's path as well."""
    near, far = line((-1.5, 0.0), (1.5, 0.0)), line((-1.5, 0.0), (15.0, 0.0))
    for name, second in (("near", near), ("far", far)):
        save_trajectories([Panel("a", near), Panel("b", second)], DATA, tmp_path / f"{name}.png")
    half = pixels(tmp_path / "near.png").shape[1] // 2
    widths = [np.ptp(coloured(tmp_path / f"{n}.png")[:, :half].nonzero()[1]) for n in ("near", "far")]
    assert widths[1] < 0.3 * widths[0]


def test_points_are_scattered_and_images_tiled(tmp_path):
    points = torch.tensor([[0.0, 0.0, 9.0], [4.0, 2.0, 9.0]])
    save_samples(points, 4, tmp_path / "points.png", images=False)
    save_scatter(points[:, :2], tmp_path / "plane.png")
    assert (tmp_path / "points.png").read_bytes() == (tmp_path / "plane.png").read_bytes()
    save_samples(torch.zeros(3, 1, 8, 8), 3, tmp_path / "images.png")
    assert pixels(tmp_path / "images.png").shape == (52, 152, 3)


def test_what_cannot_be_drawn_is_named(tmp_path):
    path, target = torch.zeros(3, 4, 2), tmp_path / "a.png"
    for panels, data, message in (
        ([], DATA, "at least one panel"),
        ([Panel("a", path[:1])], DATA, r"a: expected a path \[K, n, D\] with K >= 2"),
        ([Panel("a", path[0])], DATA, r"a: expected a path \[K, n, D\]"),
        ([Panel("a", path[..., :1])], DATA, "a: a picture needs points of two coordinates, found 1"),
        ([Panel("a", path)], DATA[:, :1], "data: a picture needs points of two coordinates"),
        ([Panel("a", path / 0)], DATA, "a has non-finite values in 12 of 12"),
    ):
        with pytest.raises(ValueError, match=message):
            save_trajectories(panels, data, target)
    with pytest.raises(ValueError, match="samples is empty"):
        save_scatter(torch.zeros(0, 2), target)
    assert not list(tmp_path.iterdir())
