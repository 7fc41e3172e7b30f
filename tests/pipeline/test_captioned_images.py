"""Recipes on images with captions and a Stable Diffusion folder: captions and images are encoded by stages of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import teacher_support
import torch
from PIL import Image
from safetensors.torch import load_file
from shard_support import picture, write_shards
from tests_support import call_verb, refusal, run_verb

import distill
from distill.cache.latent_files import LatentFiles
from distill.data.webdataset import Shards
from distill.models.native import load_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline `sd`, and shards of 16 pixels."""
    folder = tmp_path_factory.mktemp("captioned")
    teacher_support.sd(folder / "sd")
    write_shards(folder / "shards", [5, 4, 3], size=20)
    return folder


def options(folder: Path, recipe: str, *more: str) -> list[str]:
    return [
        *(f"recipe={recipe}", "profile=smoke", "teacher=sd", f"teacher.path={folder / 'sd'}", "eval=prompts"),
        *("data=webdataset", f"data.shards='{folder / 'shards'}/s-{{000..002}}.tar'", "data.caption=txt"),
        *("eval.models.teacher.steps=[50,1]", "stages.distill.steps=2", "stages.distill.batch_size=4"),
        *("eval.count=4", "eval.batch_size=4", "stages.distill.monitor=null"),
        *more,
    ]


@pytest.mark.slow
def test_latent_consistency_on_shards(made: Path, tmp_path: Path) -> None:
    """The recipe encodes captions and images, trains on the latents of the real images, and exports."""
    run_verb(tmp_path, "train", *options(made, "lcm", "name=lcm", "data.encode.latents.batch_size=5"))
    run = tmp_path / "runs" / "lcm"
    assert not (run / "samples").exists()
    assert not list((run / "latents").glob("latents-*.json"))
    data = LatentFiles(run / "latents")
    assert (len(data), data.sample_shape) == (12, (4, 8, 8))
    assert load_file(run / "latents" / "latents-00000.safetensors")["x0"].dtype == torch.bfloat16
    # Sample i is image i, resized to what the latents decode to, with caption i.
    teacher = load_model(run / "teacher").denoiser
    images = Shards(f"{made / 'shards'}/s-{{000..002}}.tar", resolution=16)
    rows = torch.tensor([11, 0, 4])
    batch = data.fetch(rows, torch.arange(3))
    wanted = teacher.decoder.encode(images.fetch(rows, rows).x0)
    torch.testing.assert_close(batch.x0, wanted.bfloat16().float())
    table = json.loads((run / "prompts" / "prompts.json").read_text())
    assert table["prompts"] == [f"picture {i}" for i in range(12)]
    context = load_file(run / "prompts" / "prompts.safetensors")["values.context"]
    assert torch.equal(batch.cond.get("context"), context[rows])
    student = distill.load(run / "export")
    assert student.sample(1, prompt="picture 3").shape == (1, 3, 16, 16)
    # The same command finishes at once; shards elsewhere with the same content are the same data.
    shutil.copytree(made / "shards", tmp_path / "moved" / "shards")
    shutil.copytree(made / "sd", tmp_path / "moved" / "sd")
    again = [part.replace(str(made), str(tmp_path / "moved")) for part in options(made, "lcm", "name=lcm")]
    again.append("data.encode.latents.batch_size=5")
    again[again.index(f"teacher.path={tmp_path / 'moved' / 'sd'}")] = f"teacher.path={made / 'sd'}"
    out = call_verb(tmp_path, "train", *again, check=True)
    assert (out.stdout + out.stderr).count("already finished, skipped") == 6, out.stdout + out.stderr


@pytest.mark.slow
def test_score_distillation_reads_captions_alone(made: Path, tmp_path: Path) -> None:
    run_verb(tmp_path, "train", *options(made, "sid", "name=sid"))
    run = tmp_path / "runs" / "sid"
    assert (run / "prompts").is_dir()
    assert not (run / "latents").exists()
    assert distill.load(run / "export").sample(1).shape == (1, 3, 16, 16)


