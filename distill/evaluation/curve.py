"""Plots a metric against network calls, one line a model."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from distill.evaluation.comparison import Run, protocol
from distill.evaluation.drawing import Figure, FigureCanvasAgg, label_text, ticker
from distill.evaluation.metric import metric as known
from distill.evaluation.metric import metrics
from distill.files import write_atomic

# Okabe and Ito's palette for colour-blind readers, without black and yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
SHARED = "#555555"  # what all runs share, such as their teacher
MARKERS = "os^DvPX<>"
STYLES = ("-", "--", "-.", ":")
WIDE = 10.0  # a distance is drawn on a log axis from this ratio of its largest to its smallest value on
MOST_TICKS = 12
SOFTWARE = "distill.compare"  # the `Software` entry of its PNG files
ROUNDING = 1e-4  # values closer than this (relative) are the same measurement
PLAIN = ticker.FuncFormatter(lambda value, _: f"{value:g}")
LABEL = 34  # characters of a line of the legend
LEAST_CUT = 8  # a common beginning of run names is left out of the legend from this length on


@dataclass(frozen=True)
class Line:
    """One model's values at its network calls, ascending; a set of images has one value and no calls (None).
    `runs`: the runs in which it is the same."""

    model: str
    points: tuple[tuple[float | None, float], ...]
    runs: tuple[str, ...]


def lines(runs: Sequence[Run], metric: str) -> list[Line]:
    """The lines of a plot. Runs often share their teacher: a model whose rows are equal in several runs appears once,
    and such lines come first."""
    found: list[tuple[Line, list[Mapping[str, Any]]]] = []
    for run in runs:
        for model in dict.fromkeys(row["model"] for row in run.rows):
            rows = [row for row in run.rows if row["model"] == model and row.get(metric) is not None]
            if not rows:
                continue
            rows.sort(key=lambda row: row.get("nfe") or 0)
            points = tuple((row.get("nfe"), float(row[metric])) for row in rows)
            same = (
                i for i, (line, others) in enumerate(found) if line.model == model and _equal(rows, others)
            )
            if (place := next(same, None)) is None:
                found.append((Line(model, points, (run.name,)), rows))
            else:
                line, others = found[place]
                found[place] = replace(line, runs=(*line.runs, run.name)), others
    return sorted((line for line, _ in found), key=lambda line: len(line.runs) == 1)


def _equal(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two models are one: all that both were measured by agrees, up to the rounding of another number of
    threads. (Of one metric alone, two models may well have the same value.)"""
    return len(a) == len(b) and all(
        math.isclose(x[m.name], y[m.name], rel_tol=ROUNDING, abs_tol=ROUNDING**2)
        for x, y in zip(a, b, strict=True)
        for m in metrics()
        if m.form and m.comparable and x.get(m.name) is not None and y.get(m.name) is not None
    )


def label(line: Line, runs: Sequence[Run]) -> str:
    """What the legend calls a line: the model, and the runs that it comes from unless these are all that have it."""
    own = [run.name for run in runs if any(row["model"] == line.model for row in run.rows)]
    everywhere = len(runs) == 1 or (len(own) > 1 and len(own) == len(line.runs))
    short = _short([run.name for run in runs])
    text = line.model if everywhere else f"{line.model}: {', '.join(short[name] for name in line.runs)}"
    return label_text(textwrap.fill(text, LABEL, break_long_words=True))


