"""Exports of students of diffusers pipelines: what plain diffusers makes of them, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import teacher_support
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill import export as verb
from distill.exporters import comfyui, hub, schedulers
from distill.exporters.export import Options, check, export
from distill.exporters.lora import KOHYA, PEFT
from distill.files import sha256_file
from distill.models.adapters import trained_parameters
from distill.models.boundary import Boundary
from distill.models.denoiser import Denoiser
from distill.models.families import family_of
from distill.models.generator import Generator
from distill.models.lora_files import network_in
from distill.models.native import load_model, save_model
from distill.models.pretrained import Folder
from distill.models.prompts import Prompts, TextEncoders, write_table
from distill.models.spec import SamplerSpec
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.process.vp import VPScaledLinear
from distill.stages.adapt import adapted
from distill.stages.export import Export

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


@pytest.mark.parametrize(
    "name", ["sd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "sd3", "pixart"))]
)
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
        ({"format": "onnx"}, "format: found 'onnx', expected one of native, diffusers, lora, comfyui"),
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
LEVEL_625 = float(VPScaledLinear().sigma(torch.tensor(625.0, dtype=torch.float64)))
SDE: dict[str, Any] = {"mode": "sde"}
TIMES4 = {4: (999.0, 749.0, 499.0, 249.0, 0.0)}
LCM4 = {4: (999.0, 759.0, 499.0, 259.0, 0.0)}
ODD = {3: (999.0, 700.0, 320.0, 0.0)}
RAW = {"process": "flow", "start": "raw"}
FLOW = {"process": "flow", "start": "converted"}
W = {"guidance_w": 3.0, "guidance_w_range": (0.0, 8.0)}
# family, changes, meaning, sampler -> scheduler (None: pipeline.py); they measure the lines of exporters.schedulers.TABLE, by
# default one of each
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


DEFAULT = (0, 4, 7, 8, 9, 10, 12, 17)


def slow(cases: Sequence[tuple[Any, ...]], default: Collection[int]) -> list[Any]:
    """The cases; those that are not among the numbers `default` are slow tests."""
    return [
        pytest.param(*case, marks=() if i in default else pytest.mark.slow) for i, case in enumerate(cases)
    ]


@pytest.mark.parametrize(("name", "changes", "meaning", "spec", "scheduler"), slow(STUDENTS, DEFAULT))
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
    # The stage knows them as its own, as a whole and by component.
    assert all(any(re.fullmatch(pattern, name) for pattern in Export.made()) for name in files)
    assert all(re.compile(part) for pattern in Export.made() for part in pattern.split("/"))
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    wanted = {
        name: (tmp_path / "sd" / "vae" / name).read_bytes()
        for name in ("diffusion_pytorch_model.fp16.safetensors",)
    }
    assert all((tmp_path / "out" / "vae" / name).read_bytes() == content for name, content in wanted.items())
    (tmp_path / "half").mkdir()
    halves = Options("diffusers", export_dtype="float16", file_bytes=5_000)
    assert export(source, tmp_path / "half", halves, "sid").facts["differences"]["images"] <= 1e-3
    parts = list((tmp_path / "half" / "unet").glob("*.safetensors"))
    assert len(parts) > 1, "with an index, which diffusers reads"
    assert {tensor.dtype for part in parts for tensor in load_file(part).values()} == {torch.float16}
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


# Inputs of nodes of ComfyUI's core -> types, and the types that they return; of its nodes.py and comfy_extras.
CLIP_SIZES = dict.fromkeys(("width", "height", "crop_w", "crop_h", "target_width", "target_height"), int)
NODES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({"ckpt_name": str}, ("MODEL", "CLIP", "VAE")),
    "UNETLoader": ({"unet_name": str, "weight_dtype": str}, ("MODEL",)),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": str, "strength_model": float}, ("MODEL",)),
    "ModelSamplingDiscrete": ({"model": "MODEL", "sampling": str, "zsnr": bool}, ("MODEL",)),
    "CLIPTextEncode": ({"text": str, "clip": "CLIP"}, ("CONDITIONING",)),
    "CLIPTextEncodeSDXL": ({"clip": "CLIP", "text_g": str, "text_l": str, **CLIP_SIZES}, ("CONDITIONING",)),
    "ConditioningZeroOut": ({"conditioning": "CONDITIONING"}, ("CONDITIONING",)),
    "FluxGuidance": ({"conditioning": "CONDITIONING", "guidance": float}, ("CONDITIONING",)),
    "CFGGuider": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "cfg": float},
        ("GUIDER",),
    ),
    "RandomNoise": ({"noise_seed": int}, ("NOISE",)),
    "KSamplerSelect": ({"sampler_name": str}, ("SAMPLER",)),
    "ManualSigmas": ({"sigmas": str}, ("SIGMAS",)),
    "EmptyLatentImage": ({"width": int, "height": int, "batch_size": int}, ("LATENT",)),
    "EmptySD3LatentImage": ({"width": int, "height": int, "batch_size": int}, ("LATENT",)),
    "SamplerCustomAdvanced": (
        {
            "noise": "NOISE",
            "guider": "GUIDER",
            "sampler": "SAMPLER",
            "sigmas": "SIGMAS",
            "latent_image": "LATENT",
        },
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": str}, ()),
}


def inputs_of(nodes: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(node["inputs"] for node in nodes.values() if node["class_type"] == kind)


def check_nodes(nodes: dict[str, Any]) -> None:
    """Every node exists, has exactly its inputs, and links return what they take."""
    for node in nodes.values():
        wanted, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == wanted.keys(), node
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                assert NODES[nodes[value[0]]["class_type"]][1][value[1]] == wanted[name], (node, name)
            else:
                assert type(value) is wanted[name], (node, name)


def in_comfyui(generator: Generator, nodes: dict[str, Any], z: Tensor, cond: Any) -> Tensor:
    """The samplers "euler" and "lcm" of ComfyUI on the workflow's noise levels, with its scalings of states and noise."""
    model, sigmas = (
        generator.denoiser,
        [float(each) for each in inputs_of(nodes, "ManualSigmas")["sigmas"].split(", ")],
    )
    flow = not any(node["class_type"] == "ModelSamplingDiscrete" for node in nodes.values())
    process = Flow() if flow else VPScaledLinear()
    table = torch.arange(1000, dtype=torch.float64)
    levels = process.sigma(table) / process.alpha(table) if not flow else table
    full = not flow and abs(sigmas[0] / float(levels[-1]) - 1) < 1e-5
    x = z * (1 + sigmas[0] ** 2) ** 0.5 if full else z * sigmas[0]
    core = network_in(model.net)[1]
    for sigma, after in itertools.pairwise(sigmas):
        t = torch.full((len(z),), sigma if flow else float((levels.log() - math.log(sigma)).abs().argmin()))
        state = x if flow else x / (1 + sigma**2) ** 0.5
        out = core(state, t, cond)
        if flow:
            x0 = x - sigma * out
        else:
            kind = {"eps": "eps", "v_prediction": "v", "x0": "x0"}[
                inputs_of(nodes, "ModelSamplingDiscrete")["sampling"]
            ]
            x0 = process.convert(kind, out, state, t, "x0")
        if inputs_of(nodes, "KSamplerSelect")["sampler_name"] == "euler":
            x = x + (x - x0) / sigma * (after - sigma)
        else:
            noise = torch.randn(z.shape)
            x = (1 - after) * x0 + after * noise if flow else x0 + after * noise
    return x


