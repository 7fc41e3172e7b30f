"""Every family of teachers found on disk: a tiny pipeline, made by the classes of diffusers, is loaded as a real one
would be and samples what the pipeline samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import teacher_support
import torch
import yaml
from tests_support import ROOT
from torch import Tensor

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import Draws
from distill.engine.update import Step
from distill.methods.reflow import Reflow
from distill.models.bottleneck import BottleneckFeatures
from distill.models.conditions import Nothing
from distill.models.denoiser import Denoiser
from distill.models.families import families, family_of, schedulers
from distill.models.families.family import Encoded
from distill.models.generator import Generator
from distill.models.native import load_model, save_model
from distill.models.pretrained import Folder
from distill.models.prompts import Prompts, Table, TextEncoders, write_table
from distill.models.spec import SamplerSpec
from distill.stages.adapt import adapted

PROMPTS = ["a dog", "a cat on a table, with words that are too many"]
STEPS = 5  # DDIM of diffusers steps by 1000 // STEPS: its times and its states agree where that divides
TOLERANCE = 1e-5  # of the largest number


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    assert torch.isfinite(theirs).all()
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def loaded(folder: Path, **options: Any) -> tuple[Generator, Cond]:
    """A family's model of two samples, and their conditions."""
    found = Folder(folder)
    _, family = family_of(found)
    conditions = family.conditions(found)
    if conditions is not None:
        return family.load(found, conditions, **options), conditions.of(torch.tensor([3, 7]))
    source = TextEncoders.of(found)
    encoded = source.encode(PROMPTS)
    table = Table(
        PROMPTS, encoded.values, encoded.nulls, family.shape(found, options.get("resolution")), source
    )
    return family.load(found, Prompts.of_table(table), **options), table.cond(torch.arange(2))


def ours(model: Denoiser, z: Tensor, cond: Cond, times: list[float], scale: float, solver: str) -> Tensor:
    grid = torch.tensor(times, dtype=torch.float64)
    with torch.no_grad():
        return model.transport(z, cond, solver=solver, grid=grid, guidance_scale=scale)[0]


def theirs(pipeline: Any, latents: Tensor, scale: float = 4.0, output: str = "latent", **more: Any) -> Tensor:
    """What a pipeline makes of `PROMPTS`, of images of 16 pixels."""
    options = {"num_inference_steps": STEPS, "guidance_scale": scale, "height": 16, "width": 16}
    made: Tensor = pipeline(PROMPTS, latents=latents, output_type=output, **options, **more).images
    return made


def truncated(folder: Path, letters: int) -> int:
    """How many of two prompts an encoder cut, with a null condition of so many letters."""
    return TextEncoders.of(Folder(folder), "a " * letters).encode(["a dog", "b " * letters]).truncated


def noise(model: Denoiser) -> Tensor:
    return torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(1))


def a_student(generator: Generator, cond: Cond, folder: Path) -> None:
    """Steps of reflow with adapters on the stored model change these alone; the stored student gives the same samples."""
    model = generator.denoiser
    if isinstance(model.conditions, Prompts):
        (folder / "prompts").mkdir()
        table = model.conditions.table
        encoded = Encoded(table.values, table.nulls, 0)
        write_table(folder / "prompts", table.prompts, table.source, encoded, model.sample_shape)
        model = model.with_(conditions=Prompts.of_folder(folder / "prompts"))
    save_model(folder / "base", model, generator.spec)
    base = load_model(folder / "base").denoiser
    z = noise(base)
    assert torch.equal(
        ours(base, z, cond, [base.process.t_max, base.process.t_min], 1.0, "euler"),
        ours(generator.denoiser, z, cond, [base.process.t_max, base.process.t_min], 1.0, "euler"),
    )
    before = {name: value.clone() for name, value in base.net.state_dict().items()}
    torch.manual_seed(0)
    student = adapted(base, {"process": "flow", "lora": {"rank": 2}})
    method = Reflow(student)
    rows = torch.arange(2)
    batch = Batch(rows, rows, cond, x0=0.5 * z.flip(0), z=z)
    step = Step(0, Draws(0, "s", 0, rows))
    losses = []
    for _ in range(3):
        loss = method.loss(batch, step).total
        loss.backward()
        with torch.no_grad():
            for parameter in student.trained().values():
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
        losses.append(float(loss))
    assert losses[2] < losses[0]
    assert len(student.trained()) >= 14
    assert all(torch.equal(value, before[name]) for name, value in base.net.state_dict().items())
    save_model(folder / "student", student, SamplerSpec(steps=1, any_steps=True))
    again = load_model(folder / "student").denoiser
    times = [1.0, 0.5, 0.0]
    assert torch.equal(ours(again, z, cond, times, 1.0, "euler"), ours(student, z, cond, times, 1.0, "euler"))
    assert again.decoder.config() == base.decoder.config()