def _short(names: Sequence[str]) -> dict[str, str]:
    """Names of a legend: where all begin alike, as those of a sweep do, without that beginning."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = "".join(letters[0] for letters in alike) if len(names) > 1 else ""
    cut = max(common.rfind("-"), common.rfind("/")) + 1
    return {name: f"…{name[cut:]}" if cut >= LEAST_CUT else name for name in names}


def floors(runs: Sequence[Run], metric: str) -> list[tuple[float, str]]:
    """(value, what it is) of the real images, each distinct value once; empty where they have none."""
    found: dict[str, tuple[float, str]] = {}
    for run in runs:
        if known(metric).real is not None:
            value, what = run.real.get(known(metric).real_key), known(metric).real_words
        else:
            floor = run.protocol.floor
            count = f" ({floor['half']:.0f})" if "half" in floor else ""
            value, what = floor.get(metric), f"real images: one half{count} against the other"
        if value is not None:
            found.setdefault(f"{value:.4g}", (value, what))
    return list(found.values())


def draw(runs: Sequence[Run], metric: str) -> Figure:
    """The plot of `metric` against network calls."""
    shared_protocol = protocol(runs)
    drawn, scale, better = lines(runs, metric), known(metric).scale, known(metric).better
    legend = sum(label(line, runs).count("\n") + 1 for line in drawn) + 3
    figure = Figure(figsize=(8.0, max(4.8, 0.21 * legend)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    models = list(dict.fromkeys(line.model for line in drawn))
    groups = [run.name for run in runs] if len(runs) > 1 else models
    for line in drawn:
        shared = 1 < len(runs) == len(line.runs)
        place = groups.index(line.runs[0] if len(runs) > 1 else line.model)
        look: dict[str, Any] = {
            "color": SHARED if shared else COLOURS[place % len(COLOURS)],
            "linestyle": STYLES[place // len(COLOURS) % len(STYLES)],
            "label": label(line, runs),
        }
        values = [value * scale for _, value in line.points]
        if any(calls is None for calls, _ in line.points):
            for value in values:  # images from elsewhere: no calls are known
                axes.axhline(value, **(look | {"linestyle": (0, (1, 1))}))
            continue
        marker = MARKERS[models.index(line.model) % len(MARKERS)]
        calls = [calls for calls, _ in line.points]
        if len(calls) == 1:
            look["linestyle"] = "none"
        open_marker = place // len(COLOURS) % 2 == 1  # the palette's second turn
        look |= {"markerfacecolor": "white"} if open_marker else {"markeredgecolor": "white"}
        axes.plot(calls, values, marker=marker, markersize=7, markeredgewidth=0.8, linewidth=1.8, **look)
    for value, what in floors(runs, metric):
        axes.axhline(value * scale, color="black", ls="--", lw=1.0, label=textwrap.fill(what, LABEL))
    _axes(axes, drawn)
    if better == "lower":
        reached = [value * scale for line in drawn for _, value in line.points]
        _distances(axes, reached, [value * scale for value, _ in floors(runs, metric)])
    name = known(metric).heading(shared_protocol.names()) + known(metric).unit
    axes.set_ylabel(name + (f" ({better} is better)" if better in ("lower", "higher") else ""))
    axes.set_xlabel("network calls per image (guidance counts double)")
    axes.set_title("Quality against network calls", loc="left", fontsize=12)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    below = replace(shared_protocol, floor={}).describe()
    figure.supxlabel(
        label_text("\n".join(textwrap.wrap(below, 150))), fontsize=6.5, color=SHARED, x=0.01, ha="left"
    )
    return figure


def _axes(axes: Any, drawn: Sequence[Line]) -> None:
    """Ticks at the network calls, and a grid."""
    calls = sorted({c for line in drawn for c, _ in line.points if c is not None})
    axes.set_xscale("log", base=2)
    if calls:
        axes.set_xlim(calls[0] / 1.3, calls[-1] * 1.3)
        axes.xaxis.set_major_locator(
            ticker.FixedLocator(calls) if len(calls) <= MOST_TICKS else ticker.LogLocator(base=2)
        )
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_formatter(PLAIN)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _distances(axes: Any, values: Sequence[float], real: Sequence[float]) -> None:
    """A log axis for distances that are positive and spread widely."""
    if min([*values, *real]) > 0 and max(values) / min(values) >= WIDE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1.0, 2.0, 3.0, 5.0)))
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without the time in it, so equal plots give equal bytes."""
    write_atomic(path, partial(figure.savefig, format="png", metadata={"Software": SOFTWARE}))
