"""The built wheel runs from an empty folder; users bring their own recipes; sweeps have a folder a run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests_support import ROOT, STARTED_ANEW, call_verb, environment, run_verb

MINE = """# @package _global_
defaults:
  - toy_instaflow
  - _self_
stages:
  reflow: {steps: 3}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """The environment of a user who installed the wheel: nothing of the checkout on the path."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "dist"), str(ROOT)]
    subprocess.run([*pip, *build], check=True, capture_output=True, timeout=300)
    wheel = next((folder / "dist").glob("distill-*.whl"))
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True, timeout=300
    )
    return environment() | {"PYTHONPATH": str(folder / "site")}


def test_the_wheel_runs_the_recipe_from_an_empty_folder(installed, tmp_path):
    code = "import distill; print(distill.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=installed, text=True, capture_output=True, check=True
    )
    assert str(ROOT) not in where.stdout
    # Two processes, started as a user's are; the other tests fork theirs.
    done = subprocess.run(
        [sys.executable, "-m", "distill.train", "recipe=toy_instaflow", "profile=smoke", "trainer.devices=2"],
        cwd=tmp_path,
        env=installed,
        text=True,
        capture_output=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/toy_instaflow-smoke/export/model.safetensors").is_file()
    assert os.listdir(tmp_path) == ["runs"]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with a recipe of the user's."""
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "recipe" / "mine.yaml").write_text(MINE)
    return tmp_path


def test_a_users_own_recipe(mine):
    for where in (["--config-dir", "conf"], [f"hydra.searchpath=[file://{mine}/conf]"]):
        planned = call_verb(mine, "train", *where, "recipe=mine", "plan=true", check=True)
        assert "runs/mine: 7 stages" in planned.stdout
        assert re.search(r"reflow +new +Train +steps 3,", planned.stdout)
    wrong = call_verb(mine, "train", "--config-dir", "conf", "recipe=mien").stderr
    assert "recipe: found 'mien', did you mean mine?; expected " in wrong
    assert " mine, " in wrong


@pytest.mark.slow
def test_a_users_own_recipe_on_two_processes(mine):
    run_verb(mine, "train", "--config-dir", "conf", "recipe=mine", "profile=smoke", "trainer.devices=2")
    assert (mine / "runs/mine-smoke/export/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_sweeps_have_a_folder_a_run(tmp_path, devices):
    """Processes are started as by a user."""
    command = ("-m", "recipe=toy_instaflow", "profile=smoke", "seed=0,1", "profile.steps=1")
    command += (f"trainer.devices={devices}",)
    run_verb(tmp_path, "train", *command, before=STARTED_ANEW)
    runs = sorted(p.name for p in (tmp_path / "runs").glob("[!.]*") if p.is_dir())
    assert runs == ["toy_instaflow-smoke-seed-0", "toy_instaflow-smoke-seed-1"]
    for run in runs:
        assert (tmp_path / "runs" / run / "export" / "model.safetensors").is_file()
    again = run_verb(tmp_path, "train", *command)
    stages = len(list((tmp_path / "runs" / runs[0]).glob("*/artifact.json")))
    assert again.stderr.count("already finished, skipped") == 2 * stages
