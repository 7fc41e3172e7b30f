"""A local page that samples models side by side: plain HTTP of the standard library, so that it needs no further packages."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch

from distill.evaluation.grid import tile
from distill.models.generator import Generator
from distill.stages.standalone import valid_steps
from distill.terminal import line

MOST = 64  # images of a request
COLUMNS = 8
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PROMPT = 2000  # characters
ANSWERED = (ValueError, RuntimeError, FloatingPointError, OSError)


@dataclass(frozen=True)
class Shown:
    """A model of the page, under a name and with the folder it was loaded from."""

    name: str
    path: str
    generator: Generator

    @cached_property
    def description(self) -> dict[str, Any]:
        """What the page knows of it."""
        conditions, spec = self.generator.conditions, self.generator.spec
        return {
            "name": self.name,
            "path": self.path,
            "choices": sorted(valid_steps(spec)),
            "default": spec.steps,
            "labels": [str(label) for label in range(conditions.num_classes)],
            "classes": conditions.num_classes > 0,
            "prompts": conditions.kind == "prompts",
        }


def sampled(models: Sequence[Shown], query: Mapping[str, str]) -> dict[str, Any]:
    """The answer to /sample: a picture as a URL, and what it took.

    Raises:
        ValueError: names the entry of the query.
    """
    known = {"model", "seed", "count", "steps", "label", "prompt"}
    if unknown := sorted(set(query) - known):
        raise ValueError(f"{unknown[0]}: no such key; expected {', '.join(sorted(known))}")
    found = next((model for model in models if model.name == query.get("model")), None)
    if found is None:
        raise ValueError(
            f"model: found {query.get('model')!r}, expected one of {[model.name for model in models]}"
        )
    count, seed = _whole(query, "count", 16, 1, MOST), _whole(query, "seed", 0, 0, 2**63 - 1)
    steps = _whole(query, "steps", found.generator.spec.steps, 1, 10_000)
    label = _whole(query, "label", 0, 0, 2**31) if query.get("label") else None
    prompt = query.get("prompt") or None
    if prompt is not None and len(prompt) > PROMPT:
        raise ValueError(f"prompt: found {len(prompt)} letters, expected at most {PROMPT}")
    start = time.perf_counter()
    samples = found.generator.sample(count, label, prompt=prompt, seed=seed, steps=steps)
    seconds = time.perf_counter() - start
    written = io.BytesIO()
    tile(samples, min(count, COLUMNS)).save(written, format="PNG")
    return {
        "image": f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}",
        "milliseconds": 1000 * seconds,
        "count": count,
        "steps": steps,
        "calls": found.generator.network_calls(steps),
    }


def _whole(query: Mapping[str, str], key: str, default: int, least: int, most: int) -> int:
    text = query.get(key) or str(default)
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        raise ValueError(f"{key}: found {text!r}, expected an integer from {least} to {most}")
    return int(text)


def server(models: Sequence[Shown], host: str, port: int) -> ThreadingHTTPServer:
    """A server of the page, bound to host and port (0: a free one); `serve_forever` starts it.

    On a loopback address it answers only requests for that address, so that no web site can reach it through a name of its own.
    One request samples at a time. Raises OSError where the port is taken."""
    page = resources.files("distill.assets").joinpath("demo.html").read_bytes()
    lock = threading.Lock()
    for model in models:  # the first call of a network is slower than the others
        model.generator.sample(1, steps=1, force=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            place = urlsplit(self.path)
            if host in LOOPBACK and _name(self.headers.get("Host", "")) not in LOOPBACK:
                self.answer(HTTPStatus.FORBIDDEN, {"error": f"Host: expected one of {', '.join(LOOPBACK)}"})
            elif place.path == "/":
                self.send(HTTPStatus.OK, "text/html; charset=utf-8", page)
            elif place.path == "/models":
                self.answer(HTTPStatus.OK, [model.description for model in models])
            elif place.path == "/sample":
                self.sample({key: values[-1] for key, values in parse_qs(place.query).items()})
            else:
                self.answer(HTTPStatus.NOT_FOUND, {"error": "expected /, /models or /sample"})

        def sample(self, query: Mapping[str, str]) -> None:
            try:
                with lock, torch.inference_mode():
                    made = sampled(models, query)
            except ANSWERED as error:
                self.answer(HTTPStatus.BAD_REQUEST, {"error": line(error)})
            else:
                self.answer(HTTPStatus.OK, made)

        def answer(self, status: HTTPStatus, value: Any) -> None:
            self.send(status, "application/json", json.dumps(value).encode())

        def send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not logged; errors are in the page."""

    return ThreadingHTTPServer((host, port), Handler)


def _name(host: str) -> str:
    """The name of a Host header, without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
