"""`distill.evaluate` and `distill.compare` as a user starts them, on a real run with tiny numbers."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from tests_support import ROOT, run_verb

import distill
from distill import compare as compare_verb
from distill import evaluate as evaluate_verb
from distill import train as train_verb
from distill.data.digits import Digits
from distill.data.folder import ImageFolder
from distill.evaluation.measure import Reference, measure
from distill.models.features import load_digits64
from distill.recipe import compose as recipe_configs
from distill.recipe.arguments import arguments
from distill.stages.evaluate import labels_of

pytestmark = pytest.mark.filterwarnings("ignore:.*covariance is singular")

TIMING = {"images_per_second", "train_seconds", "peak_memory_bytes"}
SMOKE_COUNT, SMOKE_BATCH = 20, 16


@pytest.fixture(scope="module")
def run(shared) -> Path:
    """A finished run of the whole recipe."""
    return shared("instaflow") / "runs" / "run"


def write_images(folder: Path, images: torch.Tensor, labels: torch.Tensor | None = None) -> Path:
    """PNG files of images [n,1,H,W] in [-1, 1], in sub-folders by label."""
    for i, image in enumerate(images):
        path = folder / ("" if labels is None else str(int(labels[i]))) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] + 1).mul(127.5).round().to(torch.uint8).numpy()).save(path)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> dict[str, Path]:
    """Folders of digits: `a` and `b` are 60 of them each in sub-folders, `flat` is `a` without, `large` is twice the
    size."""
    digits, folder = Digits(), tmp_path_factory.mktemp("photos")
    order = digits.labels.argsort(stable=True).view(-1)
    classes = [order[digits.labels[order] == label] for label in range(10)]
    a = torch.cat([rows[:6] for rows in classes])
    b = torch.cat([rows[6:12] for rows in classes])
    large = digits.images[b].repeat_interleave(2, 2).repeat_interleave(2, 3)
    return {
        "a": write_images(folder / "a", digits.images[a], digits.labels[a]),
        "b": write_images(folder / "b", digits.images[b], digits.labels[b]),
        "flat": write_images(folder / "flat", digits.images[a]),
        "large": write_images(folder / "large", large, digits.labels[b]),
    }


@pytest.fixture
def verb(tmp_path, monkeypatch, capsys):
    """Run a verb in this process in an empty folder; returns (what it printed, the message that it ended with)."""

    def call(name: str, *given: object) -> tuple[str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", "0"))
        words = [str(word) for word in given]
        monkeypatch.setattr(sys, "argv", [f"distill.{name}", *words])
        GlobalHydra.instance().clear()
        message = ""
        try:
            if name == "compare":
                compare_verb.main()
            else:
                recipe_configs.run_verb({"evaluate": evaluate_verb, "train": train_verb}[name].main)
        except SystemExit as ended:
            message = str(ended.code)
        return capsys.readouterr().out, message

    return call


@pytest.fixture
def evaluate(verb, tmp_path):
    """Run `distill.evaluate`, which must succeed; returns (the metrics, what it printed)."""

    def call(*given: object, out: str = "evaluation") -> tuple[dict, str]:
        told = () if out == "evaluation" else (f"out={out}",)
        printed, message = verb("evaluate", *given, *told)
        assert message == ""
        for name in ("metrics.json", "report.md", "grid.png"):
            assert f"{out}/{name}" in printed
            assert (tmp_path / out / name).stat().st_size > 0
        assert sorted(p.name for p in (tmp_path / out).iterdir()) == ["grid.png", "metrics.json", "report.md"]
        return json.loads((tmp_path / out / "metrics.json").read_text()), printed

    return call


def rows_of(metrics: dict, model: str) -> list[dict]:
    return [row for row in metrics["rows"] if row["model"] == model]


@pytest.mark.parametrize(
    ("stage", "label", "steps"), [("teacher", "teacher", "50,8,4,2,1"), ("export", "student", None)]
)
def test_a_model_gets_the_numbers_of_its_run(run, evaluate, stage, label, steps):
    """Bit for bit, except for timing and for the distance to another model of the run."""
    options = [f"count={SMOKE_COUNT}", f"batch_size={SMOKE_BATCH}", *([f"steps={steps}"] if steps else [])]
    found, printed = evaluate(f"model={run / stage}", "reference=digits", *options)
    expected = json.loads((run / "metrics.json").read_text())
    rows = rows_of(expected, label)
    assert (
        [row["steps"] for row in found["rows"]]
        == [row["steps"] for row in rows]
        == ([50, 8, 4, 2, 1] if steps else [1])
    )
    for mine, theirs in zip(found["rows"], rows, strict=True):
        assert list(mine) == list(theirs)
        left_out = TIMING | {"teacher_mse"}
        assert {k: v for k, v in mine.items() if k not in left_out} == {
            k: v for k, v in theirs.items() if k not in left_out
        }
        assert mine["teacher_mse"] is None
        assert mine["images_per_second"] > 0
        if stage == "teacher":  # a stage of a run knows what its training took
            assert mine["train_seconds"] == theirs["train_seconds"] > 0
    for key in ("schema", "recipe", "seed", "protocol", "real"):
        assert found[key] == expected[key], key
    assert list(found) == [*expected, "source"]
    assert found["note"] == ""
    assert found["source"]["sha256"] in (run / stage / "model.json").read_text()
    assert f"{label} " in printed
    assert f"{SMOKE_COUNT} class-balanced samples" in printed
    assert "Protocol: " in printed


def test_images_are_measured_as_they_lie_there(photos, evaluate, tmp_path):
    found, printed = evaluate(f"model={photos['a']}", f"reference={photos['b']}")
    samples, real, extractor = ImageFolder(str(photos["a"])), ImageFolder(str(photos["b"])), load_digits64()
    reference = Reference(real.images, real.labels, extractor)
    expected = measure(samples.images, samples.labels, reference, extractor)
    (row,) = found["rows"]
    assert {key: row[key] for key in expected} == expected
    assert row["class_accuracy"] is not None
    for key in ("steps", "nfe", "guidance_scale", "teacher_mse", "straightness", *TIMING):
        assert row[key] is None
    assert found["protocol"]["reference_digest"] == real.fingerprint()
    assert found["protocol"]["reference"] == "b, all images"
    assert (found["protocol"]["count"], found["protocol"]["reference_count"]) == (60, 60)
    assert found["protocol"]["class_balanced"] is True
    assert found["source"]["sha256"] == samples.fingerprint()
    assert found["recipe"] is None
    assert "| a | - |" in (tmp_path / "evaluation" / "report.md").read_text()
    assert "fd_digits64@60" in printed
    flat, _ = evaluate(f"model={photos['flat']}", f"reference={photos['b']}", out="flat")
    assert flat["rows"][0]["fd"] == pytest.approx(row["fd"], abs=1e-9)  # the same images in another order
    assert flat["rows"][0]["class_accuracy"] is None
    assert flat["protocol"]["class_balanced"] is False


def test_exported_samples_measured_from_files_agree_with_the_model(run, photos, evaluate, tmp_path):
    """Through 8-bit files the numbers change by the rounding alone."""
    student = distill.load(run / "export")
    images = student.sample(SMOKE_COUNT, stream="evaluate")
    write_images(tmp_path / "samples", images, labels_of(student, SMOKE_COUNT))
    files, _ = evaluate("model=samples", f"reference={photos['b']}")
    model, _ = evaluate(
        f"model={run / 'export'}", f"reference={photos['b']}", f"count={SMOKE_COUNT}", out="model"
    )
    for key in ("fd", "sliced_wasserstein", "class_std", "nn_train"):
        assert files["rows"][0][key] == pytest.approx(model["rows"][0][key], rel=0.02), key
    assert files["rows"][0]["class_accuracy"] == pytest.approx(model["rows"][0]["class_accuracy"], abs=0.06)
    # Images have no straightness, so the two compare all the same.
    for entry in ("count", "class_balanced", "reference_digest", "seed"):
        assert files["protocol"][entry] == model["protocol"][entry]


def test_resized_images_are_told_in_the_protocol(photos, evaluate, verb):
    plain, _ = evaluate(f"model={photos['a']}", f"reference={photos['b']}", out="plain")
    resized, printed = evaluate(
        f"model={photos['a']}", f"reference={photos['large']}", "resolution=8", out="resized"
    )
    assert resized["protocol"]["reference"] == (
        "large, all images, resized to 8x8 (centre crop, bicubic with antialiasing)"
    )
    assert "resized to 8x8" in printed
    assert resized["protocol"]["reference_digest"] != plain["protocol"]["reference_digest"]
    both, _ = evaluate(f"model={photos['large']}", "reference=digits", "resolution=8", out="both")
    assert both["protocol"]["reference"].endswith(
        "; samples resized to 8x8 (centre crop, bicubic with antialiasing)"
    )
    _, message = verb("evaluate", f"model={photos['a']}", f"reference={photos['large']}")
    assert "reference: " in message
    assert (
        "has images of [1, 16, 16], but those to measure are [1, 8, 8]; resolution=8 resizes them" in message
    )


def test_forced_steps_are_sampled_and_told(run, photos, evaluate, verb):
    model, options = f"model={run / 'export'}", (f"reference={photos['b']}", f"count={SMOKE_COUNT}")
    _, message = verb("evaluate", model, *options, "steps=1,3")
    assert "this model was distilled for [1] step(s) and is not valid at 3" in message
    found, printed = evaluate(model, *options, "steps=3,1,3", "force=true")
    assert [row["steps"] for row in found["rows"]] == [3, 1]
    assert found["note"] == "Sampled by force at 3 step(s), for which the model is not valid."
    assert found["note"] in printed
    valid, _ = evaluate(model, *options, out="valid")
    assert [row["steps"] for row in valid["rows"]] == [1]
    assert valid["rows"][0]["fd"] == found["rows"][1]["fd"] != found["rows"][0]["fd"]
    images = distill.load(run / "export").sample(
        SMOKE_COUNT, stream="evaluate", steps=3, force=True, batch_size=500
    )
    real, extractor = ImageFolder(str(photos["b"])), load_digits64()
    reference = Reference(real.images, real.labels, extractor)
    labels = torch.arange(SMOKE_COUNT) % 10
    assert measure(images, labels, reference, extractor)["fd"] == found["rows"][0]["fd"]


def test_guidance_is_recorded_and_counts_double(run, photos, evaluate, verb):
    options = (f"reference={photos['b']}", "count=20", "straightness=null", "steps=2")
    found, _ = evaluate(f"model={run / 'teacher'}", *options, "guidance_scale=2")
    plain, _ = evaluate(f"model={run / 'teacher'}", *options, out="plain")
    assert (found["rows"][0]["guidance_scale"], found["rows"][0]["nfe"]) == (2.0, 4)
    assert (plain["rows"][0]["guidance_scale"], plain["rows"][0]["nfe"]) == (1.0, 2)
    assert found["rows"][0]["fd"] != plain["rows"][0]["fd"]
    _, message = verb("evaluate", f"model={run / 'export'}", "reference=digits", "guidance_scale=2", "out=no")
    assert "guidance_scale: found 2, but this model was not trained with a null condition" in message
    _, message = verb("evaluate", f"model={run / 'export'}", "reference=digits", "noise_scale=0.8", "out=no")
    assert "noise_scale: found 0.8, but this model's sampler draws no fresh noise between steps" in message


def test_default_steps_seed_and_name(run, photos, evaluate):
    options = (f"model={run / 'teacher'}", f"reference={photos['b']}", "count=20", "straightness=null")
    found, _ = evaluate(*options, "name=mine", "seed=1")
    other, _ = evaluate(*options, "steps=1", out="other")
    spec = distill.load(run / "teacher").spec
    assert spec.any_steps
    assert [row["steps"] for row in found["rows"]] == [
        spec.steps,
        *(n for n in (8, 4, 2, 1) if n < spec.steps),
    ]
    assert {row["model"] for row in found["rows"]} == {"mine"}
    assert found["protocol"]["seed"] == found["seed"] == 1
    assert found["protocol"]["straightness_steps"] is None
    assert found["rows"][-1]["fd"] != other["rows"][-1]["fd"]


def test_features_are_a_group(photos, verb):
    options = sorted(path.stem for path in (ROOT / "configs" / "features").glob("*.yaml"))
    printed, message = verb("evaluate", "--help")
    assert message in ("", "0")
    assert f"features={' | '.join(sorted(options, key=printed.index))}" in printed
    for key in ("model=runs/instaflow/export reference=digits", "resolution", "count: null"):
        assert key in printed
    _, message = verb("evaluate", f"model={photos['a']}", "reference=digits", "features=digits65")
    assert "features: found 'digits65', did you mean digits64?; expected clip, digits64" in message
    _, message = verb(
        "evaluate", f"model={photos['a']}", "reference=digits", "features=clip", "features.path=gone"
    )
    assert message.startswith("error: features: ")
    assert "\n" not in message


def test_paths_may_hold_anything_that_hydra_reads_otherwise(photos, evaluate, tmp_path):
    odd = tmp_path / "it's, (all) mine"
    shutil.copytree(photos["a"], odd)
    found, _ = evaluate(f"model={odd}", f"reference={photos['b']}")
    assert found["rows"][0]["model"] == odd.name
    assert arguments(["-m", "steps=1,2", "model=2024"]) == ["steps=1,2", "model='2024'", "-m"]
    assert arguments(["steps=1,2", "model=2024", "count=3"]) == ["steps=[1,2]", "model='2024'", "count=3"]


def test_where_results_go(run, photos, evaluate, verb, tmp_path):
    a, b = f"model={photos['a']}", f"reference={photos['b']}"
    first, _ = evaluate(a, b)
    again, _ = evaluate(a, b)  # the same evaluation may be made again
    assert first == again
    (tmp_path / "moved").symlink_to(photos["a"])
    moved, _ = evaluate("model=moved", b, "name=a")  # the same images under another path
    assert moved["digest"] == first["digest"]
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "evaluation").iterdir())
    _, message = verb("evaluate", a, "reference=digits")
    assert "out: evaluation holds an evaluation of something else" in message
    export = tmp_path / "export"
    shutil.copytree(run / "export", export)
    _, message = verb("evaluate", a, b, f"out={export}")
    assert f"out: {export} contains README.md, which is not from an evaluation" in message
    (tmp_path / "file").write_text("")
    _, message = verb("evaluate", a, b, "out=file")
    assert "out: file is a file, expected a folder" in message
    for inside in (photos["a"], photos["b"] / "new"):
        _, message = verb("evaluate", a, b, f"out={inside}")
        assert "whose images are read; expected another folder" in message
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "evaluation").iterdir()) == before
    evaluate(f"model={export}", b, "count=20", out="export/evaluation")


def test_the_default_place_is_not_inside_a_model(run, photos, tmp_path):
    """Not even where one stands in it. (A process of its own: what a shell sees of a refusal.)"""
    export = tmp_path / "export"
    shutil.copytree(run / "export", export)
    refused = run_verb(export, "evaluate", "model=.", f"reference={photos['b']}", check=False)
    assert refused.returncode == 1
    assert (
        refused.stderr
        == "error: out: the default, evaluation, would lie in ., which is measured; give out=FOLDER\n"
    )
    assert not (export / "evaluation").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["reference=digits"], "model: missing; expected a model folder or a folder of images"),
        (["model={a}"], "reference: missing; expected a data set or a folder of images"),
        (["model=gone", "reference=digits"], "model: gone: no such folder"),
        (
            ["model={a}", "reference=digit"],
            "reference: found 'digit', expected a folder of images or one of the data sets digits,",
        ),
        (["model={a}", "reference=digit"], "did you mean digits?"),
        (["model={a}", "reference=folder"], "reference: data=folder needs more than its name"),
        (["model={a}", "reference=digits", "cuont=3"], "cuont: no such key, did you mean count?"),
        (["model={a}", "reference=digits", "count=59"], "count: found 59, but {a} holds 60 images"),
        (["model={a}", "reference=digits", "count=many"], "count: found 'many', expected int or null"),
        (["model={a}", "reference=digits", "steps=1"], "steps: found 1, but {a} is a folder of images"),
        (
            ["model={a}", "reference=digits", "guidance_scale=2"],
            "guidance_scale: found 2, but {a} is a folder",
        ),
        (
            ["model={run}/export", "reference=digits", "steps=0"],
            "steps: found 0, expected counts of at least 1",
        ),
        (
            ["model={run}/export", "reference=digits", "steps=one"],
            "steps: found 'one', expected",
        ),
        (
            ["model={run}/export", "reference=digits", "steps=[]"],
            "steps: found [], expected counts of at least 1",
        ),
        (
            ["model={run}/export", "reference=digits", "count=3"],
            "count: expected at least k + 2 = 7 samples, found 3",
        ),
        (
            ["model={run}/export", "reference=digits", "batch_size=0"],
            "batch_size: found 0, expected at least 1",
        ),
        (
            ["model={run}/export", "reference=digits", "device=tpu"],
            "device: found 'tpu', expected one of auto, cpu",
        ),
        (
            ["model={run}/export", "reference=digits", "resolution=4"],
            "resolution: found 4, but digits is no folder",
        ),
        (
            ["model={run}/export", "reference={large}"],
            "has images of [1, 16, 16], but those to measure are [1, 8, 8]",
        ),
        (["model={run}", "reference=digits"], "a run or a stage, not a model; did you mean {run}/export?"),
        (["model={run}/pairs", "reference=digits"], "a run or a stage, not a model; expected a model folder"),
        (["model={run}/teacher/checkpoints", "reference=digits"], "neither model.json nor images in it"),
    ],
)
def test_refusals(run, photos, verb, tmp_path, given, expected):
    places = {"run": run, **photos}
    _, message = verb("evaluate", *(word.format(**places) for word in given))
    assert message.startswith("error: ")
    assert expected.format(**places) in message
    assert "\n" not in message
    assert not (tmp_path / "evaluation").exists()


def test_folders_that_cannot_be_compared_are_refused(photos, verb, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(photos["a"], odd)
    (odd / "3").rename(odd / "three")
    _, message = verb("evaluate", f"model={odd}", f"reference={photos['b']}")
    assert "has the classes (sub-folders) 0, 1, 2, 4" in message
    assert "but those of the reference are 0, 1, 2, 3, 4" in message
    shutil.rmtree(odd / "three")
    _, message = verb("evaluate", f"model={odd}", "reference=digits")
    assert "but those of the reference are 10 of them" in message
    (odd / "0" / "broken.png").write_bytes(b"no image")
    _, message = verb("evaluate", f"model={odd}", "reference=digits")
    assert "broken.png: cannot be read as an image" in message
    assert "\n" not in message


def test_a_users_own_data_set_is_a_reference(photos, verb, tmp_path):
    (tmp_path / "conf" / "data").mkdir(parents=True)
    text = f"_target_: distill.data.folder.ImageFolder\npath: {photos['b']}\n"
    (tmp_path / "conf" / "data" / "mine.yaml").write_text(text)
    printed, message = verb("evaluate", "--config-dir", "conf", f"model={photos['a']}", "reference=mine")
    assert message == ""
    assert "(b, all images" in printed


@pytest.mark.slow
def test_a_run_trains_on_a_folder(photos, tmp_path):
    """data=folder is a data set like any other, from the teacher to the evaluation."""
    run_verb(
        tmp_path,
        "train",
        "recipe=instaflow",
        "profile=smoke",
        "name=mine",
        "data=folder",
        f"data.path={photos['a']}",
    )
    metrics = json.loads((tmp_path / "runs/mine/metrics.json").read_text())
    assert metrics["protocol"]["reference"] == "a, all images"
    assert metrics["protocol"]["reference_digest"] == ImageFolder(str(photos["a"])).fingerprint()


def test_a_run_on_a_folder_is_planned_and_needs_its_path(photos, verb):
    given = ("train", "recipe=instaflow", "profile=smoke", "data=folder", "plan=true")
    printed, message = verb(*given, f"data.path={photos['a']}")
    assert message == ""
    assert "runs/instaflow-smoke: 7 stages" in printed
    _, message = verb(*given, f"data.path={photos['a']}/gone")
    assert "gone: no such folder" in message
    _, message = verb(*given)
    assert "data.path" in message


def test_compare_puts_a_run_and_evaluations_into_one_table(run, evaluate, verb, tmp_path):
    options = ("reference=digits", f"count={SMOKE_COUNT}")
    evaluate(f"model={run / 'reflow'}", *options, "steps=1,2", out="again")
    printed, message = verb("compare", run, "again", "out=both")
    assert message == ""
    lines = printed.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("again ")] == [
        ["again", "reflow", "1"],
        ["again", "reflow", "2"],
    ]
    assert (
        len([line for line in lines if line.startswith("run ")]) == 1 + 10
    )  # the head, and all rows of the run
    # A smoke run is limited by its profile, and whoever reads the page is told.
    page = (tmp_path / "both" / "comparison.md").read_text()
    assert "- **run: The sizes of this run were limited by a profile" in page
    assert f"{SMOKE_COUNT} class-balanced samples" in page
    with Image.open(tmp_path / "both" / "comparison.png") as picture:
        assert picture.format == "PNG"
    evaluate(f"model={run / 'reflow'}", "reference=digits", "count=15", "steps=1", out="fewer")
    _, message = verb("compare", run, "again", "fewer", "out=none")
    assert "the protocols differ" in message
    assert f"count: {SMOKE_COUNT} in run, again; 15 in fewer" in message
    assert not (tmp_path / "none").exists()


def test_both_from_the_command_line(run, photos, tmp_path):
    """Step counts as a list with commas, which Hydra alone would take for a sweep."""
    options = (f"reference={photos['b']}", "count=20", "steps=1,2", "out=here")
    done = run_verb(tmp_path, "evaluate", f"model={run / 'teacher'}", *options)
    assert "here/metrics.json" in done.stdout
    assert "Protocol: " in done.stdout
    compared = run_verb(tmp_path, "compare", "here", "metric=recall")
    assert "comparison/comparison.md, comparison/comparison.png" in compared.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["comparison", "here"]
