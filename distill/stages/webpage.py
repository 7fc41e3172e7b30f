"""report.html: one file that shows a whole run, without network access: samples, table, gates, curves, costs, environment."""

from __future__ import annotations

import base64
import html
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from string import Template
from typing import Any, TypeGuard

from PIL import Image

from distill.evaluation.evaluation import METRICS, PICTURE, STRIPS
from distill.evaluation.metric import metrics
from distill.evaluation.protocol import Protocol
from distill.evaluation.report import columns, legend
from distill.files import read_json, write_text
from distill.stages.artifact import read_artifact
from distill.stages.ownership import CONFIG, PLAN, WEBPAGE
from distill.terminal import line

POINTS = 400  # of a curve; more are averaged
PACKAGES = ("distill", "torch", "lightning", "hydra-core", "diffusers", "transformers")
BORDER = 2  # of `evaluation.grid.image_grid`


def write_webpage(folder: Path) -> None:
    """Write report.html of a run folder, where it is missing or would be another."""
    path, text = folder / WEBPAGE, webpage(folder)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def webpage(folder: Path) -> str:
    """The page of a run folder with a plan: finished stages have costs and curves; an evaluation has a table and samples."""
    plan = read_json(folder / PLAN)
    stages = {name: folder / name for name in plan["stages"]}
    records = {name: record for name, place in stages.items() if (record := read_artifact(place)) is not None}
    evaluated = [
        name
        for name in records
        if (stages[name] / METRICS).is_file() and (stages[name] / "report.md").is_file()
    ]
    measured = read_json(stages[evaluated[-1]] / METRICS) if evaluated else None
    strips = _strips(stages[evaluated[-1]], measured) if measured else None
    curves = [stage for name, place in stages.items() if (stage := _curves(name, place)) is not None]
    template = Template(resources.files("distill.assets").joinpath("report.html").read_text(encoding="utf-8"))
    parts = {
        "title": _text(folder.resolve().name),
        "subtitle": _text(
            f"recipe {plan['recipe']}, seed {plan['seed']}, {len(records)} of {len(stages)} stages finished"
        ),
        "note": f'<p class="note">{_text(measured["note"])}</p>' if measured and measured.get("note") else "",
        "viewer": _viewer(strips, stages[evaluated[-1]] if evaluated else None),
        **_results(measured),
        "costs": _costs(records),
        "environment": _table(["package", "version"], _versions()),
        "config": _text("\n".join(f"# {name}\n{_config(stages[name])}" for name in stages), lines=True),
        "data": _json({"stages": curves, "strips": None if strips is None else strips[1]}),
    }
    return template.substitute(parts)


def _results(measured: Mapping[str, Any] | None) -> dict[str, str]:
    """The table, its protocol, legend and gates."""
    if measured is None:
        return {"table": "<p>No evaluation is finished.</p>", "protocol": "", "legend": "", "gates": ""}
    protocol = Protocol.from_dict(measured["protocol"])
    rows, shown, names = measured["rows"], columns(measured["rows"]), protocol.names()
    best = {m.name: _best([row.get(m.name) for row in rows], m.better) for m in shown}
    head = ["model", "steps", *(m.heading(names) + m.suffix for m in shown)]
    body = []
    for row in rows:
        cells = [
            f"<td>{_text(row['model'])}</td>",
            f"<td>{_text('-' if row['steps'] is None else row['steps'])}</td>",
        ]
        for m in shown:
            chosen = row.get(m.name) is not None and row[m.name] == best[m.name]
            mark = " class=best" if chosen else ""
            cells.append(f"<td{mark}>{_text(m.cell(row.get(m.name)))}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    gates = [
        f"<tr><td>{_text(gate['name'])}</td><td>{gate['value']:.4g}</td><td>{_text(_bound(gate))}</td>"
        f"<td class={'passed>passed' if gate['passed'] else 'missed>missed'}</td></tr>"
        for gate in measured["gates"]
    ]
    words = " ".join(_text(part) for part in legend(protocol, shown).replace("`", "").split())
    return {
        "table": f'<table id="rows"><thead>{_head(head)}</thead><tbody>{"".join(body)}</tbody></table>',
        "protocol": f"Protocol: {_text(protocol.describe())}. The best number of a column is bold.",
        "legend": words,
        "gates": f"<h2>Gates</h2><div class=wide><table>{_head(['gate', 'value', 'bound', ''])}{''.join(gates)}</table></div>"
        if gates
        else "",
    }


def _bound(gate: Mapping[str, Any]) -> str:
    bound = gate["bound"]
    words = "[{:.4g}, {:.4g}]".format(*bound) if isinstance(bound, list) else f"{bound:.4g}"
    return f"{gate['relation']} {words}"


def _best(values: Sequence[float | None], better: str) -> float | None:
    found = [value for value in values if value]  # 0: a row that is compared with itself
    if better not in ("lower", "higher") or len(set(found)) < 2:
        return None
    return min(found) if better == "lower" else max(found)