def test_all_families_have_a_test() -> None:
    assert sorted(families()) == sorted(teacher_support.MAKERS)
    assert len(families()) == 7
    for name in families():
        config = yaml.safe_load((ROOT / "configs" / "teacher" / f"{name}.yaml").read_text())
        assert (config["family"], config["defaults"][0]) == (name, "pipeline")


@pytest.mark.parametrize(
    ("prediction", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), pytest.param("v_prediction", True, marks=pytest.mark.slow)],
)
def test_stable_diffusion_is_its_pipeline(tmp_path: Path, prediction: str, zero_snr: bool) -> None:
    pipeline = teacher_support.sd(tmp_path, prediction=prediction, zero_snr=zero_snr)
    generator, cond = loaded(tmp_path)
    model, z = generator.denoiser, noise(generator.denoiser)
    texts, negative = pipeline.encode_prompt(PROMPTS, "cpu", 1, True)
    assert torch.equal(cond.values["context"], texts)
    assert torch.equal(cond.nulls["context"], negative[:1])
    found = theirs(pipeline, z)
    assert BottleneckFeatures(model).shape() == (16, 4, 4)
    times = [*map(float, pipeline.scheduler.timesteps), 0.0]
    made = ours(model, z, cond, times, 4.0, "ddim")
    close(made, found)
    close((model.decoder.decode(made) / 2 + 0.5).clamp(0, 1), theirs(pipeline, z, output="pt"))
    assert truncated(tmp_path, 16) == 1, "not the null condition"
    a_student(generator, cond, tmp_path)
    assert model.guidable
    assert (model.kind, model.process.t_max) == ({"epsilon": "eps"}.get(prediction, "v"), 999)


def test_sdxl_is_its_pipeline(tmp_path: Path) -> None:
    pipeline = teacher_support.sdxl(tmp_path)
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    generator, cond = loaded(tmp_path)
    z = noise(generator.denoiser)
    found = theirs(pipeline, z)
    times = [*map(float, pipeline.scheduler.timesteps), 0.0]
    close(ours(generator.denoiser, z, cond, times, 4.0, "ddim"), found)
    assert truncated(tmp_path, 16) == 1, "not the null condition"
    a_student(generator, cond, tmp_path)
    with pytest.raises(ValueError, match="size: no such key"):
        loaded(tmp_path, constants={"size": [1, 1]})


def test_pixart_is_its_pipeline(tmp_path: Path) -> None:
    pipeline = teacher_support.pixart(tmp_path)
    generator, cond = loaded(tmp_path)
    z = noise(generator.denoiser)
    assert cond.values["context_mask"].sum(1).tolist() == [7, 48]
    a_student(generator, cond, tmp_path)
    assert BottleneckFeatures(generator.denoiser).shape() == (16, 4, 4)
    found = theirs(pipeline, z, use_resolution_binning=False)
    times = [*map(float, pipeline.scheduler.timesteps), 0.0]
    close(ours(generator.denoiser, z, cond, times, 4.0, "ddim"), found)
    assert truncated(tmp_path, 100) == 1, "not the null condition"


def test_sd3_is_its_pipeline(tmp_path: Path) -> None:
    pipeline = teacher_support.sd3(tmp_path)
    generator, cond = loaded(tmp_path)
    z = noise(generator.denoiser)
    found = theirs(pipeline, z)
    close(ours(generator.denoiser, z, cond, pipeline.scheduler.sigmas.tolist(), 4.0, "euler"), found)
    assert BottleneckFeatures(generator.denoiser).shape() == (16, 4, 4)
    assert truncated(tmp_path, 16) == 1, "not the null condition"
    a_student(generator, cond, tmp_path)
    index = tmp_path / "model_index.json"
    parts = json.loads(index.read_text())
    index.write_text(json.dumps(parts | {"tokenizer_3": [None, None]}))
    with pytest.raises(ValueError, match="tokenizer_3: missing; expected both"):
        TextEncoders.of(Folder(tmp_path))


