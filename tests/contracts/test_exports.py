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
from distill.exporters import schedulers
from distill.exporters.export import Options, check, export
from distill.exporters.lora import KOHYA, PEFT
from distill.files import sha256_file
from distill.models.adapters import trained_parameters
from distill.models.boundary import Boundary
from distill.models.denoiser import Denoiser
from distill.models.families import family_of
from distill.models.native import load_model, save_model
from distill.models.pretrained import Folder
from distill.models.prompts import Prompts, TextEncoders, write_table
from distill.models.spec import SamplerSpec
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.process.vp import VPScaledLinear
from distill.stages.adapt import adapted

PROMPTS = ["a dog", "a cat on a table"]
LORA = {"lora": {"rank": 2, "alpha": 3.0}}
ONE = SamplerSpec(steps=1, times={1: (999.0, 0.0)}, mode="sde")


def made(folder: Path, name: str, variant: str | None = None, dtype: str = "float32") -> Path:
    """A folder with a family's pipeline, its prompts and its model folder `teacher`."""
    if variant is None:
        teacher_support.MAKERS[name](folder / name)
    found = Folder(folder / name, variant)
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
    loaded = family.load(found, conditions, dtype=dtype, **options)
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
    with pytest.raises(
        ValueError, match=r"pipeline: .*sdxl/unet/config.json: \w+: found .*, but the model has"
    ):
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


LEVEL = float(VPScaledLinear().sigma(torch.tensor(625.5, dtype=torch.float64)))
SDE: dict[str, Any] = {"mode": "sde"}
TIMES4 = {4: (999.0, 749.0, 499.0, 249.0, 0.0)}
LCM4 = {4: (999.0, 759.0, 499.0, 259.0, 0.0)}
ODD = {3: (999.0, 700.0, 320.0, 0.0)}
RAW = {"process": "flow", "start": "raw"}
FLOW = {"process": "flow", "start": "converted"}
W = {"guidance_w": 3.0, "guidance_w_range": (0.0, 8.0)}
# family, changes, meaning, sampler -> scheduler (None: pipeline.py); each measures a line of exporters.schedulers.TABLE
STUDENTS: list[tuple[str, Any, dict[str, Any], SamplerSpec, str | None]] = [
    ("sd", None, {}, SamplerSpec(steps=1, times={1: (999.0, 0.0)}, **SDE), "DDIMScheduler"),
    ("sd", {}, {}, SamplerSpec(steps=4, times=TIMES4, solver="ddim", guidance_scale=3.0), "DDIMScheduler"),
    ("sd", {}, {"guidable": False}, SamplerSpec(steps=3, times=ODD, solver="ddim"), "EulerDiscreteScheduler"),
    (
        "sd",
        None,
        {},
        SamplerSpec(steps=1, times={1: (625.5, 0.0)}, start_scale=LEVEL, **SDE),
        "EulerDiscreteScheduler",
    ),
    ("sdxl", None, {}, SamplerSpec(steps=1, times={1: (625.0, 0.0)}, **SDE), "EulerDiscreteScheduler"),
    ("sdxl", {}, {}, SamplerSpec(steps=3, times=ODD, **SDE), "LCMScheduler"),
    ("sd", None, {"boundary": Boundary("lcm")}, SamplerSpec(steps=4, times=LCM4, **SDE), "LCMScheduler"),
    (
        "sd",
        {"net": {"guidance_embedding": 8}},
        {"boundary": Boundary("lcm")},
        SamplerSpec(steps=4, times=LCM4, **SDE, **W),
        "LCMScheduler",
    ),
    ("sd", FLOW, {}, SamplerSpec(steps=1, times={1: (1.0, 0.0)}), "DDIMScheduler"),
    ("sd", LORA | RAW, {}, SamplerSpec(steps=1, times={1: (1.0, 0.0)}), "UniPCMultistepScheduler"),
    (
        "sd3",
        None,
        {},
        SamplerSpec(steps=2, times={2: (1.0, 0.6, 0.0)}, guidance_scale=3.0),
        "FlowMatchEulerDiscreteScheduler",
    ),
    ("sd3", {}, {}, SamplerSpec(steps=2, times={2: (1.0, 0.6, 0.0)}, **SDE), "FlowMatchLCMScheduler"),
    ("flux", {}, {}, SamplerSpec(steps=2, times={2: (1.0, 0.6, 0.0)}, **SDE), "FlowMatchLCMScheduler"),
    (
        "dit",
        {},
        {},
        SamplerSpec(steps=2, times={2: (999.0, 499.0, 0.0)}, solver="ddim"),
        "DDIMScheduler",
    ),
    ("ddpm", {}, {}, SamplerSpec(steps=1, times={1: (999.0, 0.0)}, **SDE), "DDIMScheduler"),
    ("pixart", None, {}, SamplerSpec(steps=2, times={2: (999.0, 499.0, 0.0)}, **SDE), "LCMScheduler"),
    ("sd", FLOW, {}, SamplerSpec(steps=3, any_steps=True), None),
    ("sd", RAW, {}, SamplerSpec(steps=3, any_steps=True, solver="heun"), None),
    ("flux", {}, {}, SamplerSpec(steps=3, any_steps=True, solver="heun"), None),
    (
        "sd",
        {},
        {"boundary": Boundary("cm", sigma_data=2.0)},
        SamplerSpec(steps=3, times=ODD, noise_floor=0.1, **SDE),
        None,
    ),
]