def _strips(folder: Path, measured: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(image as a URL, where its rows are) of the samples of all rows of the table."""
    path, rows = folder / STRIPS, measured["rows"]
    if not path.is_file():
        return None
    with Image.open(path) as image:
        width, height = image.size
    cell = (height - BORDER) // len(rows)
    titles = [_title(row) for row in rows]
    return _url(path), {"titles": titles, "width": width, "height": height, "cell": cell, "border": BORDER}


def _title(row: Mapping[str, Any]) -> str:
    """A row in words: its model, steps and the first of its metrics."""
    parts = [f"{row['model']}, {row['steps']} step{'s' * (row['steps'] != 1)}"]
    if row.get("nfe") is not None:
        parts.append(f"{row['nfe']:g} network call{'s' * (row['nfe'] != 1)}")
    quality = next(
        (m for m in metrics() if m.name in ("fd", "energy", "teacher_mse") and row.get(m.name) is not None),
        None,
    )
    if quality is not None:
        parts.append(f"{quality.name} {quality.cell(row[quality.name])}")
    return " · ".join(parts)


def _viewer(strips: tuple[str, dict[str, Any]] | None, folder: Path | None) -> str:
    """Samples of two rows of the table from the same noise, one of them chosen by a slider; else the picture."""
    if strips is None:
        picture = None if folder is None else folder / PICTURE
        return (
            f'<p><img alt="samples" src="{_url(picture)}"></p>'
            if picture is not None and picture.is_file()
            else ""
        )
    return (
        '<div class="viewer"><label>compared with <select id="fixed"></select></label><div class="strip" id="above"></div>'
        '<label for="slider" id="chosen"></label><input type="range" id="slider" min="0" step="1">'
        '<div class="strip" id="below"></div><span class="dim">A column is one noise (and condition). The slider goes through '
        f'the rows of the table.</span><img id="image" hidden alt="" src="{strips[0]}"></div>'
    )


def _curves(name: str, folder: Path) -> dict[str, Any] | None:
    """The curves of a training stage: losses and monitored metrics first."""
    logged = _series(folder / "logs" / "metrics.jsonl")
    monitored = _series(folder / "monitor" / "evaluations.jsonl")
    monitored = {key: points for key, points in monitored.items() if key != "count"}
    if not logged and not monitored:
        return None
    main = {key: points for key, points in logged.items() if key.endswith("/loss")} | {
        f"monitor/{key}": points for key, points in monitored.items()
    }
    more = {key: points for key, points in logged.items() if key not in main}
    return {"name": name, "main": list(main.items()), "more": sorted(more.items())}


def _series(path: Path) -> dict[str, list[list[float]]]:
    """key -> [[images, value], ...] of a file of JSON lines; what is no number is left out, and a line that was cut ends it."""
    found: dict[str, list[list[float]]] = {}
    for entry in _json_lines(path):
        images = entry.get("images")
        if not _number(images):
            continue
        for key, value in entry.items():
            if key not in ("images", "step", "iteration", "seconds") and _number(value):
                found.setdefault(str(key), []).append([images, value])
    return {key: _thinned(points) for key, points in found.items()}


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    if not path.is_file():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(text)
        except ValueError:
            return
        if isinstance(entry, dict):
            yield entry


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """At most `POINTS` points of seven digits: means of neighbours."""
    size = -(-len(points) // POINTS)
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [
        [float(f"{sum(column) / len(column):.7g}") for column in zip(*group, strict=True)] for group in groups
    ]


def _costs(records: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a stage: seconds, steps, images, memory."""
    rows = []
    for name, record in records.items():
        facts = record["facts"]
        memory = facts.get("peak_memory_bytes")
        rows.append(
            [
                name,
                record["identity"]["config"]["_target_"].rpartition(".")[2],
                *("-" if facts.get(key) is None else f"{facts[key]:,.4g}" for key in ("train_seconds",)),
                *(
                    "-" if facts.get(key) is None else f"{facts[key]:,}"
                    for key in ("steps", "images", "parameters")
                ),
                "-" if memory is None else f"{memory / 2**20:,.0f} MiB",
            ]
        )
    return _table(
        ["stage", "kind", "seconds of training", "steps", "images", "parameters", "peak memory"], rows
    )


def _versions() -> list[list[str]]:
    found = [["python", platform.python_version()]]
    for name in PACKAGES:
        try:
            found.append([name, metadata.version(name)])
        except metadata.PackageNotFoundError:
            continue
    return found


def _config(folder: Path) -> str:
    path = folder / CONFIG
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "not begun\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{_head(head)}{body}</table>"


def _head(names: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<th>{_text(name)}</th>" for name in names) + "</tr>"


def _text(value: object, *, lines: bool = False) -> str:
    """Text for HTML, without markup or control characters of its own."""
    parts = str(value).split("\n") if lines else [str(value)]
    return "\n".join(html.escape(line(part)) for part in parts)


def _json(value: Any) -> str:
    """JSON that cannot end the element that holds it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
