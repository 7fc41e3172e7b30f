"""What an evaluation, a monitor or a method's constructor needs is tried before the first stage trains; guidance of rows."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from tests_support import SMALL

from distill.data.cond import Cond
from distill.models.native import load_model
from distill.recipe import compose as recipe_configs
from distill.recipe.expand import expand
from distill.recipe.plan import Planned, build_stages, dry_run, plan
from distill.recipe.run import run
from distill.stages.attached import check_attached
from distill.stages.made import LARGE_PARAMETERS, device_of


def composed(*overrides: str) -> dict[str, Any]:
    """The resolved recipe of a command line."""
    recipe_configs.register_recipes()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(recipe_configs.CONFIGS), version_base="1.3"):
        plain = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    assert isinstance(plain, dict)
    return plain


def planned(folder: Path, *overrides: str) -> list[Planned]:
    """The plan of a command line."""
    profile = () if any(o.startswith("profile=") for o in overrides) else ("profile=smoke",)
    return plan(composed(*profile, *overrides), folder / "run", 0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """40 colour pictures without classes."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(40):
        pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


COLOUR = ("recipe=instaflow", "data=folder", "teacher.net.channels=3", "teacher.net.num_classes=0")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # what the monitor, then the evaluation measures with does not read these images
        ((), r"stages.distill: monitor.features: digits64 reads images \[B, 1, 8, 8\]"),
        (
            ("stages.distill.monitor=null",),
            r"stages.evaluate: meter.features: digits64 reads images \[B, 1, 8, 8\]",
        ),
        # gates on numbers by class, where nothing has a class
        (
            ("features=efficientnet_lite0", "profile=full"),
            r"gates: gate 'student within-class spread': metric 'class_std' .* eval.gates=",
        ),
    ],
)
def test_pictures_that_nothing_here_measures(pictures, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        planned(tmp_path, *COLOUR, f"data.path={pictures}", *overrides)
    assert not list(tmp_path.iterdir())


def test_pictures_that_are_measured_are_planned(pictures, tmp_path):
    entries = planned(
        tmp_path, *COLOUR, f"data.path={pictures}", "features=efficientnet_lite0", "eval.gates=[]"
    )
    assert [entry.state for entry in entries] == ["new"] * 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # values that only the method's constructor knows to be wrong
        (("recipe=sid", "stages.distill.method.sampling.levels=[-1]"), r"stages.distill: .*levels"),
        (("recipe=lcm", "teacher=flow_unet"), "stages.distill: student: found Flow"),
        (
            ("recipe=disback", "stages.distill.method.backtrack.criterion=never"),
            "stages.distill: .*criterion",
        ),
        # a teacher that takes no guidance; pairs of a student that is no ODE
        (
            ("recipe=instaflow", "stages.pairs.guidance_scale=2", "teacher.method.null_prob=0"),
            "stages.pairs: teacher: 'teacher': guidance_scale: found 2.0, but the teacher was trained without a null",
        ),
        # nodes of another student
        (
            ("recipe=disback", "stages.record.method.sampling.levels=[0.5]"),
            "stages.distill.method.sampling.levels: found .*recorded with",
        ),
        # rows that the model is not valid for
        (
            ("recipe=instaflow", "eval.models.student.steps=[1,2]"),
            "stages.evaluate: models.student.steps: this model was distilled for",
        ),
        (
            ("recipe=instaflow", "+eval.models.student.guidance_scale=2"),
            "stages.evaluate: models.student.guidance_scale: found 2, but this model was not trained with a null",
        ),
        (
            ("recipe=lcm", "+eval.models.student.guidance_w=99"),
            "stages.evaluate: models.student.guidance_w: found 99",
        ),
        # trajectories of another guidance
        (
            ("recipe=instaflow", "stages.pairs.guidance_scale=2"),
            "stages.evaluate: models.reflow.follows_teacher: reflow samples with guidance 2",
        ),
        # an evaluation of images for points, and the reverse
        (("recipe=toy_instaflow", "eval=digits64"), "stages.evaluate"),
    ],
)
def test_found_out_before_anything_is_trained(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        planned(tmp_path, *overrides)


def test_misspelt_blocks_of_an_evaluation(tmp_path):
    for override, message in (
        ("+eval.models.student.follow_teacher=true", "did you mean .*models.student.follows_teacher"),
        ("+eval.gates.0.at_mots=1", "at_mots"),
        (
            "+eval.straightness.cuont=3",
            "straightness.cuont: no such key, did you mean .*straightness.count",
        ),
        (
            "eval.gates=[{name: g, row: [student, 1], metric: fd, at_mots: 1}]",
            "at_mots: no such key, did you mean .*at_most",
        ),
        (
            "eval.gates=[{name: g, row: [student, 1], metric: df, at_most: 1}]",
            "gates.0..metric: no such metric as 'df'",
        ),
        ("eval.grid=[[student, one]]", r"grid\[0\]\[1\]: found 'one', expected int"),
    ):
        with pytest.raises(ValueError, match=message):
            planned(tmp_path, "recipe=instaflow", override)


def test_large_networks_are_tried_without_memory():
    """A student, its fake score and a discriminator on its features, of a net that would take 10 GB."""
    plain = composed("recipe=dmd2", "teacher.net.width=1600", "stages.warm.steps=3")
    stages = build_stages(expand(plain))
    made: dict[str, Any] = {}
    for name, stage in stages.items():
        if name == "evaluate":
            break
        made[name] = stage.dry_run(made)
    model = made["teacher"].model
    assert sum(p.numel() for p in model.denoiser.parameters()) > 20 * LARGE_PARAMETERS
    assert {device_of(entry.model.denoiser.net).type for entry in made.values() if entry.model} == {"meta"}


def test_a_trial_changes_neither_the_stages_nor_the_random_state():
    stages = build_stages(expand(composed("recipe=sid", "profile=smoke")))
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    dry_run(stages)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.slow
def test_guided_students_are_compared_with_the_guided_teacher(tmp_path):
    """`teacher_mse` and the teacher's row, computed again from the models that the run left."""
    overrides = (
        "recipe=instaflow",
        "profile=smoke",
        "stages.pairs.guidance_scale=2",
        "+eval.models.teacher.guidance_scale=2",
        *SMALL,
    )
    plain = composed(
        *overrides, f"runs_dir={tmp_path}", "eval.seed=5", "eval.models.teacher.steps=[50,2]", "eval.gates=[]"
    )
    plain["stages"]["evaluate"]["grid"] = []
    folder = run(plain, name="run", recipe_name="instaflow")
    metrics = json.loads((folder / "metrics.json").read_text())
    rows = {(row["model"], row["steps"]): row for row in metrics["rows"]}
    teacher, student = load_model(folder / "teacher"), load_model(folder / "distill")
    assert student.spec.guidance_baked == 2
    assert load_model(folder / "reflow").spec.guidance_baked == 2
    ids, labels = torch.arange(20), torch.arange(20) % 10
    z, _ = teacher.noises(5, "evaluate", ids)
    # Euler over 50 steps by hand, each with two calls of the network.
    x = z.clone()
    cond, null = Cond.of_labels(labels), Cond.of_labels(torch.full_like(labels, -1))
    grid = torch.linspace(1, 0, 51, dtype=torch.float64)
    with torch.no_grad():
        for a, b in pairwise(grid):
            t = a.float().expand(20)
            c, u = teacher.denoiser.net(x, t, cond), teacher.denoiser.net(x, t, null)
            x = x + (b - a).float() * (u + 2 * (c - u))
        made = z - student.denoiser.net(z, torch.ones(20), cond)
    expected = (x.clamp(-1, 1) - made.clamp(-1, 1)).double().square().mean()
    assert rows["student", 1]["teacher_mse"] == pytest.approx(float(expected), rel=1e-3)
    assert rows["teacher", 50]["guidance_scale"] == 2
    assert rows["teacher", 50]["nfe"] == 100
    assert rows["teacher", 50]["teacher_mse"] == 0
    assert rows["student", 1]["guidance_scale"] == 1
    assert rows["student", 1]["nfe"] == 1


def test_a_logger_without_its_package_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ImportError, match=r"loggers=wandb needs the extra: pip install 'distill\[wandb\]'"):
        check_attached([{"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "mine"}], [], None)


def test_an_option_that_the_config_leaves_out_is_named_with_its_plus(refuse):
    message = refuse("recipe=instaflow", "eval.models.teacher.guidance_scale=2")
    assert "to add an option that the config omits, type +eval.models.teacher.guidance_scale=..." in message
