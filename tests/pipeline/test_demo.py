"""The demo: its answers are the samples of the model, wrong requests are refused by name, and the page works in a browser."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from distill import load
from distill.demo import Options, models, parse
from distill.evaluation.grid import tile
from distill.stages.demo import server

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run(finished: Path) -> Path:
    return finished / "runs" / "run"


@pytest.fixture(scope="module")
def port(run: Path) -> Iterator[int]:
    shown = models(Options(model=str(run / "export"), teacher=str(run / "teacher")))
    with server(shown, "127.0.0.1", 0) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield serving.server_address[1]
        serving.shutdown()
        thread.join()


def ask(port: int, path: str, host: str | None = None, **query: Any) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(
        "GET", f"{path}?{urlencode(query)}" if query else path, headers={} if host is None else {"Host": host}
    )
    answer = connection.getresponse()
    text = answer.read().decode()
    return answer.status, text if path == "/" else json.loads(text)


def test_an_answer_is_what_the_model_samples(port: int, run: Path) -> None:
    status, made = ask(port, "/sample", model="student", label=3, seed=7, count=5, steps=1)
    assert status == 200
    expected = tile(load(run / "export").sample(5, label=3, seed=7, steps=1), 5)
    picture = Image.open(io.BytesIO(base64.b64decode(made["image"].partition(",")[2])))
    assert np.array_equal(np.asarray(picture), np.asarray(expected))
    assert (made["count"], made["steps"], made["calls"]) == (5, 1, 1)
    assert made["milliseconds"] > 0
    student, teacher = ask(port, "/models")[1]
    assert (student["name"], student["choices"], student["default"]) == ("student", [1], 1)
    assert teacher["default"] in teacher["choices"]
    assert student["labels"] == [str(digit) for digit in range(10)]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"model": "other"}, "model: found 'other', expected one of"),
        ({"model": "student", "count": 65}, "count: found '65', expected an integer from 1 to 64"),
        ({"model": "student", "count": "٣"}, "count: found"),
        ({"model": "student", "steps": 3}, "steps: this model was distilled for"),
        ({"model": "student", "seed": "-1"}, "seed: found '-1', expected an integer"),
        ({"model": "student", "label": 10}, "label: expected classes 0 .. 9, found"),
        ({"model": "student", "prompt": "a dog"}, "prompt: found 'a dog', but this model takes no prompts"),
        ({"model": "student", "file": "/etc"}, "file: no such key; expected count, label"),
    ],
)
def test_wrong_requests(port: int, query: dict[str, Any], message: str) -> None:
    status, answer = ask(port, "/sample", **query)
    assert status == 400
    assert message in answer["error"]


def test_other_pages_and_names_of_other_sites(port: int) -> None:
    assert ask(port, "/../../etc/passwd")[0] == 404
    status, answer = ask(port, "/models", host="evil.example")
    assert (status, answer["error"]) == (403, "Host: expected one of 127.0.0.1, localhost, ::1")
    assert ask(port, "/models", host=f"localhost:{port}")[0] == 200


def test_options(run: Path) -> None:
    for arguments, message in (
        ([], "model: missing; expected a model folder"),
        (["model=x", "port=70000"], "port: found 70000, expected 0 .. 65535"),
        (["model=x", "prot=1"], "prot: no such key, did you mean port?"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            parse(arguments)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")
def test_in_a_browser(port: int, tmp_path: Path) -> None:
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    )
    options += " --disable-component-update --disable-sync --virtual-time-budget=20000 --dump-dom"
    started = [CHROMIUM, *options.split(), f"--user-data-dir={tmp_path}", f"http://127.0.0.1:{port}/"]
    shown = subprocess.run(started, capture_output=True, text=True, timeout=120, check=True).stdout
    assert 'data-done="1"' in shown
    assert len(re.findall(r'src="data:image/png;base64,', shown)) == 2
    assert len(re.findall(r'<div class="time">[0-9.]+ ms<', shown)) == 2
    assert "16 images in 1 step, 1 network call each" in shown