@pytest.mark.parametrize(
    ("name", "changes", "spec"),
    slow(
        [
            ("sd", None, SamplerSpec(steps=4, times=TIMES4, **SDE)),
            ("sdxl", {}, SamplerSpec(steps=3, times=ODD, solver="ddim")),
            ("sd", FLOW, SamplerSpec(steps=1, times={1: (1.0, 0.0)})),
            ("sdxl", None, SamplerSpec(steps=1, times={1: (625.0, 0.0)}, start_scale=LEVEL_625, **SDE)),
            ("sd3", None, SamplerSpec(steps=2, times={2: (1.0, 0.6, 0.0)}, **SDE)),
            ("flux", {}, SamplerSpec(steps=2, times={2: (1.0, 0.6, 0.0)})),
        ],
        default=(1, 2, 4),
    ),
)
def test_a_workflow_of_comfyui_takes_the_same_steps(
    of: Callable[[str], Path], tmp_path: Path, name: str, changes: Any, spec: SamplerSpec
) -> None:
    source = student(of(name), tmp_path / "student", spec, changes)
    (tmp_path / "out").mkdir()
    found = export(source, tmp_path / "out", Options("comfyui"), "any")
    assert max(found.facts["differences"].values(), default=0) <= 1e-6
    nodes = json.loads((tmp_path / "out" / comfyui.WORKFLOW).read_text())
    check_nodes(nodes)
    file = comfyui.LORA if changes is None else comfyui.MODEL
    assert {path.name for path in (tmp_path / "out").iterdir()} == {comfyui.WORKFLOW, file}
    if changes is None:
        assert inputs_of(nodes, "LoraLoaderModelOnly")["lora_name"] == file
        assert all(key.startswith("lora_") for key in load_file(tmp_path / "out" / file))
        assert student_of(source, of(name), tmp_path / "out" / file)
    generator = load_model(source)
    cond = generator.conditions.of(torch.arange(2))
    torch.manual_seed(0)
    z = torch.randn(2, *generator.denoiser.sample_shape)
    with torch.no_grad():
        torch.manual_seed(1)
        made = in_comfyui(generator, nodes, z, cond)
        torch.manual_seed(1)
        wanted = generator.generate(z, cond, noise=lambda step: torch.randn(z.shape))
    torch.testing.assert_close(made, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)


