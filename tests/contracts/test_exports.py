"""Exports of students of diffusers pipelines: what plain diffusers makes of them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import teacher_support
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from distill import export as verb
from distill.exporters.export import Options, check, export
from distill.exporters.lora import KOHYA, PEFT
from distill.files import sha256_file
from distill.models.adapters import trained_parameters
from distill.models.denoiser import Denoiser
from distill.models.families import family_of
from distill.models.native import load_model, save_model
from distill.models.pretrained import Folder
from distill.models.prompts import Prompts, TextEncoders, write_table
from distill.models.spec import SamplerSpec
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.stages.adapt import adapted

PROMPTS = ["a dog", "a cat on a table"]
LORA = {"lora": {"rank": 2, "alpha": 3.0}}
ONE = SamplerSpec(steps=1, times={1: (999.0, 0.0)}, mode="sde")


def made(folder: Path, name: str) -> Path:
    """A folder with a family's pipeline, its prompts and its model folder `teacher`."""
    teacher_support.MAKERS[name](folder / name)
    found = Folder(folder / name)
    _, family = family_of(found)
    conditions = family.conditions(found)
    options: dict[str, Any] = {"resolution": 16} if name == "flux" else {}
    if conditions is None:
        source = TextEncoders.of(found)
        write_table(
            folder / "prompts",
            PROMPTS,
            source,
            source.encode(PROMPTS),
            family.shape(found, options.get("resolution")),
        )
        conditions = Prompts.of_folder(folder / "prompts")
    loaded = family.load(found, conditions, **options)
    save_model(folder / "teacher", loaded.denoiser, loaded.spec)
    return folder


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in folders:
            folders[name] = made(tmp_path_factory.mktemp(name), name)
        return folders[name]

    return find


def student(teacher: Path, folder: Path, spec: SamplerSpec, changes: Any = None, **meaning: Any) -> Path:
    """A model folder of a student of a teacher with random weights of its own, an adapter by default."""
    model: Denoiser = adapted(load_model(teacher / "teacher").denoiser, LORA if changes is None else changes)
    model = model.with_(**meaning) if meaning else model
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained_parameters(model.net).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_model(folder, model, spec)
    return folder


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart"])
def test_an_adapter_is_the_same_in_diffusers(of: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = of(name)
    start = 1.0 if name == "sd3" else 999.0
    spec = SamplerSpec(steps=1, times={1: (start, 0.0)}, guidance_baked=3.0)
    source = student(folder, tmp_path / "student", spec)
    (tmp_path / "out").mkdir()
    found = export(source, tmp_path / "out", Options("lora"), "sid")
    unet = name in ("sd", "sdxl")
    assert set(found.facts["differences"]) == ({PEFT, KOHYA} if unet else {PEFT})
    assert max(found.facts["differences"].values()) <= 1e-6
    prefix = "unet." if unet else "transformer."
    assert all(key.startswith(prefix) for key in load_file(tmp_path / "out" / PEFT))
    if unet:
        assert {key.rpartition(".")[2] for key in load_file(tmp_path / "out" / KOHYA)} == {"weight", "alpha"}


def test_an_adapter_of_another_base_is_refused(of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = of("sd")
    source = student(folder, tmp_path / "student", ONE)
    (tmp_path / "out").mkdir()
    teacher_support.sd(tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match=r"pipeline: .*other/unet: .*differs from the adapter's base"):
        export(source, tmp_path / "out", Options("lora", pipeline=str(tmp_path / "other")), "sid")
    with pytest.raises(ValueError, match=r"pipeline: .*sdxl/unet/config.json: describes another network"):
        export(source, tmp_path / "out", Options("lora", pipeline=str(of("sdxl") / "sdxl")), "sid")
    with pytest.raises(FileNotFoundError, match="pipeline: gone: no such folder"):
        export(source, tmp_path / "out", Options("lora", pipeline="gone"), "sid")
    assert not list((tmp_path / "out").iterdir())


def test_a_file_that_makes_other_outputs_is_refused(
    of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.exporters import lora

    def without_alpha(path: Path, *arguments: Any) -> None:
        write(path, *arguments)
        save_file(load_file(path), path)  # the header is gone

    write = lora.write_peft
    monkeypatch.setattr(lora, "write_peft", without_alpha)
    source = student(of("sd"), tmp_path / "student", ONE)
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError, match=f"{PEFT}: the outputs of a fresh base with this file differ by"):
        export(source, tmp_path / "out", Options("lora"), "sid")


def test_a_merged_adapter_samples_the_same(of: Callable[[str], Path], tmp_path: Path) -> None:
    source = student(of("sd"), tmp_path / "student", ONE)
    (tmp_path / "out").mkdir()
    export(source, tmp_path / "out", Options(merged=True), "sid")
    made, wanted = (load_model(each).sample(2) for each in (tmp_path / "out", source))
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=0)
    assert "base" not in json.loads((tmp_path / "out" / "model.json").read_text())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "onnx"}, "format: found 'onnx', expected one of native"),
        ({"format": "lora", "merged": True}, "merged: found true, but format=lora writes the adapter"),
        ({"format": "lora"}, "format: found 'lora', but the model has no adapter"),
        ({"merged": True}, "merged: found true, but the model has no adapter"),
    ],
)
def test_options_that_do_nothing_are_refused(
    of: Callable[[str], Path], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        check(load_model(of("sd") / "teacher"), Options(**options))


def test_the_verb_writes_a_new_folder_or_none(
    of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = student(of("sd"), tmp_path / "student", ONE)

    def call(*arguments: str) -> None:
        monkeypatch.setattr("sys.argv", ["distill.export", *arguments])
        verb.main()

    call(f"model={source}", f"out={tmp_path / 'out'}", "format=lora")
    printed = capsys.readouterr().out
    assert f"{PEFT}: differs by 0 from the model" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {PEFT, KOHYA, "README.md"}
    for arguments, words in (
        ((f"model={source}", f"out={tmp_path / 'out'}"), "out: .* exists; expected a new folder"),
        (
            (f"model={source}", f"out={tmp_path / 'new'}", "pipeline=gone", "format=lora"),
            "pipeline: gone: no such folder",
        ),
        ((f"out={tmp_path / 'new'}",), "model: missing"),
        ((f"model={source}",), "out: missing"),
    ):
        with pytest.raises(SystemExit, match=words):
            call(*arguments)
    assert not list(tmp_path.glob("*new*")) + list(tmp_path.glob(".*"))


def test_a_net_of_the_package_is_loaded_by_peft(tmp_path: Path) -> None:
    net = UNet(width=8, embedding=16, groups=4, num_classes=3)
    teacher = Denoiser(net, Flow(), "velocity", (1, 8, 8), guidable=True)
    save_model(tmp_path / "teacher", teacher, SamplerSpec(steps=2, any_steps=True))
    source = student(tmp_path, tmp_path / "student", SamplerSpec(steps=2, any_steps=True))
    (tmp_path / "out").mkdir()
    found = export(source, tmp_path / "out", Options("lora"), "reflow")
    assert found.facts["differences"] == {PEFT: 0.0}
    with safe_open(tmp_path / "out" / PEFT, framework="pt") as file:
        facts = json.loads(file.metadata()["distill"])
    assert (facts["recipe"], facts["steps"], facts["times"]) == ("reflow", 2, [1.0, 0.5, 0.0])
    assert facts["base_sha256"] == sha256_file(tmp_path / "teacher" / "model.safetensors")
    with pytest.raises(ValueError, match="format: found 'lora', but the model has no adapter"):
        export(tmp_path / "teacher", tmp_path / "out", Options("lora"), "reflow")
