"""Whose files are whose: a run deletes, sweeps and writes over its own alone, and believes no record that was changed."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from distill import files, stages
from distill.files import sha256_file, write_json
from distill.recipe.references import stage_class
from distill.recipe.run import run
from distill.stages import nodes, ownership
from distill.stages.artifact import FIRST_METERS, FIRST_NAMES, digest_of, identity, write_artifact
from distill.stages.base import Stage

OPTIM = {
    "student": {
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.01},
        "schedule": {"_target_": "distill.engine.schedule.Constant"},
        "ema": 0.9,
    }
}
STAGES: dict[str, Any] = {
    "teacher": {
        "_target_": "distill.stages.exact.Exact",
        "process": {"_target_": "distill.process.flow.Flow"},
        "ring": {"count": 3, "radius": 1.0},
    },
    "pairs": {
        "_target_": "distill.stages.generate.Generate",
        "teacher": "teacher",
        "count": 12,
        "sampler": {"solver": "euler", "steps": 2},
    },
    "student": {
        "_target_": "distill.stages.train.Train",
        "method": {"_target_": "distill.methods.reflow.Reflow"},
        "data": "pairs",
        "net": {"_target_": "distill.nets.mlp.MLP", "shape": [2], "width": 8, "depth": 1, "features": 4},
        "process": {"_target_": "distill.process.flow.Flow"},
        "steps": 4,
        "batch_size": 4,
        "optim": OPTIM,
    },
}


def recipe(runs: Path, **options: Any) -> dict[str, Any]:
    stages = copy.deepcopy(STAGES)
    for name, changes in options.pop("stages", {}).items():
        stages[name] = stages.get(name, {}) | changes
    trainer = {"accelerator": "cpu", "threads": 1, "checkpoint_every": 2}
    return {"stages": stages, "seed": 0, "runs_dir": str(runs), "trainer": trainer} | options


def go(runs: Path, name: str = "x", **options: Any) -> Path:
    return run(recipe(runs, **options), name=name, recipe_name="toy")


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything in a folder: content, links, folders."""
    return {
        str(path.relative_to(folder)): (
            os.readlink(path) if path.is_symlink() else path.is_dir() or path.read_bytes()
        )
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock" or path.is_symlink()
    }


def refused(match: str, runs: Path, name: str = "x", **options: Any) -> None:
    """The run is refused with a message, planned or started or with redo, and nothing is changed."""
    before = snapshot(runs)
    for extra in ({"plan": True}, {}, {"redo": "teacher"}):
        with pytest.raises(ValueError, match=match):
            go(runs, name, **(options | extra))
        assert snapshot(runs) == before, extra


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    return go(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def x(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "runs" / "x", symlinks=True))


# ---- folders that are not ours ----


