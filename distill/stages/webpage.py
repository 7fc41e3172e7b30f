"""report.html: one file that shows a whole run, without network access: samples, table, gates, curves, costs, environment."""

from __future__ import annotations

import base64
import html
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from PIL import Image

from distill.engine.logging import read_entries
from distill.evaluation.evaluation import METRICS, PAGE, PICTURE, STRIPS
from distill.evaluation.grid import BORDER_WIDTH
from distill.evaluation.metric import metrics
from distill.evaluation.protocol import Protocol
from distill.evaluation.report import columns, legend
from distill.files import read_json, write_text
from distill.stages.artifact import read_artifact
from distill.stages.monitor import FOLDER as MONITOR
from distill.stages.monitor import RECORD as EVALUATIONS
from distill.stages.ownership import CONFIG, PLAN, WEBPAGE
from distill.terminal import line

POINTS = 400  # of a curve; more are averaged
PACKAGES = ("distill", "torch", "lightning", "hydra-core", "diffusers", "transformers")
COUNTERS = ("images", "step", "iteration", "seconds", "count")  # of entries of logs


def write_webpage(folder: Path) -> None:
    """Write report.html of a run folder, where it is missing or would be another."""
    path, text = folder / WEBPAGE, webpage(folder)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def webpage(folder: Path) -> str:
    """The page of a run folder with a plan: finished stages have costs and curves, evaluations tables. The last evaluation,
    whose files lie at the top of the run, has samples."""
    plan = read_json(folder / PLAN)
    stages = {name: folder / name for name in plan["stages"]}
    records = {name: record for name, place in stages.items() if (record := read_artifact(place)) is not None}
    measured = {
        name: read_json(stages[name] / METRICS) for name in records if (stages[name] / PAGE).is_file()
    }
    *others, shown = measured or [None]
    strips = None if shown is None else _strips(stages[shown], measured[shown]["rows"])
    note = "" if shown is None else measured[shown].get("note", "")
    results = "<p>No evaluation is finished.</p>" if shown is None else _results(measured[shown], "marked")
    curves = [stage for name, place in stages.items() if (stage := _curves(name, place)) is not None]
    template = Template(resources.files("distill.assets").joinpath("report.html").read_text(encoding="utf-8"))
    parts = {
        "title": _text(folder.resolve().name),
        "subtitle": _text(
            f"recipe {plan['recipe']}, seed {plan['seed']}, {len(records)} of {len(stages)} stages finished"
        ),
        "note": f'<p class="note">{_text(note)}</p>' if note else "",
        "viewer": "" if shown is None else _viewer(strips, stages[shown]),
        "results": results,
        "others": "".join(
            f"<h2>Results of the stage {_text(name)}</h2>{_results(measured[name])}" for name in others
        ),
        "costs": _costs(records),
        "environment": _table(["package", "version"], _versions()),
        "config": _text("\n".join(f"# {name}\n{_config(stages[name])}" for name in stages), lines=True),
        "data": _json({"stages": curves, "strips": None if strips is None else strips.places}),
    }
    return template.substitute(parts)


def _results(measured: Mapping[str, Any], kind: str = "") -> str:
    """The table of an evaluation, of a class of HTML, with its protocol, legend and gates."""
    protocol = Protocol.from_dict(measured["protocol"])
    rows, shown, names = measured["rows"], columns(measured["rows"]), protocol.names()
    best = {m.name: _best([row.get(m.name) for row in rows], m.better) for m in shown}
    head = ["model", "steps", *(m.heading(names) + m.suffix for m in shown)]
    body = []
    for row in rows:
        cells = [_cell(row["model"]), _cell("-" if row["steps"] is None else row["steps"])]
        for m in shown:
            chosen = row.get(m.name) is not None and row[m.name] == best[m.name]
            cells.append(_cell(m.cell(row.get(m.name)), "best" if chosen else ""))
        body.append(f"<tr>{''.join(cells)}</tr>")
    words = legend(protocol, shown).replace("`", "")
    parts = [
        f'<div class="wide"><table class="{kind}"><thead>{_head(head)}</thead><tbody>{"".join(body)}</tbody></table></div>',
        f'<p class="dim">Protocol: {_text(protocol.describe())}. The best number of a column is bold.</p>',
        f'<p class="legend">{_text(words)}</p>',
    ]
    if measured["gates"]:
        gates = "".join(_gate(gate) for gate in measured["gates"])
        parts.append(
            f'<h3>Gates</h3><div class="wide"><table>{_head(["gate", "value", "bound", ""])}{gates}</table></div>'
        )
    return "".join(parts)


