"""The toy: an exact teacher as a stage, evaluation of points, and the recipe that is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from tests_support import run_verb

import distill
from distill.data.cond import Cond
from distill.data.points import Points
from distill.data.rng import sample_noise
from distill.evaluation.metrics.energy import energy_distance
from distill.evaluation.metrics.sliced import sliced_wasserstein
from distill.models.analytic import exact_denoiser, ring_means
from distill.models.description import Description
from distill.models.native import load_model
from distill.process.flow import Flow
from distill.process.times import uniform_grid
from distill.process.vp import VPCosine
from distill.recipe.expand import expand
from distill.recipe.plan import build_stages
from distill.samplers.ode import rollout
from distill.samplers.straightness import straightness
from distill.stages.base import Settings, Stage, StageContext
from distill.stages.display import Display
from distill.stages.evaluate import Evaluate
from distill.stages.exact import Exact
from distill.stages.generate import Generate

FLOW, RING = {"_target_": "distill.process.flow.Flow"}, {"count": 8, "radius": 1.5}
MODELS = {"teacher": {"stage": "teacher", "steps": [30, 1], "follows_teacher": True}}
DATA = {"_target_": "distill.data.points.Points", "ring": RING, "count": 700}
METER = {"_target_": "distill.evaluation.meters.points.PointMeter", "data": DATA}


def room(folder: Path, seed: int = 0, **inputs: Path) -> StageContext:
    return StageContext(
        name=folder.name,
        folder=folder,
        inputs=inputs,
        seed=seed,
        settings=Settings(accelerator="cpu"),
        loggers=(),
        display=Display(silent=True),
        run_folder=folder.parent,
        recipe="toy",
        digest="0",
    )


def made(stage: Stage, folder: Path, **inputs: Path) -> Path:
    folder.mkdir(parents=True)
    stage.run(room(folder, **inputs))
    return folder


class TestExact:
    def test_leaves_a_model_that_is_the_exact_teacher(self, tmp_path):
        folder = made(Exact(process=FLOW, ring=RING, std=0.2), tmp_path / "teacher")
        generator, exact = load_model(folder), exact_denoiser(Flow(), std=0.2)
        assert list(generator.denoiser.parameters()) == []
        assert generator.denoiser.net.means.dtype == torch.float64
        z, t = sample_noise(0, "s", torch.arange(50), (2,)).double(), torch.linspace(0.01, 1, 50).double()
        cond = Cond.nothing(50)
        assert torch.equal(generator.denoiser.velocity(z, t, cond), exact.velocity(z, t, cond))
        assert (generator.spec.any_steps, generator.spec.solver, generator.denoiser.kind) == (
            True,
            "euler",
            "x0",
        )
        assert Description.read(folder).model["decoder"] == {"_target_": "distill.models.decoder.Points"}
        same = made(Exact(process=FLOW, means=ring_means(), std=0.2), tmp_path / "same")
        for name in ("model.json", "model.safetensors"):
            assert (folder / name).read_bytes() == (same / name).read_bytes()

    def test_points_are_not_clamped(self, tmp_path):
        folder = made(Exact(process=FLOW, means=[[7.0, -7.0]], std=0.1), tmp_path / "teacher")
        found = distill.load(folder).sample(40, steps=50)
        assert found.mean(0).tolist() == pytest.approx([7, -7], abs=0.1)

    def test_under_another_process_and_with_labels(self, tmp_path):
        process = {"_target_": "distill.process.vp.VPCosine"}
        folder = made(Exact(process=process, ring=RING, labelled=True), tmp_path / "teacher")
        generator = load_model(folder)
        assert isinstance(generator.denoiser.process, VPCosine)
        assert (generator.conditions.num_classes, generator.denoiser.guidable) == (8, True)
        found = generator.sample(200, label=2, steps=200)
        assert found.mean(0).tolist() == pytest.approx([0, 1.5], abs=0.05)
        guided = generator.sample(200, label=2, steps=200, guidance_scale=2.0)
        assert not torch.allclose(found, guided)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"process": FLOW}, "teacher.ring, means: found neither"),
            ({"process": FLOW, "ring": RING, "means": [[0.0]]}, "teacher.ring, means: found both"),
            ({"process": FLOW, "ring": RING, "std": -1.0}, "teacher.std: expected at least 0, found -1"),
            ({"process": FLOW, "ring": RING, "std": "a"}, "teacher.std: found 'a', expected float"),
            (
                {"process": {"_target_": "os.system"}, "ring": RING},
                "teacher.process._target_: found 'os.system'",
            ),
            ({"process": {"_target_": "distill.process.flow.Glow"}, "ring": RING}, "teacher.process.*Glow"),
            (
                {"process": FLOW | {"rate": 1}, "ring": RING},
                "teacher.process.rate: no such key; expected none",
            ),
        ],
    )
    def test_wrong_options_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            build_stages({"teacher": {"_target_": "distill.stages.exact.Exact"} | options})


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """The stage folder of an evaluation of the exact teacher in 30 steps and in 1."""
    folder = tmp_path_factory.mktemp("run")
    teacher = made(Exact(process=FLOW, ring=RING), folder / "teacher")
    stage = Evaluate(
        models=MODELS,
        meter=METER,
        count=500,
        batch_size=130,
        follows=("teacher", 30),
        straightness={"steps": 20, "count": 400},
        gates=[
            {"name": "near", "row": ["teacher", 30], "metric": "energy", "at_most": 0.05},
            {"name": "near in one", "row": ["teacher", 1], "metric": "energy", "at_most": 0.05},
        ],
    )
    facts = stage.run(room(made_folder(folder / "evaluate"), teacher=teacher))
    assert (facts["gates"], facts["gates_passed"]) == (2, 1)
    return folder / "evaluate"


class TestEvaluatePoints:
    def test_rows_hold_what_they_say(self, evaluated):
        metrics = json.loads((evaluated / "metrics.json").read_text())
        model, nothing = exact_denoiser(Flow()), Cond.nothing(500)
        z = sample_noise(0, "evaluate", torch.arange(500), (2,))
        real = Points(ring=RING, count=700, seed=0, stream="evaluate/data").images
        ends = {n: model.transport(z, nothing, steps=n)[0] for n in (30, 20, 1)}
        path, velocities = rollout(
            lambda x, t: model.velocity(x, t, Cond.nothing(400)), z[:400], uniform_grid(Flow(), 20)
        )
        straight, norm = (float(value) for value in straightness(path, velocities))
        gap = float((ends[1] - ends[20])[:400].square().sum(1).mean())
        assert [row["steps"] for row in metrics["rows"]] == [30, 1]
        for row in metrics["rows"]:
            x = ends[row["steps"]]
            expected = {
                "energy": energy_distance(x, real),
                "sliced_wasserstein": sliced_wasserstein(x, real),
                "transport_cost": float((x - z).square().sum(1).mean()),
                "teacher_mse": float((x - ends[30]).square().mean()),
                "straightness": straight,
                "straightness_norm": norm,
                "one_step_gap": gap,
                "nfe": row["steps"],
            }
            assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-7)
            assert row["fd"] is None
            assert row["class_std"] is None
        assert metrics["protocol"]["reference_count"] == 700
        assert abs(metrics["real"]["floor_energy"]) < 0.02

    def test_the_report_is_of_points(self, evaluated):
        page = (evaluated / "report.md").read_text()
        for part in ("700 real points of 2 coordinates", "| energy ↓ |", "| transport |", "**missed**"):
            assert part in page, part
        for part in ("images of", "k=", "| fd"):
            assert part not in page, part
        assert (evaluated / "grid.png").read_bytes()[:4] == b"\x89PNG"

    def test_a_model_without_an_ode_has_no_flow(self, tmp_path):
        """A one-step student knows t = 1 alone; under another process straightness is not defined."""
        teacher = made(Exact(process={"_target_": "distill.process.vp.VPCosine"}, ring=RING), tmp_path / "vp")
        one_step = made(Exact(process=FLOW, ring=RING), tmp_path / "student")
        path = one_step / "model.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"coupling": "endpoint"}))
        models = {name: {"stage": name, "steps": [8]} for name in ("vp", "student")}
        stage = Evaluate(models=models, meter=METER, count=20, straightness={"steps": 10, "count": 20})
        stage.run(room(made_folder(tmp_path / "evaluate"), vp=teacher, student=one_step))
        rows = json.loads((tmp_path / "evaluate" / "metrics.json").read_text())["rows"]
        for row in rows:
            assert [row[name] for name in ("straightness", "straightness_norm", "one_step_gap")] == [None] * 3
            assert row["energy"] is not None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"meter": METER | {"pahts": 3}},
                "stages.evaluate.meter.pahts: no such key, did you mean .*paths",
            ),
            ({"meter": METER | {"features": {}}}, "stages.evaluate.meter.features: no such key"),
            ({"paths": 3}, "stages.evaluate.paths: is now stages.evaluate.meter.paths"),
            ({"meter": DATA}, "stages.evaluate.meter._target_: found .* expected a meter"),
            (
                {"_target_": "distill.stages.points.EvaluatePoints"},
                "which was replaced; .*with meter: {_target_: .*PointMeter",
            ),
            ({"grid": [["reflow", 1]]}, r"stages.evaluate.grid\[0\]: names the row"),
            (
                {"gates": [{"name": "g", "row": ["teacher", 1], "metric": "entropy", "at_most": 1}]},
                "'entropy'",
            ),
        ],
    )
    def test_wrong_options_are_named(self, options, message):
        config = {"_target_": "distill.stages.evaluate.Evaluate", "models": MODELS, "meter": METER}
        stages = {"teacher": {"_target_": "distill.stages.exact.Exact", "process": FLOW, "ring": RING}}
        with pytest.raises((ValueError, InstantiationException), match=message):
            build_stages(stages | {"evaluate": config | options})


def made_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_pairs_come_from_models_alone():
    stages = {"teacher": {"_target_": "distill.stages.exact.Exact", "process": FLOW, "ring": RING}}
    generate = {"_target_": "distill.stages.generate.Generate", "teacher": "teacher", "count": 4}
    assert isinstance(build_stages(stages | {"pairs": generate})["pairs"], Generate)
    with pytest.raises(ValueError, match=r"stages.more.teacher: 'pairs' makes no model"):
        build_stages(stages | {"pairs": generate, "more": generate | {"teacher": "pairs"}})


def test_later_rounds_may_differ_from_the_first():
    stages = {
        "teacher": {"_target_": "distill.stages.exact.Exact"},
        "pairs": {"_target_": "distill.stages.generate.Generate", "teacher": "teacher", "stream": "p"},
        "reflow": {
            "_target_": "distill.stages.train.Train",
            "data": "pairs",
            "net": {"width": 1},
            "init": None,
        },
    }
    block = {"stages": ["pairs", "reflow"], "times": 3, "carry": {"teacher": "reflow"}}
    then = {"reflow": {"init": "reflow", "net": None}}
    rounds = expand({"stages": stages, "repeat": block | {"then": then}})
    assert [rounds[n]["init"] for n in ("reflow", "reflow_round2", "reflow_round3")] == [
        None,
        "reflow",
        "reflow_round2",
    ]
    assert [rounds[n]["data"] for n in ("reflow", "reflow_round2")] == ["pairs", "pairs_round2"]
    assert [rounds[n]["net"] for n in ("reflow", "reflow_round2")] == [{"width": 1}, None]
    assert rounds["pairs_round3"]["teacher"] == "reflow_round2"
    assert expand({"stages": stages, "repeat": block})["reflow_round2"]["init"] is None
    with pytest.raises(ValueError, match=r"repeat: found the stages \['reflwo'\]"):
        expand({"stages": stages, "repeat": block | {"then": {"reflwo": {}}}})


@pytest.mark.slow
def test_one_mixture_is_the_data_and_the_teacher(tmp_path):
    options = ("profile=smoke", "rounds=2", "data.ring.count=3", "data.std=0.01")
    run_verb(tmp_path, "train", "recipe=toy_instaflow", *options)
    run = tmp_path / "runs" / "toy_instaflow-smoke"
    stages = json.loads((run / "plan.json").read_text())["stages"]
    assert (stages["reflow"]["init"], stages["reflow_round2"]["init"]) == (None, "reflow")
    assert stages["distill"]["init"] == "reflow_round2"
    teacher = json.loads((run / "teacher" / "model.json").read_text())["net"]
    assert (len(teacher["means"]), teacher["std"]) == (3, 0.01)
    assert "3 Gaussians of standard deviation 0.01" in (run / "report.md").read_text()
    run_verb(tmp_path, "sample", f"model={run / 'teacher'}", "count=30", "steps=20", "out=points.png")
    assert (tmp_path / "points.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 2])
def test_the_whole_recipe_passes_its_gates(rounds, tmp_path):
    ended = run_verb(tmp_path, "train", "recipe=toy_instaflow", f"rounds={rounds}")
    assert "7 of 7 quality gates passed" in ended.stdout
    rows = json.loads((tmp_path / "runs" / "toy_instaflow" / "metrics.json").read_text())["rows"]
    straight = {row["model"]: row["straightness_norm"] for row in rows}
    assert straight["teacher"] > 2
    if rounds == 2:  # 3-rectified flow: half as curved again, at least
        assert straight["reflow2"] < 0.5 * straight["reflow"]