def test_a_folder_of_the_users_is_refused_by_name(tmp_path: Path) -> None:
    for path, text in (
        ("proj/teacher/precious.txt", "x"),
        ("proj/docs/.download.part", "y"),
        ("proj/a", "z"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    refused(
        r"proj: is not empty and was not made by a run \(found a, docs, teacher\); use another name=",
        tmp_path,
        "proj",
    )


@pytest.mark.parametrize(
    "name", ["plan.json", ".lock", "metrics.json", "report.md", "..distill.part", "teacher", ".distill"]
)
def test_a_name_of_ours_does_not_make_a_folder_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / "proj").mkdir()
    (tmp_path / "proj" / name).write_text('{"stages": 3}')
    (tmp_path / "proj" / "mine").write_text("x")
    refused("is not empty and was not made by a run", tmp_path, "proj")


def test_a_plan_of_another_program_is_not_ours(tmp_path: Path) -> None:
    for number, plan_of_others in enumerate(
        ({"recipe": "soup", "stages": {"boil": {"minutes": 5}}}, [], {"stages": {}})
    ):
        write_json(tmp_path / str(number) / "plan.json", plan_of_others)
        refused("was not made by a run", tmp_path, str(number))


def test_a_run_made_before_there_were_marks_is_continued(x: Path) -> None:
    (x / ".distill").unlink()
    (x / "notes.txt").write_text("mine")
    go(x.parent)
    assert (x / ".distill").read_text() == ownership.MARK_TEXT
    assert (x / "notes.txt").read_text() == "mine"


def test_a_stage_folder_without_a_record_is_refused(x: Path) -> None:
    for name in ("artifact.json", "identity.json"):
        (x / "teacher" / name).unlink()
    refused(r"x/teacher: is not empty and was not made by a stage \(found config.yaml, model.json", x.parent)
    shutil.rmtree(x / "teacher")
    (x / "teacher").write_text("a file")
    refused("x/teacher: is a file, expected the folder of a stage", x.parent)


def test_no_run_lies_in_another(x: Path) -> None:
    refused("is inside the run .*x; use another name= or runs_dir=", x, "teacher")
    refused("is inside the run .*x; use", x, "fresh")
    refused("is inside the run .*x; use", x / "teacher", "fresh")


def test_a_run_is_no_stage(x: Path) -> None:
    """A run folder where a stage's would be."""
    outer = x.parent / "outer"
    go(x.parent, "outer")
    shutil.rmtree(outer / "teacher")
    shutil.copytree(x, outer / "teacher")
    refused("outer/teacher: is not empty and was not made by a stage", x.parent, "outer")


# ---- links ----


def test_links_are_never_written_through(x: Path, tmp_path: Path) -> None:
    runs = x.parent
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_text("a")
    (photos / "model.json").write_text("b")
    before = snapshot(photos)
    (runs / "linked").symlink_to(photos)
    refused("linked: is a link to .*photos, expected a folder.*runs_dir=.* name=photos", runs, "linked")
    (runs / "moved").symlink_to(x)
    refused("moved: is a link", runs, "moved")
    for inside in ("teacher", "student/checkpoints", "student/logs"):
        copied = Path(shutil.copytree(x, runs / inside.replace("/", "-")))
        shutil.rmtree(copied / inside)
        (copied / inside).symlink_to(photos)
        refused(rf"{inside}: is a link to .*photos, expected", runs, copied.name)
    assert snapshot(photos) == before


def test_links_in_place_of_files_are_replaced(x: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    for name in (
        "metrics.json",
        "plan.json",
        "redo.json",
        "student/config.yaml",
        "student/logs/metrics.jsonl",
    ):
        (x / name).unlink(missing_ok=True)
        (x / name).symlink_to(mine)
    go(x.parent, redo="student")
    assert mine.read_text() == "mine"
    assert not (x / "student/logs/metrics.jsonl").is_symlink()
    (x / ".lock").unlink()
    (x / ".lock").symlink_to(mine)
    with pytest.raises(ValueError, match=r"\.lock: is not a regular file"):
        go(x.parent)
    assert mine.read_text() == "mine"


# ---- what is deleted ----


NOTES = (
    "notes.txt",
    "checkpoints/best of mine.ckpt",
    "logs/plot.png",
    "model.safetensors.bak",
    "sub/model.json",
    "best/why.txt",
)


def test_redo_deletes_what_we_know_and_nothing_beside_it(x: Path) -> None:
    for name in NOTES:
        (x / "student" / name).parent.mkdir(exist_ok=True)
        (x / "student" / name).write_text("mine")
    (x / "student" / "monitor").mkdir()
    old = ("best/model.json", "monitor/step_0000009.png", "nodes/001/model.safetensors", "execution.json")
    for name in old:
        (x / "student" / name).parent.mkdir(exist_ok=True, parents=True)
        (x / "student" / name).write_text("old")
    go(x.parent, redo="student")
    for name in NOTES:
        assert (x / "student" / name).read_text() == "mine", name
    for name in old[:-1]:
        assert not (x / "student" / name).exists(), name
    assert not (x / "student" / "monitor").exists()
    named = json.loads((x / "student" / "artifact.json").read_text())["files"]
    assert set(named) == {"config.yaml", "execution.json", "identity.json", "model.json", "model.safetensors"}
    (x / "student" / "notes.txt").write_text("changed")  # no part of the artifact
    go(x.parent)


def test_a_stage_that_becomes_another_kind_is_emptied_of_its_old_files(x: Path, whole: Path) -> None:
    (x / "student" / "grid.png").write_text("mine")  # a name of other kinds of stages
    load = {"student": {"path": str(whole / "student")}}
    go(x.parent, stages=load, redo="student")
    assert not (x / "student" / "checkpoints").exists()
    assert (x / "student" / "grid.png").read_text() == "mine"
    assert (x / "student" / "model.json").read_bytes() == (whole / "student" / "model.json").read_bytes()


def test_the_sweep_takes_temporaries_of_our_files_alone(x: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".model.json.part").write_text("mine")
    (x / "linked").symlink_to(elsewhere)
    (x / "docs").mkdir()
    ours = (
        ".plan.json.part",
        "student/.model.safetensors.part",
        "student/logs/.metrics.jsonl.0123abcd.part",
        "pairs/.pairs-00007.safetensors.part",
        "teacher/..part",
    )
    mine = (
        "docs/.download.part",
        "docs/.model.json.part",
        "student/.thesis.tex.part",
        "student/logs/.a.part",
        ".movie.mkv.part",
        "teacher/model.json.part",
        "pairs/.pairs-7.safetensors.part",
    )
    for name in (*ours, *mine):
        (x / name).write_text("x")
    (x / "teacher" / ".model.json.part").symlink_to(elsewhere / ".model.json.part")
    (x / "pairs" / ".manifest.json.part").mkdir()
    go(x.parent)
    left = {str(path.relative_to(x)) for path in x.rglob("*part")}
    assert left == {*mine, "teacher/..part", "teacher/.model.json.part", "pairs/.manifest.json.part"}
    assert (elsewhere / ".model.json.part").read_text() == "mine"


def test_a_temporary_name_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / ".a.json.part"
    mine.write_text("mine")
    linked = tmp_path / ".b.json.part"
    linked.symlink_to(mine)
    for name in ("a.json", "b.json"):
        write_json(tmp_path / name, 1)
    assert mine.read_text() == "mine"
    assert linked.is_symlink()
    assert sorted(os.listdir(tmp_path)) == [".a.json.part", ".b.json.part", "a.json", "b.json"]


# ---- names ----


@pytest.mark.parametrize(
    "name",
    ["../../victim", "a/logs", "..", ".hidden", "metrics.json", "Metrics.JSON", "plan.json", ".lock", "redo.json",
     "grid.png", "report.md", "config.yaml", "artifact.json", "a\nb", "a\x1bb", " a", "a" * 201, "", ".distill"],
)  # fmt: skip
def test_names_of_stages(tmp_path: Path, name: str) -> None:
    refused("stages", tmp_path, stages={name: STAGES["teacher"]})
    refused("name: found", tmp_path, name if name not in ownership.OF_A_RUN and "/" in name else "../x")


def test_stages_that_differ_by_case_alone(tmp_path: Path) -> None:
    refused(
        "stages.TEACHER: this name differs from 'teacher' only in case",
        tmp_path,
        stages={"TEACHER": STAGES["teacher"]},
    )
    composed, apart = "\u00e9t\u00e9", "e\u0301te\u0301"
    refused("only in case, so both", tmp_path, stages={composed: STAGES["teacher"], apart: STAGES["teacher"]})


def test_a_run_may_be_called_like_a_stage(tmp_path: Path) -> None:
    assert (go(tmp_path, "teacher") / "teacher" / "model.json").is_file()


# ---- what is shared ----


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


def test_a_loaded_model_and_pairs_share_nothing_with_their_source(x: Path, tmp_path: Path) -> None:
    """The source is written into in place afterwards."""
    source = x.rename(tmp_path / "source")
    use = {name: {"path": str(source / name)} for name in ("student", "pairs")}
    made = go(tmp_path / "runs", "new", stages=use)
    assert not inodes(made) & inodes(source)
    before = snapshot(made)
    for path in [*source.glob("student/model.*"), *source.glob("pairs/*")]:
        with path.open("r+b") as handle:
            handle.write(b"XXXXXXXX")
    assert snapshot(made) == before


def test_links_in_a_source_mean_what_they_lead_to(whole: Path, tmp_path: Path) -> None:
    """As in the cache of Hugging Face: relative links into a folder of blobs."""
    blobs, model = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    model.mkdir(parents=True)
    for name in ("model.safetensors", "model.json"):
        shutil.copy(whole / "student" / name, blobs / name.upper())
        (model / name).symlink_to(f"../../blobs/{name.upper()}")
    made = go(tmp_path / "runs", stages={"student": {"path": str(model)}})
    shutil.rmtree(blobs)
    for name in ("model.safetensors", "model.json"):
        assert (made / "student" / name).read_bytes() == (whole / "student" / name).read_bytes()
        assert not (made / "student" / name).is_symlink()


@pytest.mark.parametrize("how", ["hard", "soft"])
def test_files_of_an_older_run_that_are_shared_become_its_own(x: Path, tmp_path: Path, how: str) -> None:
    path, outside = x / "student" / "model.safetensors", tmp_path / "outside"
    shutil.copy(path, outside)
    path.unlink()
    os.link(outside, path) if how == "hard" else path.symlink_to(outside)
    go(x.parent)
    assert not path.is_symlink()
    assert path.stat().st_ino != outside.stat().st_ino
    assert path.read_bytes() == outside.read_bytes()


def test_a_source_without_its_files_is_refused_before_anything_runs(whole: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(whole / "student", tmp_path / "model"))
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"stages.student: .*model.safetensors: (missing|not a readable)"):
        go(tmp_path / "runs", stages={"student": {"path": str(model)}})
    with pytest.raises(
        ValueError, match=r"stages.pairs: .*manifest.json: missing; expected a finished pair cache"
    ):
        go(tmp_path / "runs", stages={"pairs": {"path": str(model)}})


# ---- records ----


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda r: r["facts"].update(steps=9),
            "student/artifact.json: sha256: does not match the rest of the file",
        ),
        (lambda r: r["code"].update(torch="1"), "sha256: does not match"),
        (lambda r: r["files"].pop("model.json"), "sha256: does not match"),
        (lambda r: r["input_files"].update(data="0" * 64), "sha256: does not match"),
        (lambda r: r["identity"].update(seed=1), "digest: does not match the identity"),
        (lambda r: r.pop("sha256"), "sha256: does not match"),
        (lambda r: r.update(schema=1), "found 1 with entries of schema 2"),
        (lambda r: r.update(more=1), "more"),
        (lambda r: r.update(files=[]), "files: found"),
    ],
)
def test_a_changed_record_is_refused_and_redo_makes_it_again(x: Path, change: Any, match: str) -> None:
    before = (x / "student" / "model.safetensors").read_bytes()
    edit(x / "student" / "artifact.json", change)
    with pytest.raises(ValueError, match=rf"(?s)stages.student: .*{match}.*redo=student"):
        go(x.parent)
    go(x.parent, redo="student")
    assert (x / "student" / "model.safetensors").read_bytes() == before


