"""matplotlib without a screen, and text for its labels."""

from __future__ import annotations

import matplotlib
from matplotlib import ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distill.terminal import printable

__all__ = ["Figure", "FigureCanvasAgg", "label_text", "matplotlib", "ticker"]


def label_text(text: str) -> str:
    """`text` for a title or a legend: `$` starts no formula, and a leading `_` does not hide the label."""
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