@pytest.mark.parametrize(
    ("maker", "solver", "name"),
    [
        ("sd", "ddim", "DDIMScheduler"),
        ("sd", "dpmpp_2m", "DPMSolverMultistepScheduler"),
        ("ddpm", "ddim", "DDIMScheduler"),
        ("sd3", "euler", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_times_of_the_solvers_scheduler(tmp_path: Path, maker: str, solver: str, name: str) -> None:
    """The loop of network and scheduler, with the times that the folder's options give the scheduler of the solver."""
    import diffusers

    pipeline = teacher_support.MAKERS[maker](tmp_path)
    generator, cond = loaded(tmp_path, solver=solver, grid="scheduler")
    model, z = generator.denoiser, noise(generator.denoiser)
    scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    times = scheduler.sigmas[:-1] if maker == "sd3" else scheduler.timesteps
    assert generator.spec.solver == solver
    assert generator.spec.grid(model.process, STEPS)[:-1].tolist() == times.tolist()
    assert SamplerSpec.from_dict(generator.spec.to_dict()) == generator.spec
    x = z
    with torch.no_grad():
        for step, t in zip(scheduler.timesteps, times, strict=True):
            out = model.net(x, t.expand(2).float(), cond)
            x = scheduler.step(out, step, x).prev_sample
    close(ours(model, z, cond, generator.spec.grid(model.process, STEPS).tolist(), 1.0, solver), x)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"grid": "karras"}, "grid: found 'karras', expected null or scheduler"),
        (
            {},
            {"solver": "euler"},
            "solver: found 'euler', but grid=scheduler knows ddim, dpmpp_2m, unipc here",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
            {"solver": "dpmpp_2m"},
            "config.use_karras_sigmas: found true, expected false",
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            {},
            "config.use_dynamic_shifting: found true, expected false",
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            {"solver": "heun"},
            "solver: found 'heun', but grid=scheduler knows euler here",
        ),
    ],
)
def test_times_of_schedulers_that_are_refused(
    config: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    config = {"_class_name": "DDIMScheduler", "clip_sample": False, **config}
    found = schedulers.meaning(config, "config", 16)
    with pytest.raises(ValueError, match=message):
        schedulers.sampled(found, config, "config", **{"grid": "scheduler", **options})


def test_flux_is_its_pipeline(tmp_path: Path) -> None:
    """With dev's guidance as a constant, and the grid of the pipeline, which depends on the size of the image."""
    pipeline = teacher_support.flux(tmp_path)
    generator, cond = loaded(tmp_path, resolution=16, constants={"guidance": 2.5})
    model, z = generator.denoiser, noise(generator.denoiser)
    found = theirs(pipeline, pipeline._pack_latents(z, 2, 4, 8, 8), 2.5)
    found = pipeline._unpack_latents(found, 16, 16, pipeline.vae_scale_factor)
    close(ours(model, z, cond, pipeline.scheduler.sigmas.tolist(), 1.0, "euler"), found)
    with torch.no_grad():
        grid = generator.spec.grid(model.process, STEPS)
        close(model.transport(z, cond, solver="euler", grid=grid)[0], found)
    a_student(generator, cond, tmp_path)
    assert not model.guidable
    assert BottleneckFeatures(model).shape() == (32, 4, 4)
    with pytest.raises(ValueError, match="resolution: missing"):
        loaded(tmp_path)


@pytest.mark.parametrize("name", ["DDIMScheduler", "LCMScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_missing_options_of_schedulers_are_the_class_s(name: str) -> None:
    import diffusers

    options = {"num_train_timesteps": 500, "clip_sample": False}  # PNDM has no clip_sample, and ignores it
    found = schedulers.meaning({"_class_name": name, **options}, "config", 16)
    wanted = getattr(diffusers, name)(num_train_timesteps=500).alphas_cumprod
    close(found.process.alpha(torch.arange(500, dtype=torch.float64)).float() ** 2, wanted)


@pytest.mark.parametrize(
    ("name", "entry", "words"),
    [
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas: found True, expected False"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type: found 'continuous'"),
        ("PNDMScheduler", {"num_train_timesteps": "9"}, "num_train_timesteps: found '9', expected int"),
        ("LCMScheduler", {"beta_end": None}, "beta_end: found None, expected float"),
        (
            "FlowMatchEulerDiscreteScheduler",
            {"shift_terminal": 0.1},
            "shift_terminal: found 0.1, expected None",
        ),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "stochastic_sampling: found True"),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas: found True"),
        ("FlowMatchEulerDiscreteScheduler", {"time_shift_type": "linear"}, "time_shift_type: found 'linear'"),
        ("FlowMatchHeunDiscreteScheduler", {"num_train_timesteps": 500}, "num_train_timesteps: found 500"),
    ],
)
def test_options_of_schedulers_are_refused_by_name(name: str, entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^config: {words}"):
        schedulers.meaning({"_class_name": name, **entry}, "config", 16)


@pytest.mark.parametrize(
    ("name", "entry"), [("DDIMScheduler", {}), ("DPMSolverMultistepScheduler", {"thresholding": True})]
)
def test_clipping_between_steps_is_left_out_with_a_warning(name: str, entry: dict[str, Any]) -> None:
    """The folders of most DDPM have it, and the network is the same."""
    with pytest.warns(
        UserWarning, match=r"^config: (clip_sample|thresholding): found True; predicted data are not"
    ):
        found = schedulers.meaning({"_class_name": name, **entry}, "config", 16)
    assert found.kind == "eps"


@pytest.mark.parametrize("name", ["ddpm", "dit"])
def test_a_loop_of_network_and_scheduler(tmp_path: Path, name: str) -> None:
    pipeline = teacher_support.MAKERS[name](tmp_path)
    generator, cond = loaded(tmp_path)
    model, scheduler = generator.denoiser, pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    x = z = noise(model)
    for t in scheduler.timesteps:
        with torch.no_grad():
            if name == "ddpm":
                out = pipeline.unet(x, t).sample
            else:
                labels = torch.tensor([3, 7, 10, 10])
                out = pipeline.transformer(
                    torch.cat([x, x]), timestep=t.expand(4), class_labels=labels
                ).sample[:, :4]
                conditional, unconditional = out.chunk(2)
                out = unconditional + 3 * (conditional - unconditional)
        x = scheduler.step(out, t, x).prev_sample
    # The scheduler's last time is 0, and its step from there ends on the predicted data.
    times = [*map(float, scheduler.timesteps), -1.0]
    close(ours(model, z, cond, times, 1.0 if name == "ddpm" else 3.0, "ddim"), x)
    a_student(generator, cond, tmp_path)
    assert model.guidable == (name == "dit")
    assert BottleneckFeatures(model).shape() == (16, 4, 4)


def test_precision_is_the_network_s_own(tmp_path: Path) -> None:
    teacher_support.sd(tmp_path)
    full, cond = loaded(tmp_path)
    half, _ = loaded(tmp_path, dtype="bfloat16")
    z, t = noise(full.denoiser), torch.full((2,), 500.0)
    assert {p.dtype for p in half.denoiser.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        made, wanted = (each.denoiser(z, t, cond) for each in (half, full))
    assert made.dtype == torch.float32
    assert 0 < float((made - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_a_variant_of_the_weights(tmp_path: Path) -> None:
    pipeline = teacher_support.sd(tmp_path)
    whole, _ = loaded(tmp_path)
    for part in ("unet", "text_encoder", "vae"):
        for file in (tmp_path / part).glob("*.safetensors"):
            file.unlink()
    pipeline.save_pretrained(tmp_path, variant="fp16")
    folder = Folder(tmp_path, "fp16")
    _, family = family_of(folder)
    encoded = TextEncoders.of(folder).encode(PROMPTS)
    table = Table(PROMPTS, encoded.values, encoded.nulls, (4, 8, 8))
    again = family.load(folder, Prompts.of_table(table))
    for name, weight in whole.denoiser.state_dict().items():
        assert torch.equal(again.denoiser.state_dict()[name], weight)


def test_without_weights_nothing_is_allocated(tmp_path: Path) -> None:
    teacher_support.sd(tmp_path)
    folder = Folder(tmp_path)
    _, family = family_of(folder)
    shape = {name: torch.zeros(1, *of, dtype=kind) for name, (of, kind) in family.text(folder).items()}
    encoded = Encoded(shape, shape)
    table = Table(["a"], encoded.values, encoded.nulls, (4, 8, 8))
    sketch = family.load(folder, Prompts.of_table(table), weights=False)
    assert {p.device.type for p in sketch.denoiser.parameters()} == {"meta"}
    cond = table.cond(torch.zeros(2, dtype=torch.int64)).to("meta")
    assert sketch.denoiser(
        torch.zeros(2, 4, 8, 8, device="meta"), torch.zeros(2, device="meta"), cond
    ).shape == (2, 4, 8, 8)
    assert sketch.shape == (3, 16, 16)
    real, _ = loaded(tmp_path)
    assert sum(p.numel() for p in sketch.denoiser.parameters()) == sum(
        p.numel() for p in real.denoiser.parameters()
    )


def test_unconditional_pipelines_take_no_prompts(tmp_path: Path) -> None:
    teacher_support.ddpm(tmp_path)
    folder = Folder(tmp_path)
    assert isinstance(family_of(folder)[1].conditions(folder), Nothing)
    with pytest.raises(ValueError, match="takes no prompts"):
        TextEncoders.of(folder)
