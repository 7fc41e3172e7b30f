"""report.md: the table of rows, the protocol, the legend and the gates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation.gates import GateResult
from distill.evaluation.metric import Metric, metrics
from distill.evaluation.protocol import Protocol
from distill.terminal import line


def prose(text: object) -> str:
    """A name or a sentence for Markdown: on one line, without markup, HTML or control characters of its own."""
    plain = line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")
    return re.sub(r"([\\`*\[\]~]|(?<!\w)_|_(?!\w))", r"\\\1", plain)


def legend(protocol: Protocol, shown: Sequence[Metric]) -> str:
    """What the columns `shown` mean, under the names of `Protocol.names`."""
    names = protocol.names()
    parts = [f"`{m.heading(names)}`: {m.sentence(protocol.features)}." for m in shown if m.meaning]
    if any("@" in m.heading(names) for m in shown):
        parts.append(
            "`@` and a count: fewer samples than the metric's name stands for; compare only with the same count."
        )
    return " ".join(parts)


def columns(rows: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """The metrics with a column that some row has a value for; a guidance scale of 1 is none."""
    return [
        known
        for known in metrics()
        if known.form
        and any(
            row.get(known.name) is not None and (known.name, row[known.name]) != ("guidance_scale", 1)
            for row in rows
        )
    ]


def table(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """Markdown table of rows of metrics.json under the names of `Protocol.names`; columns that are null everywhere are
    left out, and so is guidance where there is none."""
    shown = columns(rows)
    lines = [
        "| model | steps | " + " | ".join(prose(m.heading(names)) + m.suffix for m in shown) + " |",
        "|---|---|" + "---|" * len(shown),
    ]
    for row in rows:
        cells = " | ".join(m.cell(row.get(m.name)) for m in shown)
        steps = "-" if row["steps"] is None else row["steps"]
        lines.append(f"| {prose(row['model'])} | {steps} | {cells} |")
    return "\n".join(lines)


def gate_table(gates: Sequence[GateResult]) -> str:
    """Markdown table of gate results."""
    lines = ["| gate | value | bound | |", "|---|---|---|---|"]
    for gate in gates:
        bound = (
            "[{:.4g}, {:.4g}]".format(*gate.bound) if isinstance(gate.bound, tuple) else f"{gate.bound:.4g}"
        )
        lines.append(
            f"| {prose(gate.name)} | {gate.value:.4g} | {gate.relation} {bound} | "
            f"{'passed' if gate.passed else '**missed**'} |"
        )
    return "\n".join(lines)


def report(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    protocol: Protocol,
    real: Mapping[str, float],
    gates: Sequence[GateResult],
    *,
    caption: str = "",
    note: str = "",
) -> str:
    """The page `report.md`; `caption`: of grid.png, "" where there is none."""
    what = "points" if protocol.of_points else "images"
    values = ", ".join(f"{name} {value:.4g}" for name, value in real.items())
    parts = [
        f"# {prose(title)}",
        f"**{prose(note)}**" if note else "",
        f"![{prose(caption)}](grid.png)" if caption else "",
        table(rows, protocol.names()),
        f"Protocol: {prose(protocol.describe())}.",
        legend(protocol, columns(rows)),
        f"The real {what} themselves: {values}." if real else "",
        "## Gates\n\n" + gate_table(gates) if gates else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