def student_of(source: Path, teacher: Path, file: Path) -> bool:
    """Whether a student that starts from a file has the adapters of a model folder."""
    own = trained_parameters(load_model(source).denoiser.net)
    read = adapted(load_model(teacher / "teacher").denoiser, {"lora": {"file": str(file)}})
    found = trained_parameters(read.net)
    return found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)


@pytest.mark.parametrize(
    ("name", "changes", "spec", "words"),
    [
        (
            "sd",
            RAW,
            SamplerSpec(steps=1, times={1: (1.0, 0.0)}),
            "its samplers do not take the model's steps",
        ),
        (
            "sd",
            {},
            SamplerSpec(steps=1, times={1: (625.0, 0.0)}, **SDE),
            "it starts at t = 625 with .* times unit noise",
        ),
        (
            "sd",
            {},
            SamplerSpec(steps=1, times={1: (625.5, 0.0)}, start_scale=LEVEL, **SDE),
            "gets whole indices",
        ),
        (
            "sd",
            {"net": {"guidance_embedding": 8}},
            SamplerSpec(steps=4, times=LCM4, **SDE, **W),
            "the guidance as an input",
        ),
        ("pixart", {}, ONE, "networks of the class PixArt have no loader"),
        ("ddpm", {}, ONE, "networks of the class DDPM have no loader"),
        (
            "sd3",
            {},
            SamplerSpec(steps=1, times={1: (0.9, 0.0)}),
            "its flows start at t = 1, the model at 0.9",
        ),
    ],
)
def test_steps_that_comfyui_has_not_are_refused(
    of: Callable[[str], Path], tmp_path: Path, name: str, changes: Any, spec: SamplerSpec, words: str
) -> None:
    source = student(of(name), tmp_path / "student", spec, changes)
    with pytest.raises(ValueError, match=f"format: found 'comfyui', but .*{words}"):
        check(load_model(source), Options("comfyui"))


def test_uploads_are_asked_for_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_text("12345")
    calls: list[Any] = []

    class Api:
        def create_repo(self, repo: str, exist_ok: bool) -> None:
            calls.append((repo, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            calls.append((repo_id, folder_path))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    lines = hub.push(tmp_path, "me/student", dry_run=True)
    assert lines == [
        "would upload 1 files, 5 bytes, to me/student (dry_run=false uploads them):",
        "  unet/weights (5 bytes)",
    ]
    assert not calls
    hub.push(tmp_path, "me/student", dry_run=False)
    assert calls == [("me/student", True), ("me/student", str(tmp_path))]
    for arguments, words in (
        (["dry_run=false"], "dry_run: found false without push_to_hub"),
        (["push_to_hub=student"], "push_to_hub: found 'student', expected OWNER/NAME"),
    ):
        with pytest.raises(ValueError, match=words):
            verb.parse(["model=a", f"out={tmp_path / 'new'}", *arguments])
    assert verb.parse(["model=a", f"out={tmp_path / 'new'}", "push_to_hub=me/student"]).dry_run
