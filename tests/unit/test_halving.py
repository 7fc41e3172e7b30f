"""Progressive halving: from one template to a chain of training stages, and what a run of such a chain does."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import checkpoint_of
from hydra.utils import get_class

from distill.files import read_json
from distill.methods.progressive import Progressive
from distill.models.native import load_model
from distill.process.times import uniform_grid
from distill.process.vp import VPCosine
from distill.recipe.expand import expand
from distill.recipe.halving import halve, merged, step_counts
from distill.recipe.plan import build_stages, plan, redo
from distill.recipe.references import redirect, reference_keys, references
from distill.recipe.run import run
from distill.stages import train as training_stage

TRAIN, LOAD = "distill.stages.train.Train", "distill.stages.load.Load"
DATA = {"_target_": "distill.data.points.Points", "ring": {"count": 8, "radius": 1.5}, "count": 64}
OPTIM = {
    "student": {
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.003},
        "schedule": {"_target_": "distill.engine.schedule.Linear", "total": None},
        "ema": 0.5,
    }
}


def training(method: str, **fields: Any) -> dict[str, Any]:
    """A training stage; the method is named as module.Class, with its options."""
    told = fields.pop("options", {})
    base = {"_target_": TRAIN, "data": DATA, "steps": 4, "batch_size": 8, "optim": OPTIM, "stream": "distill"}
    return base | {"method": {"_target_": f"distill.methods.{method}"} | told} | fields


TEACHER = training(
    "denoising.Denoising",
    net={"_target_": "distill.nets.mlp.MLP", "width": 16, "depth": 2, "features": 8, "zero_out": False},
    process={"_target_": "distill.process.vp.VPCosine"},
    kind="v",
    stream="teacher",
)
DISTILL = training("progressive.Progressive", init="teacher", teacher="teacher")
EVALUATE = {
    "_target_": "distill.stages.evaluate.Evaluate",
    "meter": {"_target_": "distill.evaluation.meters.points.PointMeter", "data": DATA},
    "count": 32,
    "models": {
        "teacher": {"stage": "teacher", "steps": [8, 1]},
        "student": {"stage": "distill", "steps": [1], "follows_teacher": True},
    },
    "follows": ["teacher", 8],
}
EXPORT = {"_target_": "distill.stages.export.Export", "student": "distill", "evaluate": "evaluate"}


def recipe(folder: Path | None = None, **changes: Any) -> dict[str, Any]:
    """8 -> 4 -> 2 -> 1."""
    stages = {"teacher": TEACHER, "distill": DISTILL, "evaluate": EVALUATE, "export": EXPORT}
    base = {
        "stages": stages,
        "halve": {"stage": "distill", "start": 8, "end": 1},
        "seed": 0,
        "runs_dir": str(folder),
        "trainer": {"accelerator": "cpu", "checkpoint_every": 2, "threads": 1},
        "loggers": (),
        "plan": False,
        "redo": None,
    }
    return copy.deepcopy(base | changes)


def chain(**changes: Any) -> dict[str, dict[str, Any]]:
    return expand(recipe(**changes))


# ---- step counts ----


def test_step_counts() -> None:
    assert step_counts(32, 1) == [16, 8, 4, 2, 1]
    assert step_counts(2, 1) == [1]
    assert step_counts(1024, 256) == [512, 256]
    assert step_counts(12, 3) == [6, 3]


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (
            12,
            4,
            r"halve: found start 12 and end 4; halving gives \[12, 6, 3\], expected start = end \* 2\^k",
        ),
        (48, 5, r"halving gives \[48, 24, 12, 6, 3\]"),
        (7, 1, r"halving gives \[7\], expected start = end"),
        (
            4,
            4,
            r"halve: found start 4 and end 4; halving gives \[4\], expected start = end \* 2\^k with k >= 1",
        ),
        (4, 8, r"halving gives \[4\]"),
        (8, 0, "halve.end: expected an integer of at least 1, found 0"),
        (0, 1, "halve.start: expected an integer of at least 1, found 0"),
        (8.0, 1, "halve.start: expected an integer of at least 1, found 8.0"),
        (8, "1", "halve.end: expected an integer of at least 1, found '1'"),
        (True, 1, "halve.start: expected an integer of at least 1, found True"),
    ],
)
def test_a_chain_that_does_not_halve_says_which_steps_it_would_visit(
    start: Any, end: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        step_counts(start, end)
    with pytest.raises(ValueError, match=message):
        chain(halve={"stage": "distill", "start": start, "end": end})


# ---- expansion ----


def test_a_template_becomes_a_stage_for_every_halving() -> None:
    found = chain()
    assert list(found) == ["teacher", "distill_4", "distill_2", "distill_1", "evaluate", "export"]
    before = "teacher"
    for steps in (4, 2, 1):
        stage = found[f"distill_{steps}"]
        assert stage == DISTILL | {
            "method": DISTILL["method"] | {"steps": steps},
            "init": before,
            "teacher": before,
            "stream": f"distill_{steps}",
        }
        before = f"distill_{steps}"
    assert found["teacher"] == TEACHER
    assert "steps" not in DISTILL["method"], "the template is left as it was"
    assert len({found[name]["stream"] for name in found if "stream" in found[name]}) == 4


def test_later_stages_mean_the_last_round_and_every_round_gets_a_row() -> None:
    found = chain()
    assert found["export"]["student"] == "distill_1"
    assert found["evaluate"]["models"] == {
        "teacher": {"stage": "teacher", "steps": [8, 1]},
        "student_4": {"stage": "distill_4", "steps": [4], "follows_teacher": True},
        "student_2": {"stage": "distill_2", "steps": [2], "follows_teacher": True},
        "student": {"stage": "distill_1", "steps": [1], "follows_teacher": True},
    }
    assert references(found["evaluate"]) == ["teacher", "distill_4", "distill_2", "distill_1"]
    after = chain(stages=recipe()["stages"] | {"more": training("denoising.Denoising", init="distill")})
    assert after["more"]["init"] == "distill_1"


def test_rounds_may_have_options_of_their_own() -> None:
    special = {4: {"steps": 9, "optim": {"student": {"ema": 0.9}}}, "1": {"method": {"weight": "snr"}}}
    found = chain(halve={"stage": "distill", "start": 8, "end": 1, "rounds": special})
    assert [found[f"distill_{n}"]["steps"] for n in (4, 2, 1)] == [9, 4, 4]
    assert [found[f"distill_{n}"]["optim"]["student"]["ema"] for n in (4, 2, 1)] == [0.9, 0.5, 0.5]
    assert found["distill_4"]["optim"]["student"]["optimizer"] == OPTIM["student"]["optimizer"]
    assert found["distill_1"]["method"] == DISTILL["method"] | {"steps": 1, "weight": "snr"}
    assert "weight" not in found["distill_2"]["method"]
    # 1 and "1" are one round.
    both = chain(halve=BLOCK | {"rounds": {1: {"steps": 7}, "1": {"batch_size": 2}}})["distill_1"]
    assert (both["steps"], both["batch_size"]) == (7, 2)
    # An override may even send a round back to the first teacher.
    again = chain(halve={"stage": "distill", "start": 8, "end": 1, "rounds": {2: {"init": "teacher"}}})
    assert (again["distill_2"]["init"], again["distill_2"]["teacher"]) == ("teacher", "distill_4")


def test_only_the_first_round_is_guided() -> None:
    """Its student is guided without the scale; a scale in later rounds would guide twice, or be refused."""
    guided = DISTILL | {"method": DISTILL["method"] | {"guidance_scale": 3.0}}
    found = chain(stages=recipe()["stages"] | {"distill": guided})
    assert [found[f"distill_{n}"]["method"]["guidance_scale"] for n in (4, 2, 1)] == [3.0, 1.0, 1.0]
    assert all("guidance_scale" not in chain()[f"distill_{n}"]["method"] for n in (4, 2, 1))


def test_a_profile_limits_every_round() -> None:
    found = chain(
        profile={"steps": 3, "count": 20},
        halve={"stage": "distill", "start": 8, "end": 1, "rounds": {1: {"steps": 50}}},
    )
    assert [found[name]["steps"] for name in ("teacher", "distill_4", "distill_2", "distill_1")] == [
        3,
        3,
        3,
        3,
    ]
    assert found["distill_1"]["method"]["steps"] == 1
    assert found["evaluate"]["count"] == 20


def test_references() -> None:
    assert reference_keys(DISTILL) == ("init", "teacher", "data", "nodes")
    assert references(DISTILL) == ["teacher", "teacher"]
    assert references(DISTILL | {"data": "pairs"}) == ["teacher", "teacher", "pairs"]
    assert references(EXPORT) == ["distill", "evaluate"]
    moved = redirect(DISTILL, {"teacher": "other"})
    assert (moved["init"], moved["teacher"], moved["data"]) == ("other", "other", DATA)
    assert DISTILL["init"] == "teacher"
    config = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert merged(copy.deepcopy(config), {"a": {"c": {"d": 4}}, "e": {"f": 5}}) == {
        "a": {"b": 1, "c": {"d": 4}},
        "e": {"f": 5},
    }


BLOCK = {"stage": "distill", "start": 8, "end": 1}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (["distill"], r"halve: found \['distill'\], expected"),
        (BLOCK | {"stage": "distil"}, r"halve.stage: found 'distil', expected one of \['teacher', 'distill'"),
        (
            BLOCK | {"stage": "evaluate"},
            "halve.stage: 'evaluate' is a Evaluate stage, expected one that trains",
        ),
        (BLOCK | {"step": 8}, "halve.step: no such key, did you mean halve.st"),
        ({"stage": "distill", "end": 1}, "halve.start: missing"),
        (
            {"stage": "distill", "start": 8, "end": None},
            "halve.end: expected an integer of at least 1, found None",
        ),
        (
            BLOCK | {"rounds": {8: {"steps": 5}}},
            r"halve.rounds: found \[8\], expected step counts among \[4, 2, 1\]",
        ),
        (BLOCK | {"rounds": {"last": {"steps": 5}}}, r"halve.rounds: found \[last\], expected step counts"),
        (BLOCK | {"rounds": {1: 500}}, r"halve.rounds: found \{1: 500\}, expected"),
        (BLOCK | {"rounds": [1]}, r"halve.rounds: found \[1\], expected"),
    ],
)
def test_wrong_blocks(block: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chain(halve=block)


def test_what_cannot_be_halved() -> None:
    there = recipe()["stages"]
    with pytest.raises(ValueError, match=r"halve.stage: 'distill' is a Load stage, expected one that trains"):
        chain(stages=there | {"distill": DISTILL | {"path": "somewhere"}})
    with pytest.raises(
        ValueError, match=r"halve.stage: the rounds of 'distill' need the names \['distill_2'\]"
    ):
        chain(stages=there | {"distill_2": DISTILL})
    bare = {key: value for key, value in DISTILL.items() if key != "stream"}
    assert halve({"teacher": TEACHER, "distill": bare}, BLOCK)["distill_4"]["stream"] == "train_4"


# ---- what is checked before anything runs ----


def refused(message: str, **stages: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        build_stages({"teacher": TEACHER} | stages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"wieght": "snr"},
            r"stages.distill.method.wieght: no such key, did you mean stages.distill.method.weight(ing)?\?; expected",
        ),
        ({"student": "teacher"}, "stages.distill.method.student: no such key"),
        ({"loss": "l2"}, r"stages.distill.method.loss: no such key.*; expected"),
    ],
)
def test_unknown_options_of_a_method_are_told_before_anything_runs(
    options: dict[str, Any], message: str
) -> None:
    refused(
        message,
        distill=training("progressive.Progressive", init="teacher", teacher="teacher", options=options),
    )


def test_a_round_s_own_options_are_checked_too() -> None:
    for rounds, message in (
        (
            {1: {"method": {"wieght": "snr"}}},
            "stages.distill_1.method.wieght: no such key, did you mean stages.distill_1.method.weight",
        ),
        ({2: {"stepz": 5}}, "stages.distill_2.*stepz"),
        ({2: {"steps": 0}}, "stages.distill_2.steps: expected at least 1, found 0"),
    ):
        found = chain(halve=BLOCK | {"rounds": rounds})
        with pytest.raises(ValueError, match=message):
            build_stages(found)


def test_a_method_gets_a_teacher_exactly_if_it_wants_one() -> None:
    refused(
        "teacher: found None, but the method .*Progressive needs a teacher",
        d=training("progressive.Progressive", init="teacher"),
    )
    for method in ("consistency.Consistency", "lcm.LCM", "guided.Guided"):
        refused(
            f"teacher: found None, but the method distill.methods.{method} needs",
            d=training(method, init="teacher"),
        )
    untaught = training("consistency_training.ConsistencyTraining", init="teacher", teacher="teacher")
    refused("teacher: found 'teacher', but the method .*ConsistencyTraining takes no teacher", d=untaught)


@pytest.mark.parametrize(
    ("adapt", "init", "message"),
    [
        ({"kind": "v"}, None, "adapt: found .* but no `init`; expected a model to change"),
        ({"nett": {}}, "teacher", "adapt.nett: no such key, did you mean stages.d.adapt.net\\?"),
        ({"kind": "noise"}, "teacher", "adapt.kind: found 'noise', expected one of"),
        ({"net": 64}, "teacher", "adapt.net: found 64, expected a mapping or null"),
    ],
)
def test_wrong_adaptations(adapt: dict[str, Any], init: str | None, message: str) -> None:
    refused(message, d=training("denoising.Denoising", init=init, adapt=adapt))


# ---- a run of a chain ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    return run(recipe(tmp_path_factory.mktemp("runs")), name="whole", recipe_name="toy")


def states(folder: Path, **changes: Any) -> dict[str, str]:
    config = recipe(folder.parent, **changes)
    planned = plan(config, folder, 0)
    redo(planned, config["redo"])
    return {entry.name: entry.state for entry in planned}


def test_every_round_starts_from_the_one_before_and_is_sampled_in_its_steps(finished: Path) -> None:
    for steps in (4, 2, 1):
        generator = load_model(finished / f"distill_{steps}")
        assert generator.denoiser.coupling == "few_step"
        assert (generator.spec.solver, list(generator.spec.times)) == ("ddim", [steps])
        assert generator.spec.times[steps] == pytest.approx(uniform_grid(VPCosine(), steps).tolist())
    metrics = read_json(finished / "metrics.json")
    assert [(row["model"], row["steps"]) for row in metrics["rows"]] == [
        ("teacher", 8), ("teacher", 1), ("student_4", 4), ("student_2", 2), ("student", 1),
    ]  # fmt: skip
    last = (finished / "distill_1" / "model.safetensors").read_bytes()
    assert (finished / "export" / "model.safetensors").read_bytes() == last


@pytest.mark.slow
def test_a_round_asks_the_round_before(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    original = Progressive.__init__

    @functools.wraps(original)
    def watched(self: Progressive, student: Any, teacher: Any, **options: Any) -> None:
        pairs = zip(student.parameters(), teacher.parameters(), strict=True)
        seen.append((all(torch.equal(a, b) for a, b in pairs), options["steps"]))
        assert teacher.sampler.valid(2 * options["steps"])
        original(self, student, teacher, **options)

    monkeypatch.setattr(Progressive, "__init__", watched)
    folder = run(recipe(tmp_path), name="again", recipe_name="toy")
    # Once when the chain is tried, once when it is trained.
    assert seen == 2 * [(True, 4), (True, 2), (True, 1)]
    for name in ("distill_4", "distill_1"):
        mine, other = ((f / name / "model.safetensors").read_bytes() for f in (folder, finished))
        assert mine == other


def test_plans_of_a_finished_chain(finished: Path) -> None:
    rounds = ["distill_4", "distill_2", "distill_1"]
    after = ["evaluate", "export"]
    assert set(states(finished).values()) == {"finished"}
    again = states(finished, redo="distill_2")
    assert [name for name, found in again.items() if found == "new"] == [*rounds[1:], *after]
    assert (again["teacher"], again["distill_4"]) == ("finished", "finished")
    # A round's own option concerns it and what follows.
    other = states(finished, halve=BLOCK | {"rounds": {2: {"method": {"weight": "snr"}}}})
    assert [name for name, found in other.items() if found == "changed"] == [*rounds[1:], *after]
    assert (other["teacher"], other["distill_4"]) == ("finished", "finished")
    # A longer round is an extension; its successors had another parent.
    longer = states(finished, halve=BLOCK | {"rounds": {2: {"steps": 6}}})
    assert (longer["distill_4"], longer["distill_2"]) == ("finished", "extend")
    assert [longer[name] for name in ("distill_1", *after)] == ["changed"] * 3
    # A shorter chain has fewer rounds; those that stay are the same.
    shorter = recipe(finished.parent, halve=BLOCK | {"end": 2})
    assert [entry.state for entry in plan(shorter, finished, 0)][:3] == ["finished"] * 3
    with pytest.raises(
        ValueError, match=r"redo: found \['distill'\], expected stages of this recipe: .*'distill_4'"
    ):
        states(finished, redo="distill")


def test_a_changed_parent_is_refused(finished: Path) -> None:
    changed = recipe(finished.parent, halve=BLOCK | {"rounds": {4: {"batch_size": 4}}})
    with pytest.raises(ValueError, match=r"stages.distill_4: .*\n.*  batch_size: 8 -> 4\n.*redo=distill_4"):
        run(changed, name="whole", recipe_name="toy")
    longer = recipe(finished.parent, halve=BLOCK | {"rounds": {2: {"steps": 6}}})
    with pytest.raises(
        ValueError,
        match=r"stages.distill_1: .*because distill_2 would be trained further(.|\n)*has changed since",
    ):
        run(longer, name="whole", recipe_name="toy")


class Killed(BaseException):
    """The end of a process."""


def test_killed_inside_a_round_and_continued_equals_not_stopping(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Progressive.loss

    def dies(self: Progressive, batch: Any, step: Any) -> Any:
        if self.grid.steps == 2 and step.iteration == 3:
            raise Killed
        return original(self, batch, step)

    config = recipe(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Progressive, "loss", dies)
        with pytest.raises(Killed):
            run(config, name="parts", recipe_name="toy")
    folder = tmp_path / "parts"
    left = checkpoint_of(folder / "distill_2" / "checkpoints")
    assert left["progress"]["step"] == 2
    assert [entry.state for entry in plan(config, folder, 0)][:4] == [
        "finished",
        "finished",
        "interrupted",
        "new",
    ]
    run(config, name="parts", recipe_name="toy")
    for name in ("distill_4", "distill_2", "distill_1", "export"):
        mine, other = ((f / name / "model.safetensors").read_bytes() for f in (folder, finished))
        assert mine == other, name


def test_a_chain_that_starts_elsewhere_than_its_teacher_is_refused(finished: Path) -> None:
    """A student of 4 steps is no teacher for one of 4 or of 1."""
    for start, message in (
        (8, r"made for \[4\] step\(s\); a student of 4 needs one of 8"),
        (2, "a student of 1 needs one of 2"),
    ):
        loaded = {"_target_": LOAD, "path": str(finished / "distill_4")}
        stages = {"teacher": loaded, "distill": DISTILL}
        config = recipe(finished.parent, stages=stages, halve=BLOCK | {"start": start, "end": start // 2})
        with pytest.raises(ValueError, match=rf"stages.distill_{start // 2}: .*teacher: .*{message}"):
            run(config, name=f"elsewhere{start}", recipe_name="toy")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("consistency.Consistency", {"scales": 1}, "scales: found 1, expected an integer of at least 2"),
        ("consistency.Consistency", {"sample_steps": []}, r"sample_steps: found \[\]"),
        ("consistency_training.ConsistencyTraining", {"q": 0.5}, "q, stages: found 0.5 and 8"),
        ("progressive.Progressive", {"steps": 0}, "steps: found 0"),
        (
            "guided.Guided",
            {"w_max": 2.0},
            "w_min, w_max: found 0.0 and 2.0, but the student's net does not take",
        ),
        ("lcm.LCM", {}, "student: found VPCosine.*expected a table of noise levels"),
    ],
)
def test_what_a_method_refuses_names_the_stage_and_the_option(
    method: str, options: dict[str, Any], message: str, finished: Path, tmp_path: Path
) -> None:
    loaded = {"_target_": LOAD, "path": str(finished / "teacher")}
    teacher = {} if "training" in method else {"teacher": "teacher"}
    stage = training(method, init="teacher", options=options, **teacher)
    config = recipe(tmp_path, stages={"teacher": loaded, "student": stage}, halve=None)
    with pytest.raises(ValueError, match=rf"stages.student: {message}"):
        run(config, name="refused", recipe_name="toy")


# ---- what the training stage gives the method ----


class Stop(Exception):
    """Nothing more is wanted."""


@pytest.mark.parametrize("given", [None, 40])
def test_the_stage_fills_in_the_length_of_a_curriculum(
    given: int | None, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def instead(method: Any, *_: Any, **__: Any) -> None:
        seen.append(method)
        raise Stop

    monkeypatch.setattr(training_stage, "train", instead)
    loaded = {"_target_": LOAD, "path": str(finished / "teacher")}
    for options in ({}, {"total_steps": None}) if given is None else ({"total_steps": given},):
        stage = training("consistency_training.ConsistencyTraining", init="teacher", steps=6, options=options)
        with pytest.raises(Stop):
            run(
                recipe(tmp_path, stages={"teacher": loaded, "distill": stage}, halve=None),
                name=f"n{len(seen)}",
                recipe_name="toy",
            )
        assert seen[-1].total == (given or 6)
    assert get_class(stage["method"]["_target_"]) is type(seen[-1])


def test_a_student_that_embeds_the_guidance_is_trained_by_the_stage(tmp_path: Path) -> None:
    """The embedding is added to the teacher's net, and both stages of guided distillation run."""
    labelled = DATA | {"labelled": True}
    net = TEACHER["net"] | {"num_classes": 8}
    stages = {
        "teacher": TEACHER | {"net": net, "data": labelled},
        "guided": training(
            "guided.Guided",
            init="teacher",
            teacher="teacher",
            data=labelled,
            adapt={"net": {"guidance_embedding": 8}},
            options={"w_max": 2.0},
        ),
        "distill": training(
            "progressive.Progressive",
            init="guided",
            teacher="guided",
            data=labelled,
            options={"w_min": 0.0, "w_max": 2.0},
        ),
    }
    folder = run(
        recipe(tmp_path, stages=stages, halve=BLOCK | {"start": 4, "end": 1}),
        name="guided",
        recipe_name="toy",
    )
    generator = load_model(folder / "distill_1")
    assert generator.denoiser.embeds_guidance
    assert (generator.spec.guidance_w, generator.spec.guidance_w_range) == (0.0, (0.0, 2.0))
    assert generator.sample(4, guidance_w=1.5).shape == (4, 2)
    assert load_model(folder / "guided").spec.any_steps
    weight = generator.denoiser.net.guidance.out.weight
    assert bool(weight.any())
    narrow = recipe(tmp_path, stages=stages, halve=BLOCK | {"start": 4, "end": 1})
    narrow["stages"]["distill"]["method"]["w_max"] = 3.0
    with pytest.raises(
        ValueError, match=r"w_min, w_max: found 0.0 and 3.0, but the teacher was trained for 0.0 .. 2.0"
    ):
        run(narrow | {"redo": "distill_2"}, name="guided", recipe_name="toy")
