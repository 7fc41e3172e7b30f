"""Score distillation from the command line, killed and continued: the same models and nodes as of a run that nobody killed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import checkpoint_of, has_checkpoint
from tests_support import SMALL, kill_when, run_verb

from distill.files import sha256_file
from distill.methods.losses.backtrack import Backtrack
from distill.stages.nodes import read_nodes

# Nodes are stored after steps 2, 4, 6 and 8, and targets change after 2, 4 and 6; checkpoints come after 3 and 6.
SMOKE = (
    "profile=smoke",
    "profile.steps=8",
    "name=run",
    "trainer.checkpoint_every=3",
    "~stages.evaluate",
    "~stages.export",
    "stages.distill.monitor=null",
    *SMALL,
)
RECIPES = {
    "sid": ("recipe=sid", *SMOKE),
    "dmd": ("recipe=dmd", *SMOKE, "stages.distill.method.gan={}"),
    "disback": (
        "recipe=disback",
        *SMOKE,
        "stages.record.method.node_every=2",
        "stages.distill.method.backtrack.steps_per_node=2",
    ),
}

# What a fork runs before the verb: it dies by its own hand at a chosen moment.
DYING = """
import os, signal
import safetensors.torch as files
from distill.engine.callbacks import CheckpointCallback
from distill.stages import train as stages

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def at_step(stage, step):
    after = CheckpointCallback.on_train_batch_end
    def dying(self, trainer, module, *rest):
        after(self, trainer, module, *rest)
        if self.folder.parts[-2] == stage and module.progress.step == step:
            die()
    CheckpointCallback.on_train_batch_end = dying

