"""Reads several evaluations, checks that their protocols agree, and prints one table with the best values marked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.evaluation.metric import Metric, metric
from distill.evaluation.protocol import Protocol
from distill.evaluation.report import columns, legend, prose
from distill.files import read_json
from distill.typed import parse

SCHEMA = 1
METRICS = "metrics.json"
NOTHING = "-"
MARKING = (
    "Bold: the best of a column that has a direction (arrow), among all rows; `teacher mse` and `images/s` are not "
    "marked, since they depend on the teacher and on the machine."
)


@dataclass(frozen=True)
class Run:
    """One metrics.json: `name` is what tables call it, `real` the values of the real images, `note` the sentence
    above its numbers ("" for none)."""

    name: str
    file: Path
    protocol: Protocol
    rows: tuple[Mapping[str, Any], ...]
    real: Mapping[str, float]
    note: str = ""


def find(paths: Sequence[str]) -> tuple[list[Path], list[str]]:
    """(the metrics.json of every path, the folders that have none).

    A path is a run folder, an evaluation folder or the file itself. Raises ValueError for no path, a path that does
    not exist, a file given twice, or where nothing is left.
    """
    if not paths:
        raise ValueError("runs: none given; expected folders with a metrics.json, such as runs/*")
    found: list[Path] = []
    without: list[str] = []
    for given in paths:
        path = Path(given)
        if not path.exists():
            raise FileNotFoundError(
                f"{given}: no such file or folder; expected a run, an evaluation or a metrics.json"
            )
        file = path / METRICS if path.is_dir() else path
        if not file.is_file():
            without.append(given)
            continue
        if any(file.samefile(other) for other in found):
            raise ValueError(f"{given}: given twice")
        found.append(file)
    if not found:
        raise FileNotFoundError(f"{', '.join(without)}: no {METRICS} in any of them; expected finished runs")
    return found, without


def read(files: Sequence[Path]) -> list[Run]:
    """The evaluations; errors name the file and the key."""
    return [_read(file, name) for file, name in zip(files, _names(files), strict=True)]


def _names(files: Sequence[Path]) -> list[str]:
    """The names of the folders, each with as many parents as make them distinct."""
    parts = [file.resolve().parent.parts for file in files]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(file) for file in files]  # several files in one folder


def _read(file: Path, name: str) -> Run:
    content = read_json(file)
    found = content.get("schema") if isinstance(content, dict) else type(content).__name__
    if found != SCHEMA:
        raise ValueError(f"{file}: schema: found {found!r}, this version reads {SCHEMA}")
    for key, kind in (("protocol", dict), ("rows", list)):
        if not isinstance(content.get(key), kind):
            raise ValueError(
                f"{file}: {key}: found {type(content.get(key)).__name__}, expected {kind.__name__}"
            )
    if not content["rows"]:
        raise ValueError(f"{file}: rows: empty, expected at least one")
    for number, row in enumerate(parse(list[dict[str, Any]], content["rows"], f"{file}: rows")):
        if missing := [key for key in ("model", "steps") if key not in row]:
            raise ValueError(f"{file}: rows: {missing[0]}: missing in {row}")
        for key, value in row.items():
            parse(_ROW.get(key, float | str | bool | None), value, f"{file}: rows[{number}].{key}")
    try:
        protocol = Protocol.from_dict(content["protocol"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    real = parse(_REAL, content.get("real"), f"{file}: real") or {}
    note = parse(_NOTE, content.get("note"), f"{file}: note") or ""
    return Run(name, file, protocol, tuple(content["rows"]), real, note)


_REAL: Any = dict[str, float | None] | None
_NOTE: Any = str | None
# The types of the entries of a row that are no numbers.
_ROW: dict[str, Any] = {"model": str, "steps": int | None, "nfe": int | None}


def check_protocols(runs: Sequence[Run]) -> None:
    """Raise ValueError unless all of the protocols but the floor agree; the message names what differs, and where.

    `straightness_steps` is compared only where a row has a straightness, and `full_count`, which files of older versions
    lack and which changes names alone, only where it is given.
    """
    fields = [key for key in runs[0].protocol.to_dict() if key not in ("floor", "names")]
    lines = []
    for field in fields:
        values: dict[str, list[str]] = {}
        for run in runs:
            value = run.protocol.to_dict()[field]
            if field == "straightness_steps" and not _has(run, "straightness"):
                continue
            if field == "full_count" and value is None:
                continue
            values.setdefault(str(value), []).append(run.name)
        if len(values) > 1:
            lines.append(
                f"  {field}: "
                + "; ".join(f"{value} in {', '.join(names)}" for value, names in values.items())
            )
    if lines:
        raise ValueError(
            "the protocols differ, so the numbers do not compare:\n"
            + "\n".join(lines)
            + "\nexpected runs that were measured alike: leave some out (runs with profile=smoke draw few samples), or measure "
            "a model again with distill.evaluate"
        )


def protocol(runs: Sequence[Run]) -> Protocol:
    """The protocol of all runs: that of the first with a `full_count`, which names need."""
    return next((run.protocol for run in runs if run.protocol.full_count is not None), runs[0].protocol)


def _has(run: Run, metric: str) -> bool:
    return any(row.get(metric) is not None for row in run.rows)


def check_metric(runs: Sequence[Run], name: str) -> list[str]:
    """The names of the runs that have no value of the metric; raises ValueError where none has one."""
    numbers = [
        key for run in runs for row in run.rows for key, v in row.items() if isinstance(v, int | float)
    ]
    known = [key for key in dict.fromkeys(numbers) if key != "steps" and metric(key).plotted]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"metric: found {name!r}, expected a metric of these runs: {', '.join(known)}{hint}")
    return [run.name for run in runs if not _has(run, name)]


def table(runs: Sequence[Run], mark: str = "**{}**") -> str:
    """Markdown table of all rows of all runs in their order; columns that are null everywhere are left out, and so is
    the guidance scale where it is 1 everywhere.
    The best of a column, and what is printed like it, is put into `mark`."""
    rows, names = [(run.name, row) for run in runs for row in run.rows], protocol(runs).names()
    shown = columns([row for _, row in rows])
    best = [m.cell(_best(m, [row for _, row in rows])) for m in shown]
    lines = [
        "| run | model | steps | " + " | ".join(prose(m.heading(names)) + m.suffix for m in shown) + " |",
        "|---|---|---|" + "---|" * len(shown),
    ]
    for name, row in rows:
        cells = [m.cell(row.get(m.name)) for m in shown]
        cells = [
            mark.format(cell) if cell == top != NOTHING else cell
            for cell, top in zip(cells, best, strict=True)
        ]
        head = [prose(name), prose(row["model"]), NOTHING if row["steps"] is None else row["steps"]]
        lines.append("| " + " | ".join(str(cell) for cell in [*head, *cells]) + " |")
    return "\n".join(lines)


def _best(column: Metric, rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The value to mark."""
    values = [row[column.name] for row in rows if row.get(column.name) is not None]
    if not column.comparable or column.better not in ("lower", "higher"):
        return None
    return min(values) if column.better == "lower" else max(values)


