"""Numbers as a page to read: the table, the gates, and how they were measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation.gates import GateResult
from distill.evaluation.protocol import Protocol
from distill.terminal import line

# metric -> (heading where the protocol has no name for it, unit and direction, format)
COLUMNS = {
    "guidance_scale": ("guidance", "", "g"),
    "guidance_w": ("w", "", "g"),
    "nfe": ("nfe", "", "d"),
    "fd": ("fd", " ↓", ".3f"),
    "kid": ("kid", "·10³ ↓", ".1f"),
    "cmmd": ("cmmd", " ↓", ".3f"),
    "energy": ("energy", " ↓", ".4f"),
    "sliced_wasserstein": ("sliced W", " ↓", ".3f"),
    "precision": ("precision", "", ".3f"),
    "recall": ("recall", " ↑", ".3f"),
    "density": ("density", "", ".3f"),
    "coverage": ("coverage", " ↑", ".3f"),
    "class_std": ("class std", "", ".3f"),
    "nn_train": ("nn train", "", ".3f"),
    "class_accuracy": ("accuracy", "", ".3f"),
    "teacher_mse": ("teacher mse", " ↓", ".4f"),
    "transport_cost": ("transport", "", ".3f"),
    "straightness": ("straightness", " ↓", ".3f"),
    "straightness_norm": ("S / transport", " ↓", ".4f"),
    "one_step_gap": ("one-step gap", " ↓", ".4f"),
    "images_per_second": ("images/s", " ↑", ".0f"),
}
SCALE = {"kid": 1000.0}


def prose(text: object) -> str:
    """A name or a sentence for Markdown: on one line, without markup, HTML or control characters of its own."""
    told = line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;")
    return re.sub(r"([\\`*\[\]~]|(?<!\w)_|_(?!\w))", r"\\\1", told)


def legend(protocol: Protocol) -> str:
    """What the columns mean, under the names of `Protocol.names`."""
    n = protocol.names()
    distance = (
        "the Fréchet distance in Inception features"
        if protocol.features == "inception"
        else f"the Fréchet distance in the features {protocol.features} (not an FID)"
    )
    parts = [
        f"`{n['fd']}`: {distance}; two halves of the real images score worse than a good model of many samples, since "
        f"they are few. `{n['kid']}`: kernel distance in the same features, unbiased, may be negative."
    ]
    if "cmmd" in n:
        parts.append(
            f"`{n['cmmd']}`: Gaussian kernel distance of CLIP embeddings, times 1000, biased upward."
        )
    parts.append(
        f"`{n['sliced_wasserstein']}`: sliced Wasserstein distance of pixels. `{n['precision']}`, `{n['density']}`: how "
        f"real single samples are; `{n['recall']}`, `{n['coverage']}`: how much of the real variety there is; the first "
        "two rise and the last two fall when samples collapse to class means. `class std`: spread of pixels within a "
        f"class; `nn train`: distance to the nearest training image; `{n['class_accuracy']}`: the classifier agrees "
        "with the label asked for. `teacher mse`: distance to the teacher's image from the same noise. `straightness`: 0 "
        "for straight paths. `nfe`: network calls. `guidance`: the scale g in u + g (c - u); `w`: g - 1 as an input of the "
        "network. `images/s` depends on the machine and its load."
    )
    if any("@" in name for name in n.values()):
        parts.append(
            "`@` and a count: fewer samples than the metric's name stands for; compare only with the same count."
        )
    return " ".join(parts)


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of `COLUMNS` that some row has a value for; a guidance scale of 1 is none."""
    return [
        key
        for key in COLUMNS
        if any(row.get(key) is not None and (key, row[key]) != ("guidance_scale", 1) for row in rows)
    ]


def table(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """Markdown table of rows of metrics.json under the names of `Protocol.names`; columns that are null everywhere are
    left out, and so is guidance where there is none."""
    keys = columns(rows)
    headings = [prose(names.get(key, COLUMNS[key][0])) + COLUMNS[key][1] for key in keys]
    lines = [
        "| model | steps | " + " | ".join(headings) + " |",
        "|---|---|" + "---|" * len(keys),
    ]
    for row in rows:
        cells = [
            f"{row[key] * SCALE.get(key, 1):{COLUMNS[key][2]}}" if row.get(key) is not None else "-"
            for key in keys
        ]
        lines.append(f"| {prose(row['model'])} | {row['steps']} | " + " | ".join(cells) + " |")
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
    grid: bool,
    note: str = "",
) -> str:
    """The page `report.md`."""
    parts = [
        f"# {prose(title)}",
        f"**{prose(note)}**" if note else "",
        "![one noise a column](grid.png)" if grid else "",
        table(rows, protocol.names()),
        f"Protocol: {prose(protocol.describe())}.",
    ]
    parts.append(legend(protocol))
    if real:
        parts.append(
            "The real images themselves: "
            + ", ".join(f"{name} {value:.4g}" for name, value in real.items())
            + "."
        )
    if gates:
        parts += ["## Gates", gate_table(gates)]
    return "\n\n".join(part for part in parts if part) + "\n"