def test_a_record_that_is_no_json_is_refused(x: Path) -> None:
    (x / "student" / "artifact.json").write_text('{"schema": 2, "schema": 2')
    with pytest.raises(ValueError, match=r"(?s)student/artifact.json: not valid JSON.*redo=student"):
        go(x.parent)
    go(x.parent, redo="student")


def test_another_folder_in_place_of_an_input_is_noticed(x: Path, tmp_path: Path) -> None:
    """The same config, seed and digest, but other files: pairs of another machine."""
    other = Path(shutil.copytree(x, tmp_path / "other"))
    shard = other / "pairs" / "pairs-00000.safetensors"
    table = safetensors.torch.load_file(shard)
    safetensors.torch.save_file(table | {"x0": table["x0"] + 1e-3}, shard)
    edit(other / "pairs" / "manifest.json", lambda m: m["shards"][0].update(sha256=sha256_file(shard)))
    record = json.loads((other / "pairs" / "artifact.json").read_text())
    made = (r"pairs-.*", r"manifest\.json")
    write_artifact(
        other / "pairs", record["identity"], record["facts"], made, input_files=record["input_files"]
    )
    shutil.rmtree(x / "pairs")
    shutil.copytree(other / "pairs", x / "pairs")
    with pytest.raises(
        ValueError, match=r"(?s)stages.student: .*data: has changed since this stage was made.*redo=student"
    ):
        go(x.parent)
    (x / "student" / "artifact.json").unlink()  # begun, with a checkpoint
    with pytest.raises(
        ValueError, match=r"(?s)stages.student: .*data: has changed since this stage was made.*redo=student"
    ):
        go(x.parent)
    go(x.parent, redo="student")