def aligned(text: str) -> str:
    """A Markdown table with its columns padded to equal width, for a terminal; numbers to the right."""
    cells = [[_unescaped(cell) for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    head, body = cells[0], cells[2:]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    words = [not any(_numeric(row[i]) for row in body) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = [c.ljust(w) if word else c.rjust(w) for c, w, word in zip(row, widths, words, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, body)])


def _unescaped(cell: str) -> str:
    """A cell of a Markdown table without what `prose` put before markup."""
    plain = (
        cell.strip().replace("&lt;", "<").replace("&gt;", ">").replace("&#124;", "|").replace("&amp;", "&")
    )
    return re.sub(r"\\([\\`*\[\]~_])", r"\1", plain)


def _numeric(cell: str) -> bool:
    try:
        float(cell.strip("*").strip())
    except ValueError:
        return False
    return True


def remarks(runs: Sequence[Run], without: Sequence[str], metric: str, missing: Sequence[str]) -> list[str]:
    """Notes of runs, folders without metrics.json, runs without a value in the plot."""
    lines = [f"{run.name}: {run.note}" for run in runs if run.note]
    lines += [f"{path}: left out, it has no {METRICS} (unfinished, or no run)" for path in without]
    return lines + [f"{name}: no {metric} in any row, so it is not in the plot" for name in missing]


def page(runs: Sequence[Run], picture: str, metric: str, notes: Sequence[str]) -> str:
    """The Markdown page: plot, table, protocol, remarks."""
    parts = [
        "# Comparison of " + ", ".join(prose(run.name) for run in runs),
        f"![{metric} against network calls]({picture})",
        table(runs),
        f"Protocol of all rows: {prose(protocol(runs).describe())}.",
        "\n".join(f"- **{prose(remark)}**" for remark in notes),
        MARKING,
        legend(protocol(runs), columns([row for run in runs for row in run.rows])),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