def _gate(gate: Mapping[str, Any]) -> str:
    outcome = "passed" if gate["passed"] else "missed"
    cells = [_cell(gate["name"]), _cell(f"{gate['value']:.4g}"), _cell(_bound(gate)), _cell(outcome, outcome)]
    return f"<tr>{''.join(cells)}</tr>"


def _cell(value: object, kind: str = "") -> str:
    return f'<td class="{kind}">{_text(value)}</td>' if kind else f"<td>{_text(value)}</td>"


def _bound(gate: Mapping[str, Any]) -> str:
    bound = gate["bound"]
    words = "[{:.4g}, {:.4g}]".format(*bound) if isinstance(bound, list) else f"{bound:.4g}"
    return f"{gate['relation']} {words}"


def _best(values: Sequence[float | None], better: str) -> float | None:
    found = [value for value in values if value]  # 0: a row that is compared with itself
    if better not in ("lower", "higher") or len(set(found)) < 2:
        return None
    return min(found) if better == "lower" else max(found)


class _Strips(NamedTuple):
    """Samples of all rows of a table: the image as a URL, and where its rows are."""

    url: str
    places: dict[str, Any]


def _strips(folder: Path, rows: Sequence[Mapping[str, Any]]) -> _Strips | None:
    path = folder / STRIPS
    if not path.is_file():
        return None
    with Image.open(path) as image:
        width, height = image.size
    cell = (height - BORDER_WIDTH) // len(rows)
    titles = [_title(row) for row in rows]
    places = {"titles": titles, "width": width, "height": height, "cell": cell, "border": BORDER_WIDTH}
    return _Strips(_url(path), places)


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


def _viewer(strips: _Strips | None, folder: Path) -> str:
    """Samples of two rows of the table from the same noise, one of them chosen by a slider; else the picture."""
    if strips is None:
        picture = folder / PICTURE
        return f'<p><img alt="samples" src="{_url(picture)}"></p>' if picture.is_file() else ""
    return (
        '<div class="viewer"><label>compared with <select id="fixed"></select></label><div class="strip" id="above"></div>'
        '<label for="slider" id="chosen"></label><input type="range" id="slider" min="0" step="1">'
        '<div class="strip" id="below"></div><span class="dim">A column is one noise (and condition). The slider goes through '
        f'the rows of the table.</span><img id="image" hidden alt="" src="{strips.url}"></div>'
    )


def _curves(name: str, folder: Path) -> dict[str, Any] | None:
    """The curves of a training stage: losses and monitored metrics first."""
    logged = _series(folder / "logs" / "metrics.jsonl")
    monitored = _series(folder / MONITOR / EVALUATIONS)
    if not logged and not monitored:
        return None
    main = {key: points for key, points in logged.items() if key.endswith("/loss")} | {
        f"monitor/{key}": points for key, points in monitored.items()
    }
    more = {key: points for key, points in logged.items() if key not in main}
    return {"name": name, "main": list(main.items()), "more": sorted(more.items())}


def _series(path: Path) -> dict[str, list[list[float]]]:
    """key -> [[images, value], ...] of a log, without what is null."""
    found: dict[str, list[list[float]]] = {}
    for entry in read_entries(path):
        if entry.get("images") is None:
            continue
        for key, value in entry.items():
            if key not in COUNTERS and value is not None:
                found.setdefault(key, []).append([entry["images"], value])
    return {key: _thinned(points) for key, points in found.items()}


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """At most `POINTS` points of seven digits: means of neighbours."""
    size = -(-len(points) // POINTS)
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [
        [float(f"{sum(column) / len(column):.7g}") for column in zip(*group, strict=True)] for group in groups
    ]


def _costs(records: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a stage: seconds, steps, images, memory."""
    forms = {"train_seconds": ",.4g", "steps": ",", "images": ",", "parameters": ","}
    rows = []
    for name, record in records.items():
        facts = record["facts"]
        memory = facts.get("peak_memory_bytes")
        cells = ["-" if facts.get(key) is None else format(facts[key], form) for key, form in forms.items()]
        kind = record["identity"]["config"]["_target_"].rpartition(".")[2]
        rows.append([name, kind, *cells, "-" if memory is None else f"{memory / 2**20:,.0f} MiB"])
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
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
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
