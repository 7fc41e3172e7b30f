"""Shared by all tests: one thread, so that results do not depend on the machine and processes do not crowd each other; finished
runs; refusals; and what the suite costs."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests_support import copied_run, refusal, shared_run, start_server

torch.set_num_threads(1)
gc.set_threshold(
    50_000, 20, 20
)  # composing configs makes many objects; looking through all of torch's as often takes longer
pytest_plugins = ["budget"]
OF_DIFFUSERS = (
    "captioned_images",
    "exports",
    "latent_files",
    "lora_files",
    "prompts",
    "recomputed_activations",
    "teachers",
    "token_files",
)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[Any]:
    """Start what runs the verbs, after all tests were imported and before one of them runs. Not in the process that only tells
    those of xdist what to run."""
    if os.environ.get("PYTEST_XDIST_WORKER") or not session.config.getoption("numprocesses", None):
        start_server()
    return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process takes all files that need the pipelines of diffusers, whose imports take as long as many tests."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "diffusers" if Path(file).stem.removeprefix("test_") in OF_DIFFUSERS else file

    return Together(config, log)


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Callable[[str], Path]:
    """`shared(recipe)`: a folder with a finished smoke run `runs/run` of the recipe, one for all tests, which only read it."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "shared"
    place.mkdir(exist_ok=True)
    return lambda recipe: shared_run(place, recipe)


@pytest.fixture(scope="module")
def finished(shared, tmp_path_factory) -> Path:
    """A folder with a finished smoke run `runs/run` of recipe=instaflow that the tests of this file share and may change."""
    return copied_run(shared("instaflow"), tmp_path_factory.mktemp("finished"))


@pytest.fixture
def refuse(tmp_path) -> Callable[..., str]:
    """`refuse(*arguments)`: the message that `distill.train` ends with in an empty folder, before anything is exported."""

    def call(*arguments: str, verb: str = "train") -> str:
        message = refusal(tmp_path, verb, *arguments)
        assert not list(tmp_path.rglob("export/artifact.json"))
        return message

    return call
