"""Pictures of points by their first two coordinates: paths from noise to samples, and scatter plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.evaluation.checks import as_rows
from distill.evaluation.drawing import Figure, FigureCanvasAgg, label_text, matplotlib
from distill.files import write_atomic

PANEL = 3.6  # inches, width and height
DPI = 120
GREY = "0.78"


@dataclass(frozen=True)
class Panel:
    """One model's `path` [K, n, D], from the noise at [0] to the samples at [-1], under `title`."""

    title: str
    path: Tensor


def save_trajectories(panels: Sequence[Panel], data: Tensor, path: Path, *, columns: int = 4) -> None:
    """PNG of one panel a model: data [M, D] in grey, each path a line in the colour of the direction in which its
    noise lies, so that equal noise has equal colour in all panels and neighbours have similar ones.

    Raises ValueError for no panels, fewer than two coordinates, paths of other shapes or non-finite points.
    """
    if not panels:
        raise ValueError("a picture of trajectories needs at least one panel")
    plane = _plane("data", data)
    paths = [_paths(panel) for panel in panels]
    columns = max(1, min(columns, len(panels)))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(PANEL * columns, (PANEL + 0.3) * rows + 0.3), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    limit = 1.05 * max(float(points.abs().max()) for points in [plane, *paths])
    for number, (panel, points) in enumerate(zip(panels, paths, strict=True), 1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_title(label_text(panel.title), fontsize=10)
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        axes.tick_params(labelsize=7)
        axes.scatter(plane[:, 0], plane[:, 1], s=3, color=GREY, linewidths=0, label="data", zorder=1)
        start = points[0]
        colours = matplotlib.colormaps["hsv"](
            torch.atan2(start[:, 1], start[:, 0]).div(2 * math.pi).remainder(1).numpy()
        )
        for line, colour in zip(points.transpose(0, 1), colours, strict=True):
            axes.plot(line[:, 0], line[:, 1], color=colour, linewidth=0.8, alpha=0.8, zorder=2)
        axes.scatter(
            start[:, 0], start[:, 1], s=9, facecolors="white", edgecolors=colours, linewidths=0.8, zorder=3
        )
        end = points[-1]
        axes.scatter(end[:, 0], end[:, 1], s=11, c=colours, edgecolors="black", linewidths=0.4, zorder=4)
    _legend(figure)
    _save(figure, path)


def save_scatter(points: Tensor, path: Path, software: str | None = None) -> None:
    """PNG of points [n, D]; `software`: the PNG's `Software` entry.

    Raises ValueError for fewer than two coordinates, no points or non-finite ones."""
    plane = _plane("samples", points)
    figure = Figure(figsize=(PANEL, PANEL), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_aspect("equal", adjustable="datalim")
    axes.tick_params(labelsize=7)
    axes.scatter(plane[:, 0], plane[:, 1], s=6, color="black", alpha=0.6, linewidths=0)
    _save(figure, path, software)


def _legend(figure: Figure) -> None:
    """What the marks mean, once, below the panels."""
    axes = figure.axes[0]
    marks = [
        axes.scatter([], [], s=14, color=GREY, linewidths=0, label="data"),
        axes.scatter([], [], s=14, facecolors="white", edgecolors="black", linewidths=0.8, label="noise"),
        axes.plot([], [], color="black", linewidth=0.8, label="path")[0],
        axes.scatter([], [], s=16, c="black", label="sample"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), fontsize=9, frameon=False)


def _plane(name: str, points: Tensor) -> Tensor:
    """[n, 2] float64 of points [n, D] with D at least 2, on the CPU."""
    rows = as_rows(name, points).cpu()
    if rows.shape[1] < 2:
        raise ValueError(f"{name}: a picture needs points of two coordinates, found {rows.shape[1]}")
    return rows[:, :2]


def _paths(panel: Panel) -> Tensor:
    """[K, n, 2] of a panel's path."""
    states, count = panel.path.shape[:2]
    if panel.path.ndim != 3 or states < 2:
        raise ValueError(
            f"{panel.title}: expected a path [K, n, D] with K >= 2, got {list(panel.path.shape)}"
        )
    return _plane(panel.title, panel.path.flatten(0, 1)).unflatten(0, (states, count))


def _save(figure: Figure, path: Path, software: str | None = None) -> None:
    metadata = {} if software is None else {"Software": software}
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", metadata=metadata))