def test_an_input_that_is_made_again_otherwise_is_noticed_then(
    x: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(x / "pairs")

    def another(path: Path, table: dict[str, Any]) -> None:
        files.write_safetensors(path, table | {"x0": table["x0"] + 1e-3})

    monkeypatch.setattr("distill.cache.writer.write_safetensors", another)
    with pytest.raises(
        ValueError,
        match=r"stages.student: .*was made from other files of 'data' than stage 'pairs' has now; redo=student",
    ):
        go(x.parent)


def test_records_of_the_first_schema_are_continued_and_brought_up_to_date(x: Path) -> None:
    for stage in STAGES:
        path = x / stage / "artifact.json"
        edit(path, lambda r: [r.pop("sha256"), r.pop("input_files"), r.update(schema=1)])
    (x / "student" / "note").write_text("mine")
    edit(
        x / "student" / "artifact.json", lambda r: r["files"].update(note="0" * 64)
    )  # it named whatever lay there
    go(x.parent)
    record = json.loads((x / "student" / "artifact.json").read_text())
    assert record["schema"] == 2
    assert set(record["input_files"]) == {"data"}
    assert "note" not in record["files"]
    (x / "student" / "model.json").write_text("{}")
    with pytest.raises(ValueError, match=r"student/model.json: sha256.*redo=student makes it"):
        go(x.parent)


def test_a_record_without_a_model_is_no_artifact(x: Path) -> None:
    """As an earlier version left it where the files of a source were links."""
    edit(
        x / "student" / "artifact.json",
        lambda r: [
            r.pop("sha256"),
            r.pop("input_files"),
            r.update(schema=1),
            r["files"].pop("model.safetensors"),
        ],
    )
    with pytest.raises(ValueError, match=r"(?s)files: model.safetensors: missing.*redo=student"):
        go(x.parent)


def test_a_stage_that_leaves_no_model_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.stages.exact.save_model", lambda *_: None)
    with pytest.raises(
        FileNotFoundError, match=r"teacher/model.safetensors: missing at the end of its stage"
    ):
        go(tmp_path)
    assert not (tmp_path / "x" / "teacher" / "artifact.json").exists()


# ---- records of versions whose stages lay in other files ----


def test_digests_keep_the_names_that_stages_had_first(x: Path) -> None:
    """Else every run that was made before a file of stages was moved would be another one."""
    folder = Path(stages.__file__).parent
    found = {
        f"{module}.{name}"
        for path in folder.glob("*.py")
        for module in [f"distill.stages.{path.stem}"]
        for name, kind in vars(importlib.import_module(module)).items()
        if isinstance(kind, type) and issubclass(kind, Stage) and kind.__module__ == module
    }
    assert found - set(FIRST_NAMES) == {
        "distill.stages.base.Stage",
        "distill.stages.base.ModelStage",
        "distill.stages.encode.Encode",  # these two have their first names
        "distill.stages.pretrained.Pretrained",
        "distill.stages.encode_images.EncodeImages",
        "distill.stages.token_files.TokenFiles",
        "distill.stages.token_models.Filter",
        "distill.stages.token_models.Involve",
        "distill.stages.token_models.Marginals",
        "distill.stages.tokenize.Tokenize",
    }
    for name, first in FIRST_NAMES.items():
        content = identity({"_target_": name, "count": 3, "path": "a"}, (), {}, 0, "f")
        text = '{"config":{"_target_":"FIRST","count":3},"fingerprint":"f","inputs":{},"seed":0}'
        assert digest_of(content) == hashlib.sha256(text.replace("FIRST", first).encode()).hexdigest()
    for name, first in FIRST_METERS.items():
        evaluate = {
            "_target_": "distill.stages.evaluate.Evaluate",
            "meter": {"_target_": name, "k": 5},
            "count": 3,
        }
        assert identity(evaluate, (), {}, 0, "f")["config"] == {"_target_": first, "k": 5, "count": 3}
    recorded = json.loads((x / "student" / "artifact.json").read_text())["identity"]["config"]["_target_"]
    assert recorded == "distill.pipeline.stages.Train"


def test_a_recipe_that_names_a_stage_by_its_first_name_is_told_the_other() -> None:
    with pytest.raises(
        ValueError,
        match=r"'distill.pipeline.exact.Exact', which was renamed; expected 'distill.stages.exact.Exact'",
    ):
        stage_class({"_target_": "distill.pipeline.exact.Exact"}, "stages.teacher")


# ---- nodes that an interrupted recording goes on with ----


@pytest.mark.parametrize("damage", ["changed", "missing", "swapped", "no record"])
def test_nodes_are_verified_before_a_manifest_names_them(whole: Path, tmp_path: Path, damage: str) -> None:
    stage = tmp_path / "record"

    def save(folder: Path) -> None:
        shutil.copytree(whole / ("student" if folder.name == "001" else "teacher"), folder)

    keep = nodes.node_saver(stage, [2, 4], save)
    keep(2)
    keep(4)
    nodes.check_stored(stage, [2, 4])
    first = nodes.node_folder(stage, 1) / "model.safetensors"
    if damage == "changed":
        first.write_bytes(first.read_bytes()[:-1] + b"X")
    elif damage == "missing":
        first.unlink()
    elif damage == "swapped":
        shutil.copy(nodes.node_folder(stage, 2) / "model.safetensors", first)
    else:
        (stage / nodes.STORED).unlink()
    with pytest.raises(
        ValueError, match=r"001/model.safetensors: is not the file that was saved after step 2; redo=record"
    ):
        nodes.check_stored(stage, [2, 4])
