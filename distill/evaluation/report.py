"""Numbers as a page to read: the table, the gates, and how they were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation.gates import GateResult
from distill.evaluation.protocol import Protocol

# metric -> (column heading, format)
COLUMNS = {
    "nfe": ("nfe", "d"),
    "fd": ("fd ↓", ".3f"),
    "kid": ("kid·10³ ↓", ".1f"),
    "sliced_wasserstein": ("sliced W ↓", ".3f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall ↑", ".3f"),
    "density": ("density", ".3f"),
    "coverage": ("coverage ↑", ".3f"),
    "class_std": ("class std", ".3f"),
    "nn_train": ("nn train", ".3f"),
    "class_accuracy": ("accuracy", ".3f"),
    "teacher_mse": ("teacher mse ↓", ".4f"),
    "straightness": ("straightness ↓", ".3f"),
    "images_per_second": ("images/s ↑", ".0f"),
}
LEGEND = (
    "`fd`, `kid`: Fréchet and kernel distance in the features that the protocol names (not an FID; two "
    "halves of the real images score worse than a good model of many samples, since they are few; `kid` "
    "is unbiased and may be negative). `sliced W`: sliced Wasserstein distance of pixels. `precision`, "
    "`density`: how real single samples are; `recall`, `coverage`: how much of the real variety there "
    "is; the first two rise and the last two fall when samples collapse to class means. `class std`: "
    "spread of pixels within a class; `nn train`: distance to the nearest training image; `accuracy`: "
    "the classifier agrees with the label asked for. `teacher mse`: distance to the teacher's image "
    "from the same noise. `straightness`: 0 for straight paths. `nfe`: network calls. `images/s` "
    "depends on the machine and its load."
)
SCALE = {"kid": 1000.0}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of rows of metrics.json; columns that are null everywhere are left out."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = [
        "| model | steps | " + " | ".join(COLUMNS[key][0] for key in keys) + " |",
        "|---|---|" + "---|" * len(keys),
    ]
    for row in rows:
        cells = [
            f"{row[key] * SCALE.get(key, 1):{COLUMNS[key][1]}}" if row.get(key) is not None else "-"
            for key in keys
        ]
        lines.append(f"| {row['model']} | {row['steps']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gate_table(gates: Sequence[GateResult]) -> str:
    """Markdown table of gate results."""
    lines = ["| gate | value | bound | |", "|---|---|---|---|"]
    for gate in gates:
        bound = (
            "[{:.4g}, {:.4g}]".format(*gate.bound) if isinstance(gate.bound, tuple) else f"{gate.bound:.4g}"
        )
        lines.append(
            f"| {gate.name} | {gate.value:.4g} | {gate.relation} {bound} | "
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
    grid: bool,
    note: str = "",
) -> str:
    """The page `report.md`."""
    parts = [
        f"# {title}",
        f"**{note}**" if note else "",
        "![one noise a column](grid.png)" if grid else "",
        table(rows),
        f"Protocol: {protocol.describe()}.",
    ]
    parts.append(LEGEND)
    if real:
        parts.append(
            "The real images themselves: "
            + ", ".join(f"{name} {value:.4g}" for name, value in real.items())
            + "."
        )
    if gates:
        parts += ["## Gates", gate_table(gates)]
    return "\n\n".join(part for part in parts if part) + "\n"
