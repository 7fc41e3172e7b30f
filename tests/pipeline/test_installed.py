"""The built wheel runs from an empty folder; users bring their own recipes; sweeps have a folder a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests_support import ROOT, environment

MINE = """# @package _global_
defaults:
  - instaflow
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


def verb(installed: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distill.train", *arguments],
        cwd=folder,
        env=installed,
        text=True,
        capture_output=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_the_wheel_runs_the_recipe_from_an_empty_folder(installed, tmp_path):
    code = "import distill; print(distill.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=installed, text=True, capture_output=True, check=True
    )
    assert str(ROOT) not in where.stdout
    done = verb(installed, tmp_path, "recipe=instaflow", "profile=smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/instaflow-smoke/export/model.safetensors").is_file()
    assert os.listdir(tmp_path) == ["runs"]


def test_a_users_own_recipe(installed, tmp_path):
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "recipe" / "mine.yaml").write_text(MINE)
    for where in (["--config-dir", "conf"], [f"hydra.searchpath=[file://{tmp_path}/conf]"]):
        planned = verb(installed, tmp_path, *where, "recipe=mine", "plan=true")
        assert planned.returncode == 0, planned.stderr[-3000:]
        assert "runs/mine: 7 stages" in planned.stdout
        assert "Train     steps 3," in planned.stdout
    wrong = verb(installed, tmp_path, "--config-dir", "conf", "recipe=mien")
    assert "recipe is one of: " in wrong.stderr
    assert " mine, " in wrong.stderr
    assert "did you mean mine?" in wrong.stderr


def test_a_users_own_recipe_on_two_processes(installed, tmp_path):
    (tmp_path / "conf" / "recipe").mkdir(parents=True)
    (tmp_path / "conf" / "recipe" / "mine.yaml").write_text(MINE)
    done = verb(
        installed, tmp_path, "--config-dir", "conf", "recipe=mine", "profile=smoke", "trainer.devices=2"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/mine-smoke/export/model.safetensors").is_file()


def test_sweeps_have_a_folder_a_run(installed, tmp_path):
    swept = verb(
        installed, tmp_path, "-m", "recipe=instaflow", "profile=smoke", "seed=0,1", "profile.steps=1"
    )
    assert swept.returncode == 0, swept.stderr[-3000:]
    runs = sorted(p.name for p in (tmp_path / "runs").glob("[!.]*") if p.is_dir())
    assert runs == ["instaflow-smoke-seed-0", "instaflow-smoke-seed-1"]
    for run in runs:
        assert (tmp_path / "runs" / run / "export" / "model.safetensors").is_file()
    many = ("-m", "recipe=instaflow", "profile=smoke", "profile.steps=1", "seed=2,3", "trainer.devices=2")
    two = verb(installed, tmp_path, *many)
    assert two.returncode == 0, two.stderr[-3000:]
    for seed in (2, 3):
        assert (tmp_path / f"runs/instaflow-smoke-seed-{seed}/export/model.safetensors").is_file()
    again = verb(
        installed, tmp_path, "-m", "recipe=instaflow", "profile=smoke", "seed=0,1", "profile.steps=1"
    )
    assert again.stderr.count("finished before, skipped") == 14