def test_folders_with_captions(made: Path, tmp_path: Path) -> None:
    """Plans of them; what cannot be encoded is refused before anything runs."""
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    lines = []
    for i in range(3):
        Image.fromarray(picture(i, 16)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"a/{i}.png", "text": f"number {i}"}))
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(lines))
    given = [part for part in options(made, "lcm", "name=plan") if not part.startswith("data")]
    given += ["data=image_folder", f"data.path={tmp_path / 'images'}"]
    out = call_verb(tmp_path, "train", *given, "data.caption=text", "plan=true", check=True)
    assert "latents" in out.stdout
    text = "data.caption=text"
    for more, words in (
        (
            [text, "data.resolution=32"],
            "data.resolution: found 32, but the latents of 'teacher' decode to 16x16",
        ),
        (
            [text, "data.encode.latents.posterior=max"],
            "posterior: found 'max' (data.encode.latents.posterior)",
        ),
        ([text, "data.encode.latents.dtype=int8"], "dtype: found 'int8' (data.encode.latents.dtype)"),
        ([text, "+data.encode.latent=1"], "data.encode.latent: "),
        (["data.caption=title"], "line 1: title: found None, expected a caption"),
        ([], "prompts: missing; "),
    ):
        assert words in refusal(tmp_path, "train", *given, *more), more
    bare = ["recipe=sid", "data=image_folder", f"data.path={tmp_path / 'images'}", "data.caption=text"]
    assert "no stage loads a pipeline with a text encoder" in refusal(tmp_path, "train", *bare, "name=bare")


def test_grey_images_are_refused(made: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "black"}')
    given = [part for part in options(made, "lcm", "name=grey") if not part.startswith("data")]
    given += ["data=folder", f"data.path={tmp_path}", "data.caption=text"]
    assert "data.channels: found images of 1 channels, expected 3" in refusal(tmp_path, "train", *given)


def test_classes_on_the_latents_of_a_transformer(made: Path, tmp_path: Path) -> None:
    """DiT, whose images have classes: no prompts, the stage of latents alone."""
    teacher_support.dit(tmp_path / "dit")
    given = [part for part in options(made, "sid", "name=dit") if not part.startswith("data.caption")]
    given = [
        part.replace("teacher=sd", "teacher=dit") for part in given if not part.startswith("teacher.path")
    ]
    given += [f"teacher.path={tmp_path / 'dit'}", "data.label=cls", "data.num_classes=10"]
    given += ["stages.distill.method.sampling.levels=[2.5]"]
    out = call_verb(tmp_path, "train", *given, "plan=true", check=True)
    assert "latents" in out.stdout
    assert "prompts" not in out.stdout
    none = [part for part in given if not part.startswith(("data.label", "data.num"))]
    assert "data.label: found no classes, but 'teacher' has 10 classes" in refusal(tmp_path, "train", *none)


@pytest.mark.slow
def test_a_recipe_on_the_pixels_of_shards(tmp_path: Path) -> None:
    """Teacher, student, monitor and evaluation on grey images with classes, with two workers."""
    pattern = write_shards(tmp_path / "grey", [30, 20, 30], channels=1)
    data = (
        "data=webdataset",
        f"data.shards='{pattern}'",
        "data.label=cls",
        "data.num_classes=10",
        "data.channels=1",
    )
    short = ("profile=smoke", "profile.steps=8", "name=pixels", "trainer.workers=2")
    run_verb(tmp_path, "train", "recipe=sid", *data, *short)
    run = tmp_path / "runs" / "pixels"
    facts = [
        json.loads((run / stage / "artifact.json").read_text())["facts"] for stage in ("teacher", "distill")
    ]
    assert [each["replaced"] for each in facts] == [0, 0]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["protocol"]["reference_count"] == 80
    assert metrics["protocol"]["reference"] == "webdataset, all images"
    assert all(row["fd"] > 0 for row in metrics["rows"])
    assert not (run / "latents").exists()
