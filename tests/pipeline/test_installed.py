"""The built wheel runs from an empty folder; users bring their own recipes; sweeps have a folder a run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests_support import ROOT, STARTED_ANEW, call_verb, package_of, run_verb

MINE = """# @package _global_
defaults:
  - toy_instaflow
  - _self_
stages:
  reflow: {steps: 3}
"""


def test_the_wheel_runs_the_recipe_from_an_empty_folder(tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run([*pip, *build], check=True, capture_output=True, timeout=300)
    (wheel,) = (tmp_path / "dist").glob("distill-*.whl")
    with zipfile.ZipFile(wheel) as parts:
        parts.extractall(site)
    empty.mkdir()
    told = "\nimport distill; print(distill.__file__)"
    done = run_verb(
        *(empty, "train", "recipe=toy_instaflow", "profile=smoke"), before=package_of(site) + told
    )
    assert done.stdout.startswith(str(site / "distill"))
    assert (empty / "runs/toy_instaflow-smoke/export/model.safetensors").is_file()
    assert os.listdir(empty) == ["runs"]


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
