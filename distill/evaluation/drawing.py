"""matplotlib's objects that need no screen, and names as its labels show them."""

from __future__ import annotations

import matplotlib
from matplotlib import ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distill.terminal import printable

__all__ = ["Figure", "FigureCanvasAgg", "label_text", "matplotlib", "ticker"]


def label_text(text: str) -> str:
    """`text` as a title or a label of a legend shows it: no formula between `$`, nothing hidden by a leading `_`."""
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