@pytest.mark.parametrize(("name", "changes", "meaning", "spec", "scheduler"), STUDENTS)
def test_a_folder_makes_the_same_images_in_diffusers(
    of: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    changes: Any,
    meaning: Any,
    spec: SamplerSpec,
    scheduler: str | None,
) -> None:
    folder = of(name)
    source = student(folder, tmp_path / "student", spec, changes, **meaning)
    (tmp_path / "out").mkdir()
    options = Options("diffusers", pipeline=str(folder / name))
    found = export(source, tmp_path / "out", options, "any")
    assert found.facts["scheduler"] == scheduler
    assert found.facts["differences"]["images"] <= 2e-5
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    teacher = json.loads((folder / name / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == (scheduler or teacher["_class_name"])
    assert (tmp_path / "out" / "pipeline.py").exists() == (scheduler is None)


def test_the_type_and_the_variant_of_the_weights_are_kept(tmp_path: Path) -> None:
    pipeline = teacher_support.sd(tmp_path / "sd")
    pipeline.to(torch.bfloat16)
    for file in (tmp_path / "sd").rglob("*.safetensors"):
        file.unlink()
    pipeline.save_pretrained(tmp_path / "sd", variant="fp16")
    (tmp_path / "sd" / "vae" / "notes.bin").write_text("not copied")
    made(tmp_path, "sd", variant="fp16", dtype="bfloat16")
    source = student(tmp_path, tmp_path / "student", ONE)
    (tmp_path / "out").mkdir()
    found = export(source, tmp_path / "out", Options("diffusers"), "sid")
    assert found.facts["differences"]["images"] <= 2e-5
    files = {
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*") if path.is_file()
    }
    assert {name for name in files if "safetensors" in name} == {
        *("unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"),
        "text_encoder/model.fp16.safetensors",
    }
    assert not [name for name in files if name.endswith(".bin")]
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    wanted = {
        name: (tmp_path / "sd" / "vae" / name).read_bytes()
        for name in ("diffusion_pytorch_model.fp16.safetensors",)
    }
    assert all((tmp_path / "out" / "vae" / name).read_bytes() == content for name, content in wanted.items())
    (tmp_path / "lora").mkdir()
    assert (
        max(export(source, tmp_path / "lora", Options("lora"), "sid").facts["differences"].values()) <= 1e-6
    )


def test_a_scheduler_that_samples_otherwise_fails(
    of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = schedulers.Stock("DDIMScheduler", {"clip_sample": False}, {"num_inference_steps": 3})
    monkeypatch.setattr(schedulers, "stock_scheduler", lambda generator, arguments: wrong)
    source = student(of("sd"), tmp_path / "student", SamplerSpec(steps=3, times=ODD, solver="ddim"))
    (tmp_path / "out").mkdir()
    with pytest.raises(
        RuntimeError, match=r"images of diffusers with DDIMScheduler differ by .* expected at most 0.001"
    ):
        export(source, tmp_path / "out", Options("diffusers"), "progressive")


def test_what_has_no_folder_of_diffusers_is_refused(of: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    net = Denoiser(UNet(width=8, embedding=16, groups=4), Flow(), "velocity", (1, 8, 8))
    save_model(tmp_path / "house", net, SamplerSpec(steps=1, any_steps=True))
    with pytest.raises(
        ValueError, match="format: found 'diffusers', but the model's net is one of this package"
    ):
        export(tmp_path / "house", tmp_path / "out", Options("diffusers"), "reflow")
    with pytest.raises(ValueError, match="pipeline: missing; expected the folder of the pipeline"):
        export(of("ddpm") / "teacher", tmp_path / "out", Options("diffusers"), "sid")
    source = student(of("sd"), tmp_path / "student", SamplerSpec(steps=2, any_steps=True, solver="rk45"), {})
    with pytest.raises(ValueError, match="sampler: found the solver rk45"):
        export(source, tmp_path / "out", Options("diffusers"), "sid")