def in_node(number):
    whole = files.save_file
    def half(tensors, path):
        whole(tensors, path)
        if path.parent.name == f"{number:03d}":
            os.truncate(path, path.stat().st_size // 2)
            die()
    files.save_file = half

def before_manifest():
    stages.write_manifest = die

"""
DEATHS: dict[str, list[tuple[Any, ...]]] = {
    "sid": [("at_step", "distill", 5)],
    "dmd": [("at_step", "distill", 1), ("at_step", "distill", 5)],  # before there is a checkpoint; after one
    "disback": [
        ("at_step", "record", 4),  # the second node is stored, the checkpoint is of the step before
        ("in_node", 4),
        ("before_manifest",),
        ("at_step", "distill", 5),
    ],
}


# Methods that train adapters or a sampler, from pairs, guided trajectories and a bank of features.
FURTHER = {"hipa": (), "agd": (), "mmd": ("~stages.second",)}


# The last has all that the others have: kills before and after a checkpoint, a fake score, an average.
every_recipe = pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("sid", "dmd")), "disback"]
)


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Callable[[str], tuple[Path, dict[str, list[Any]]]]:
    """By recipe: a folder with RECIPE-whole and RECIPE-parts, and how the starts ended: [(files of the nodes, steps that were
    saved)]."""
    folder = tmp_path_factory.mktemp("score")
    return cache(lambda name: (folder, killed(folder, name, RECIPES[name], DEATHS[name])))


def killed(
    folder: Path, name: str, options: tuple[str, ...], deaths: list[tuple[Any, ...]]
) -> dict[str, list[Any]]:
    """Run NAME-whole and, through its deaths, NAME-parts in the folder; how the starts of both ended."""
    ends: dict[str, list[Any]] = {}
    for place, death in [("whole", None), *(("parts", death) for death in deaths), ("parts", None)]:
        run = folder / f"{name}-{place}"
        run.mkdir(exist_ok=True)
        before = "" if death is None else f"{DYING}\n{death[0]}(*{death[1:]!r})"
        ended = run_verb(run, "train", *options, check=False, before=before)
        assert ended.returncode == (-signal.SIGKILL if death else 0), (
            f"{run}, {death}: {ended.stderr[-2000:]}"
        )
        ends.setdefault(run.name, []).append(left_in(run / "runs/run"))
    return ends


def left_in(run: Path) -> tuple[list[str], int]:
    """(files of the nodes, steps of the last stage's checkpoint)."""
    record, last = run / "record", run / "distill/checkpoints"
    found = [*record.glob("nodes/**/*"), *record.glob("nodes.json")]
    kept = sorted(str(path.relative_to(record)) for path in found if path.is_file())
    return kept, checkpoint_of(last)["progress"]["step"] if has_checkpoint(last)() else 0


def same_files(folder: Path, name: str, *patterns: str) -> list[str]:
    """Files of both runs, which are byte for byte the same."""
    whole, parts = (folder / f"{name}-{kind}/runs/run" for kind in ("whole", "parts"))
    found = [
        sorted(p.relative_to(run) for pattern in patterns for p in run.glob(pattern) if p.is_file())
        for run in (whole, parts)
    ]
    assert found[0] == found[1]
    for path in found[0]:
        assert sha256_file(whole / path) == sha256_file(parts / path), path
    return [str(path) for path in found[0]]


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of nested dicts by its path."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from tensors(part, f"{name}/{key}")
    elif isinstance(value, torch.Tensor):
        yield name, value


@every_recipe
def test_models_are_bit_equal(ended, name):
    stages = ["distill", "record", "teacher"] if name == "disback" else ["distill", "teacher"]
    assert same_files(ended(name)[0], name, "*/model.safetensors") == [
        f"{s}/model.safetensors" for s in stages
    ]


@every_recipe
def test_so_are_fake_score_head_average_and_optimizers(ended, name):
    networks = same_checkpoints(ended(name)[0], name)
    assert set(networks) == {"student", "fake"} | ({"head"} if name == "dmd" else set())


def same_checkpoints(folder: Path, name: str) -> dict[str, Any]:
    """The networks of the last checkpoints of both runs, whose tensors are the same bit for bit."""
    whole, parts = (
        checkpoint_of(folder / f"{name}-{kind}/runs/run/distill/checkpoints") for kind in ("whole", "parts")
    )
    one, other = (dict(tensors({k: s[k] for k in ("networks", "ema", "optimizers")})) for s in (whole, parts))
    assert len(one) >= 4 * len(whole["networks"]["student"])
    assert set(one) == set(other)
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
    return whole["networks"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FURTHER))
def test_so_are_adapters_and_trained_samplers(name, tmp_path):
    ends = killed(tmp_path, name, (f"recipe={name}", *SMOKE, *FURTHER[name]), [("at_step", "distill", 5)])
    assert [steps for _, steps in ends[f"{name}-parts"]] == [3, 8]
    assert same_files(tmp_path, name, "*/model.safetensors") == [
        f"{stage}/model.safetensors" for stage in ("distill", "teacher")
    ]
    (student,) = same_checkpoints(tmp_path, name).values()
    assert all(".lora_" in key or "terms." in key for key in student) == (name != "mmd")


@every_recipe
def test_the_kill_fell_between_a_checkpoint_and_the_end_inside_the_path(ended, name):
    saved = [steps for _, steps in ended(name)[1][f"{name}-parts"]]
    assert saved == {"sid": [3, 8], "dmd": [0, 3, 8], "disback": [0, 0, 0, 3, 8]}[name]
    assert Backtrack(4, 2).switches() == [(0, 3), (2, 2), (4, 1), (6, 0)]


def test_nodes_of_a_killed_recording_are_neither_lost_nor_doubled_nor_half_written(ended):
    folder, ends = ended("disback")
    files = [f"nodes/{n:03d}/{name}" for n in (1, 2, 3, 4) for name in ("model.json", "model.safetensors")]
    half = "nodes/004/.model.safetensors.part"
    after_second, in_fourth, before_manifest, later, _ = (kept for kept, _ in ends["disback-parts"])
    assert after_second == files[:4]
    assert in_fourth == sorted([*files[:6], half]), "half a file does not have the name of a whole one"
    assert before_manifest == files, "a recording without manifest is unfinished"
    assert later == ["nodes.json", *files]
    same = same_files(folder, "disback", "record/nodes/**/*", "record/nodes.json")
    assert same == [*(f"record/{path}" for path in files), "record/nodes.json"]
    run = folder / "disback-parts/runs/run"
    assert len(read_nodes(run / "record", run / "teacher")) == 5


@pytest.mark.slow
def test_disback_on_two_processes_killed_while_recording_and_on_the_way_back(tmp_path):
    options = [
        *(
            o
            for o in RECIPES["disback"]
            if o.split("=")[0] not in ("profile.steps", "trainer.checkpoint_every")
        ),
        *("profile.steps=30", "trainer.checkpoint_every=8", "trainer.devices=2", "trainer.shard=world"),
        *("stages.record.method.node_every=8", "stages.distill.method.backtrack.steps_per_node=9"),
    ]
    for kind in ("whole", "parts"):
        (tmp_path / f"disback-{kind}").mkdir()
    run_verb(tmp_path / "disback-whole", "train", *options)
    parts = tmp_path / "disback-parts"
    run = parts / "runs/run"
    kill_when(parts, options, (run / "record/nodes/002/model.json").is_file)
    assert not (run / "record/nodes.json").exists()
    last = run / "distill/checkpoints"
    kill_when(parts, options, has_checkpoint(last))
    assert Backtrack(4, 9).target(checkpoint_of(last)["progress"]["step"])[0] > 0
    run_verb(parts, "train", *options)
    assert (
        len(same_files(tmp_path, "disback", "*/model.safetensors", "record/nodes/**/*", "record/nodes.json"))
        == 12
    )
