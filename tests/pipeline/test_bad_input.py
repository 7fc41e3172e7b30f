"""Wrong input ends in one message: which file or field, what was found, what is expected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests_support import SMALL, call_verb, copied_run, refusal, run_verb

from distill.files import read_json, write_json

SMOKE = ("recipe=instaflow", "profile=smoke", "name=run", *SMALL)
SHORT = tuple(f"~stages.{name}" for name in ("pairs2", "distill", "evaluate", "export"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        # misspelt at any depth
        ("sed=1", "sed: no such key, did you mean seed?"),
        ("recpie=instaflow", "recpie: no such key, did you mean recipe?"),
        ("tranier.threads=3", "tranier: no such key, did you mean trainer?"),
        ("trainer.thread=3", "trainer.thread: no such key, did you mean trainer.threads?"),
        ("teacher.stepz=3", "teacher.stepz: no such key, did you mean teacher.steps?"),
        ("stages.reflow.stpes=3", "stages.reflow.stpes: no such key, did you mean stages.reflow.steps?"),
        ("stages.teachr.steps=3", "stages.teachr: no such key, did you mean stages.teacher?"),
        (
            "stages.reflow.optim.student.optimizer.lrr=1",
            "stages.reflow.optim.student.optimizer.lrr: no such key, did you mean stages.reflow.optim.student.optimizer.lr?",
        ),
        ("stages.distill.method.step=2", "did you mean stages.distill.method.steps?"),
        ("stages.teacher.steps=3", "stages.teacher is the group 'teacher'; override teacher.steps=..."),
        # guidance of other tools
        ("stages.pairs.guidance_rescale=0.7", "not implemented: guidance is u + g (c - u) at all times"),
        (
            "+stages.pairs.guidance_rescale=0.7",
            "stages.pairs.guidance_rescale: no such key, not implemented: guidance is",
        ),
        # wrong group values
        (
            "data=digit",
            "data: found 'digit', did you mean digits?; expected digits, fashion_mnist, folder, image_folder, latents",
        ),
        ("profile=smok", "did you mean smoke?"),
        ("data=mine", "to add an option, write FOLDER/data/NAME.yaml and pass --config-dir FOLDER"),
        ("method@stages.reflow.method=reflo", "did you mean reflow?"),
        # wrong values
        ("seed=abc", "seed: found 'abc', expected an integer"),
        ("rounds=0", "rounds: expected an integer of at least 1, found 0"),
        ("rounds=two", "rounds: expected an integer of at least 1, found 'two'"),
        ("profile.steps=0", "profile.steps: found 0, expected an integer of at least 1"),
        ("trainer.threads=0", "trainer.threads: expected at least 1, found 0"),
        ("trainer.checkpoint_every=0", "trainer.checkpoint_every: expected at least 1, found 0"),
        ("trainer.devices=two", "trainer.devices: found 'two', expected int"),
        ("redo=true", "redo: found True, expected a stage or a list of stages"),
        ("name=..", "name: found '..', expected a name: one component of a path"),
        ("name=a/b", "name: found 'a/b', expected a name: one component of a path"),
        ("teacher.precision=fp8", "stages.teacher.precision: found 'fp8', expected one of"),
        ("stages.reflow.init=pairs", "init: 'pairs' makes no model"),
        ("stages.export.evaluate=teacher", "evaluate: 'teacher' is not an Evaluate stage"),
        ("eval.meter.k=0", "k: found 0, expected at least 1"),
        ("eval.k=3", "eval.k: is now eval.meter.k; write eval.meter.k=..."),
        ("trainer.shard=half", "trainer.shard: found 'half', expected one of ['none', 'world', 'node']"),
        ("trainer.accelerator=tpu", "trainer.accelerator: found 'tpu', expected 'auto', 'cpu' or 'gpu'"),
        ("teacher.steps=abc", "stages.teacher.steps: found 'abc', expected int"),
        ("teacher.steps=0", "stages.teacher.steps: expected at least 1, found 0"),
        ("teacher.kind=banana", "unknown prediction kind 'banana'"),
        ("teacher.kind=v", "kind 'v' needs alpha^2 + sigma^2 = 1, which Flow does not keep"),
        ("stages.pairs.sampler.solver=rk9", "stages.pairs.sampler.solver: found 'rk9', expected one of"),
        (
            "stages.pairs.sampler.steps=0",
            "stages.pairs.sampler.steps: found 0, expected an integer of 1 ..",
        ),
        ("eval.straightness.steps=1", "straightness.steps: found 1, expected at least 2"),
        ("eval.models.student.stage=distil", "stages.evaluate: refers to 'distil', expected one of"),
        ("eval.follows=[teacher,3]", "stages.evaluate.follows: names the row [teacher, 3]"),
        (
            "stages.reflow.data=teacher",
            "stages.reflow.data: 'teacher' is a Train stage, expected a Generate stage",
        ),
        (
            "stages.reflow.teacher=teacher",
            "teacher: found 'teacher', but the method distill.methods.reflow.Reflow takes no",
        ),
        ("stages.pairs.teacher=distill", "circular reference"),
        ("redo=refolw", "redo: found ['refolw'], expected stages of this recipe"),
        ("data._target_=distill.data.digits.Nope", "Nope"),
    ],
)
def test_overrides(refuse, override, expected):
    assert expected in refuse(*SMOKE, override)


def test_gates_are_checked_before_anything_runs(refuse):
    gate = "eval.gates=[{name: g, row: [student, 7], metric: fd, at_most: 1}]"
    assert "gates[0].row: names the row [student, 7]" in refuse("recipe=instaflow", "name=run", gate)
    gate = "eval.gates=[{name: g, row: [student, 1], metric: fdd, at_most: 1}]"
    assert "gates[0].metric: no such metric as 'fdd', did you mean fd?" in refuse(
        "recipe=instaflow", "name=run", gate
    )


def test_a_missing_teacher_is_named(refuse):
    assert "path" in refuse("recipe=instaflow", "teacher=pretrained")
    assert "nowhere: no such folder" in refuse(*SMOKE, "teacher.path=nowhere")


@pytest.fixture(scope="module")
def run(finished) -> Path:
    return finished / "runs" / "run"


def test_pairs_of_another_teacher_or_made_otherwise_are_refused(run, refuse):
    use = (*SMOKE, f"teacher.path={run / 'teacher'}")
    pairs = f"stages.pairs.path={run / 'pairs'}"
    other = refuse(*use, f"stages.pairs.path={run / 'pairs2'}")
    assert "manifest.json: does not match the options of this stage" in other
    assert "steps: found 8, expected 20" in other
    # The weights of the teacher are known when it is there: the stage says so.
    same_way = ("stages.pairs.sampler={solver: euler, steps: 8}", f"stages.pairs.path={run / 'pairs2'}")
    assert "teacher: found" in refuse(*use, *same_way)
    assert "guidance_scale: found 1.0, expected 2.0" in refuse(
        *use, pairs, "stages.pairs.guidance_scale=2", "name=b"
    )


def test_pairs_that_fit_are_used(run, tmp_path):
    use = (*SMOKE, *SHORT, f"teacher.path={run / 'teacher'}", f"stages.pairs.path={run / 'pairs'}")
    run_verb(tmp_path, "train", *use)
    made = tmp_path / "runs/run/pairs/pairs-00000.safetensors"
    assert made.read_bytes() == (run / "pairs/pairs-00000.safetensors").read_bytes()


def copy_model(source: Path, target: Path, **changes) -> Path:
    """A model folder with another description."""
    target.mkdir()
    for name in ("model.safetensors", "model.json"):
        (target / name).write_bytes((source / name).read_bytes())
    description = json.loads((target / "model.json").read_text())
    for key, value in changes.items():
        if value is None:
            del description[key]
        else:
            description[key] = value
    (target / "model.json").write_text(json.dumps(description))
    return target


def test_teachers_that_do_not_fit_are_refused(run, tmp_path, refuse):
    def message(name: str, *overrides: str, **changes) -> str:
        folder = copy_model(run / "teacher", tmp_path / name, **changes)
        return refuse(*SMOKE, f"name={name}", f"teacher.path={folder}", *overrides)

    assert "model.json: kind: missing" in message("a", kind=None)
    assert "unknown prediction kind 'noise'" in message("b", kind="noise")
    # eps where nothing of the data is left at the start: a flow's t = 1, or zero terminal SNR
    assert "kind: found 'eps', but under Flow() alpha is 0 at t_max" in message("c", kind="eps")
    assert "schema: found 9" in message("d", schema=9)
    assert "guidance_scale: found 2.0, but the teacher was trained without a null condition" in message(
        "e", "stages.pairs.guidance_scale=2.0", guidable=False
    )


def test_a_one_step_student_is_no_teacher_and_no_start_for_reflow(run, refuse):
    assert "a one-step student, valid only at t_max" in refuse(*SMOKE, f"teacher.path={run / 'distill'}")


def test_shapes_and_classes_that_do_not_fit_are_refused(refuse):
    assert "net: does not take samples of shape (1, 8, 8)" in refuse(*SMOKE, "teacher.net.channels=4")
    assert "net.num_classes: found 5, but the data have 10 classes" in refuse(
        *SMOKE, "name=c", "teacher.net.num_classes=5"
    )


def test_an_optimizer_that_cannot_be_built_is_named(refuse):
    message = refuse(*SMOKE, "teacher.optim.student.optimizer.lr=fast")
    assert "stages.teacher" in message
    message = refuse(*SMOKE, "name=d", "teacher.optim.student.optimizer._target_=torch.optim.Nope")
    assert "stages.teacher" in message
    assert "Nope" in message


def test_a_failed_start_does_not_block_the_corrected_command(tmp_path):
    assert "net: does not take samples" in refusal(
        tmp_path, "train", *SMOKE, *SHORT, "teacher.net.channels=4"
    )
    run_verb(tmp_path, "train", *SMOKE, *SHORT)
    assert (tmp_path / "runs/run/reflow/artifact.json").is_file()


def test_extension_and_what_it_makes_stale(finished, tmp_path):
    """A longer last training stage is trained on; a longer first one makes the others stale, which is said before it runs."""
    copied_run(finished, tmp_path)
    command = (*SMOKE, *SHORT)
    refused = refusal(tmp_path, "train", *command, "profile.steps=6")
    assert "teacher would be trained further" in refused
    assert "redo=pairs" in refused
    extended = run_verb(tmp_path, "train", *command, "profile.steps=6", "redo=[pairs]")
    assert "[1/3] teacher" in extended.stderr
    steps = [
        json.loads(x)["step"]
        for x in (tmp_path / "runs/run/teacher/logs/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [4, 6]
    assert "\n  steps: 6 -> 5" in refusal(tmp_path, "train", *command, "profile.steps=5")
    shutil.rmtree(tmp_path / "runs/run/teacher/checkpoints")
    gone = refusal(tmp_path, "train", *command, "profile.steps=9", "redo=[pairs]")
    assert "its last checkpoint is missing; redo=teacher" in gone


def test_a_newer_artifact_is_refused(run):
    path = run / "reflow" / "artifact.json"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {"schema": 3}))
    try:
        refused = refusal(run.parents[1], "train", *SMOKE)
        assert "reflow/artifact.json: schema: found 3, this version reads 2" in refused
    finally:
        path.write_text(text)


def test_published_files_come_back(run):
    for name in ("metrics.json", "report.md", "grid.png"):
        (run / name).unlink()
    call_verb(run.parents[1], "train", *SMOKE, check=True)
    for name in ("metrics.json", "report.md", "grid.png"):
        assert (run / name).read_bytes() == (run / "evaluate" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["count=0"], "count: expected at least 1"),
        (["label=11"], "label: expected classes 0 .. 9, found [11]"),
        (["steps=4"], "not valid at 4"),
        (["guidance_scale=2"], "guidance_scale: found 2.0, but this model was not trained with a null"),
        (["columns=0"], "columns: expected at least 1, found 0"),
        (["out=x.jpg"], "out: found 'x.jpg', expected a .png file"),
        (["out=/proc/x.png"], "/proc/x.png"),
        (["device=foo"], "foo"),
        (["count=many"], "count"),
        (["seeed=1"], "seeed: no such key, did you mean seed?; expected"),
    ],
)
def test_sample_options(run, tmp_path, arguments, expected):
    assert expected in refusal(tmp_path, "sample", f"model={run / 'export'}", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_missing_export_file_is_named(run, tmp_path):
    folder = copy_model(run / "export", tmp_path / "export")
    (folder / "model.safetensors").unlink()
    assert "model.safetensors: missing" in refusal(tmp_path, "sample", f"model={folder}")


def test_a_path_into_the_run_itself_is_refused(run):
    """`redo=` would delete what it points to."""
    kept = (run / "teacher" / "model.safetensors").read_bytes()
    for redo in ([], ["redo=teacher"]):
        arguments = (*SMOKE, f"teacher.path={run / 'teacher'}", *redo)
        assert "is in this run's folder" in refusal(run.parents[1], "train", *arguments)
    assert (run / "teacher" / "model.safetensors").read_bytes() == kept


def test_a_refused_command_deletes_nothing(run):
    before = sorted(run.rglob("*"))
    for arguments in (
        ["redo=distill", "teacher.net.width=24"],
        ["redo=pairs", "profile.steps=6", "trainer.devices=3"],
        ["redo=[pairs,teachr]"],
        ["redo=1"],
    ):
        refusal(run.parents[1], "train", *SMOKE, *arguments)
    assert sorted(run.rglob("*")) == before


def test_leftovers_without_a_record_are_refused(finished, tmp_path):
    """A checkpoint that no identity belongs to: neither continued nor deleted."""
    copied_run(finished, tmp_path)
    teacher = tmp_path / "runs/run/teacher"
    for name in ("identity.json", "artifact.json"):
        (teacher / name).unlink()
    before = sorted(teacher.rglob("*"))
    for redo in ([], ["redo=teacher"]):
        refused = refusal(tmp_path, "train", *SMOKE, *redo)
        assert "runs/run/teacher: is not empty and was not made by a stage" in refused
    assert sorted(teacher.rglob("*")) == before


def test_an_interrupted_redo_is_continued_by_the_same_command(finished, tmp_path):
    copied_run(finished, tmp_path)
    command = (*SMOKE, "redo=reflow")
    run = tmp_path / "runs" / "run"
    # As a kill leaves it: the redo is noted, its stages are emptied, all but one are made again.
    digests = {
        e.name: read_json(e / "artifact.json")["digest"]
        for e in run.iterdir()
        if (e / "artifact.json").is_file()
    }
    order = list(read_json(run / "plan.json")["stages"])
    write_json(run / "redo.json", {"redo": "reflow", "digests": {name: digests[name] for name in order}})
    (run / "export" / "artifact.json").unlink()
    again = run_verb(tmp_path, "train", *command)
    assert again.stderr.count("already finished, skipped") == 6
    assert not (run / "redo.json").exists()
    planned = call_verb(tmp_path, "train", *command, "plan=true", check=True).stdout
    assert (planned.count(" new "), planned.count(" finished ")) == (5, 2), (
        "the next one is a redo of its own"
    )
    made = {name: read_json(run / name / "artifact.json")["digest"] for name in order}
    assert made == {name: digests[name] for name in order}


def test_a_changed_record_is_found(run):
    path = run / "reflow" / "artifact.json"
    text = path.read_text()
    path.write_text(text.replace('"seed": 0', '"seed": 1'))
    try:
        refused = refusal(run.parents[1], "train", *SMOKE)
        assert "reflow/artifact.json: digest: does not match the identity" in refused
    finally:
        path.write_text(text)


def test_a_key_of_another_recipe_is_named_with_its_recipes(tmp_path):
    message = refusal(tmp_path, "train", "recipe=disback", "rounds=2", "plan=true")
    assert "rounds: no such key in this recipe" in message
    assert "the recipes instaflow, toy_instaflow have it" in message


def test_a_recipe_of_ones_own_is_named_with_its_folder(tmp_path):
    file = tmp_path / "my" / "recipe" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("defaults: [toy_instaflow, _self_]\n")
    message = refusal(tmp_path, "train", "recipe=mine", "plan=true")
    assert "to use my/recipe/mine.yaml, add --config-dir my" in message
    assert (
        "7 stages"
        in call_verb(tmp_path, "train", "--config-dir", "my", "recipe=mine", "plan=true", check=True).stdout
    )
