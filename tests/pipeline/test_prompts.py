"""Recipes with prompts and a Stable Diffusion folder, from the teacher to the export."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import teacher_support
import torch
from checkpoint_support import has_checkpoint
from PIL import Image
from safetensors.torch import load_file
from tests_support import call_verb, kill_when, refusal, run_verb

import distill
from distill.cache.pairs import Pairs
from distill.models.adapters import trained_parameters
from distill.models.extractors.random_conv import load_random_conv
from distill.models.generator import Generator
from distill.models.native import load_model
from distill.models.pretrained import Folder
from distill.stages import encode
from distill.stages.adapt import adapted

PROMPTS = ("a dog", "a cat on a table", "a house", "two words that are too long for this text encoder")


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, and a file of prompts beside it."""
    folder = tmp_path_factory.mktemp("teacher")
    teacher_support.sd(folder / "sd")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return folder


def options(folder: Path, *more: str, recipe: str = "instaflow", flow: bool = True) -> list[str]:
    return [
        *(f"recipe={recipe}", "profile=smoke", "teacher=sd", f"teacher.path={folder / 'sd'}"),
        *("data=prompts", f"data.path={folder / 'prompts.txt'}", "eval=prompts"),
        "eval.models.teacher.steps=[50,1]",
        *(["student=flow"] if recipe == "instaflow" and flow else []),
        *more,
    ]


def test_instaflow_from_a_folder_of_stable_diffusion(sd: Path, tmp_path: Path) -> None:
    guided = ("stages.pairs.guidance_scale=3", "+eval.models.teacher.guidance_scale=3")
    command = options(sd, "name=run", "stages.pairs.sampler=teacher", *guided)
    out = run_verb(tmp_path, "train", *command)
    run = tmp_path / "runs" / "run"
    assert "1 of 4 prompts are longer than the text encoder reads" in out.stdout + out.stderr
    pairs = Pairs(run / "pairs")
    assert pairs.sample_shape == (4, 8, 8)
    assert (pairs.header.solver, pairs.header.steps) == ("ddim", 50)
    assert pairs.header.grid == {"name": "trailing"}
    assert pairs.columns["prompt"].tolist() == [i % 4 for i in range(len(pairs))]
    batch = pairs.fetch(torch.tensor([1, 5]), torch.arange(2))
    assert torch.equal(batch.cond.values["context"][0], batch.cond.values["context"][1])
    rows = {
        (row["model"], row["steps"]): row for row in json.loads((run / "metrics.json").read_text())["rows"]
    }
    assert rows["student", 1]["teacher_mse"] > 0
    assert rows["student", 1]["teacher_latent_mse"] > 0
    assert rows["teacher", 50]["teacher_latent_mse"] == 0
    assert all(row["fd"] is None for row in rows.values())
    report = (run / "report.md").read_text()
    assert "compared with no real images" in report
    assert "2. a cat on a table" in report
    assert (run / "grid.png").is_file()
    # The student is a flow with the teacher's trajectories, and the VAE is the teacher's.
    reflow = load_model(run / "reflow")
    assert type(reflow.denoiser.net).__name__ == "Converted"
    student = distill.load(run / "export")
    assert student.sample(2, prompt="a dog").shape == (2, 3, 16, 16)
    new = student.sample(2, prompt="a bird")  # encoded now, by the teacher's text encoder
    assert not torch.equal(new, student.sample(2, prompt="a dog"))
    drawn = call_verb(tmp_path, "sample", "model=runs/run/export", "count=4", "prompt=a dog", "out=dog.png")
    assert drawn.returncode == 0, drawn.stderr
    with pytest.raises(ValueError, match="this model takes prompts"):
        student.sample(1, label=3)
    # A moved run reads its own prompts and is finished there, with the same prompts in another file too.
    samples, cat = student.sample(4), student.sample(1, prompt="a cat on a table", seed=3)
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere" / "runs")
    run = tmp_path / "elsewhere" / "runs" / "run"
    (tmp_path / "copy.txt").write_text("\r\n".join(PROMPTS))
    copied = [
        f"data.path={tmp_path / 'copy.txt'}" if each.startswith("data.path=") else each for each in command
    ]
    again = call_verb(tmp_path / "elsewhere", "train", *copied)
    assert (again.stdout + again.stderr).count("already finished, skipped") == 8, again.stderr
    other = (*copied, "name=other", f"stages.pairs.path={run / 'pairs'}", "plan=true")
    assert call_verb(tmp_path, "train", *other, check=True)
    # Another run that takes its pairs and its model copies the prompts.
    rest = (f"stages.{name}=null" for name in ("reflow", "pairs2", "distill", "evaluate", "export"))
    taken = ("teacher=pretrained", f"teacher.path={run / 'teacher'}", f"stages.pairs.path={run / 'pairs'}")
    same = ("stages.pairs.sampler=teacher", guided[0], "profile=smoke", "repeat=null")
    call_verb(
        tmp_path, "train", "recipe=instaflow", "name=taken", "~rounds", *taken, *same, *rest, check=True
    )
    # The export holds the prompts that it samples, but no text encoder.
    shutil.move(run / "export", tmp_path / "moved")
    shutil.rmtree(run)
    taken_pairs = Pairs(tmp_path / "runs" / "taken" / "pairs")
    assert taken_pairs.fetch(torch.tensor([1]), torch.arange(1)).cond.values["context"].shape == (1, 16, 16)
    assert load_model(tmp_path / "runs" / "taken" / "teacher").sample(1).shape == (1, 3, 16, 16)
    moved = distill.load(tmp_path / "moved")
    assert torch.equal(moved.sample(4), samples)
    assert torch.equal(moved.sample(1, prompt="a cat on a table", seed=3), cat)


@pytest.mark.slow
def test_score_distillation_needs_prompts_alone(sd: Path, tmp_path: Path) -> None:
    encoders = ("data.encoder_dtype=bfloat16", "data.encoder_batch_size=2")
    run_verb(tmp_path, "train", *options(sd, "name=sid", "stages.distill.steps=2", *encoders, recipe="sid"))
    prompts = tmp_path / "runs" / "sid" / "prompts"
    assert json.loads((prompts / "prompts.json").read_text())["source"]["dtype"] == "bfloat16"
    assert "batch_size: 2" in (prompts / "config.yaml").read_text()
    assert distill.load(tmp_path / "runs" / "sid" / "export").sample(1).shape == (1, 3, 16, 16)


@pytest.mark.slow
def test_adapters_in_float32_on_a_base_in_bfloat16(sd: Path, tmp_path: Path) -> None:
    """One base in half the memory; with activations computed again."""
    more = (
        "teacher.dtype=bfloat16",
        "student=lora",
        "stages.distill.steps=2",
        "trainer.activation_checkpointing=true",
    )
    run_verb(tmp_path, "train", *options(sd, "name=half", *more, recipe="sid"))
    run = tmp_path / "runs" / "half"
    teacher, student = (load_model(run / stage).denoiser.net for stage in ("teacher", "distill"))
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    own = trained_parameters(student)
    assert {p.dtype for p in own.values()} == {torch.float32}
    assert any(bool(p.any()) for name, p in own.items() if name.endswith("lora_B.weight"))
    base = {
        name.removeprefix("net.").replace(".layer.", "."): p
        for name, p in student.named_parameters()
        if name not in own
    }
    assert all(torch.equal(p, base[name]) for name, p in teacher.named_parameters())
    facts = json.loads((run / "distill" / "artifact.json").read_text())["facts"]
    numbers, vae = (
        sum(p.numel() for p in own.values()),
        load_model(run / "teacher").denoiser.decoder.weights(),
    )
    expected = 2 * sum(p.numel() for p in teacher.parameters()) + 4 * 2 * numbers
    assert facts["predicted_bytes"]["weights"] == expected + 4 * sum(t.numel() for t in vae.values())
    assert distill.load(run / "export").sample(1).isfinite().all()


@pytest.mark.slow
def test_latent_consistency_takes_pairs(sd: Path, tmp_path: Path) -> None:
    """With the guidance as an input of the U-Net, on samples of the prompts, which the recipe makes by itself."""
    command = options(sd, "name=lcm", "data.samples.guidance_scale=2", recipe="lcm")
    run_verb(tmp_path, "train", *command)
    samples = Pairs(tmp_path / "runs" / "lcm" / "samples").header
    assert (samples.guidance, samples.solver, samples.steps) == (2, "ddim", 50)
    pictures = list((tmp_path / "runs" / "lcm" / "distill" / "monitor").glob("step_*.png"))
    assert pictures, "pictures of the prompts while training"
    assert not (tmp_path / "runs" / "lcm" / "distill" / "best").exists()
    student = distill.load(tmp_path / "runs" / "lcm" / "export")
    assert student.denoiser.embeds_guidance
    assert not torch.equal(student.sample(2, guidance_w=0.0), student.sample(2, guidance_w=1.0))


@pytest.mark.slow
def test_mmd_compares_decoded_images_with_those_of_a_folder(sd: Path, tmp_path: Path) -> None:
    """In the features of a network, in two micro batches, with adapters: prompts alone, since the images are another source."""
    (tmp_path / "photos").mkdir()
    noise = torch.Generator().manual_seed(0)
    for number in range(6):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=noise).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    method = "stages.distill.method"
    real = f"{{_target_: distill.data.folder.ImageFolder, path: {tmp_path / 'photos'}}}"
    more = ("student=lora", "student.lora.rank=2", "stages.distill.accumulate=2", "stages.distill.steps=2")
    features = f"+features@{method}.features=random_conv"
    command = options(
        sd, "name=mmd", "stages.second=null", f"{method}.real={real}", features, *more, recipe="mmd"
    )
    call_verb(tmp_path, "train", *command, check=True)
    run = tmp_path / "runs" / "mmd"
    assert not (run / "samples").exists()
    identity = json.loads((run / "distill" / "identity.json").read_text())
    assert load_random_conv().sha256 in json.dumps(identity)
    student = distill.load(run / "distill")
    assert student.spec.times == {1: (999.0, 0.0)}
    assert all(bool(p.any()) for n, p in trained_parameters(student.denoiser.net).items() if "lora_B" in n)
    # Another image is another training.
    Image.fromarray(pixels[::-1].copy()).save(tmp_path / "photos" / "new.png")
    assert "stages.distill" in refusal(tmp_path, "train", *command)


def test_methods_that_read_images_are_refused_prompts(sd: Path, tmp_path: Path) -> None:
    def refused(recipe: str, *more: str) -> str:
        return refusal(tmp_path, "train", *options(sd, "name=bad", *more, recipe=recipe))

    found = refused("consistency", "data.samples=null")
    assert "stages.distill: data: 'prompts' has no x0, which the method Consistency reads" in found
    pairs = ["+stage@stages.pairs=generate", "stages.pairs.teacher=teacher", "stages.pairs.count=2048"]
    assert f"expected pairs: type {' '.join(pairs)} stages.<stage>.data=pairs" in found
    found = refused("dmd", "stages.distill.method.gan={}", "data.samples=null")
    assert "has no x0, which the method DMD reads; expected pairs: type +stage@stages.pairs" in found
    found = refused("instaflow", "stages.distill.data=${data}")
    assert (
        "has no x0, which the method OneStep reads; expected pairs: type stages.<stage>.data=pairs" in found
    )
    found = refused("lcm", "student=flow")
    assert (
        "student: found {'process': 'flow', 'start': 'converted'}, but no stage of this recipe reads" in found
    )


def test_bad_prompts(sd: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    for file, words in (
        ("empty.txt", "data.path: empty.txt: holds no prompts"),
        ("latin.txt", "data.path: latin.txt: line 1: is not UTF-8: byte 3"),
        ("other.jsonl", "data.path: other.jsonl: line 2: prompt: found None, expected a prompt"),
        ("none.txt", "data.path: none.txt: no such file"),
    ):
        assert words in refusal(tmp_path, "train", *options(sd, "name=bad", f"data.path={file}"))
    assert "data: found prompts, but no stage loads a pipeline with a text encoder" in refusal(
        tmp_path,
        "train",
        "recipe=instaflow",
        "data=prompts",
        f"data.path={sd / 'prompts.txt'}",
        "monitor=digits64",
    )
    teacher = ("recipe=instaflow", "teacher=sd", f"teacher.path={sd / 'sd'}", "eval=prompts")
    assert "prompts: missing; " in refusal(tmp_path, "train", *teacher)


def test_bad_folders(sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*more: str) -> str:
        return refusal(tmp_path, "train", *options(sd, "name=bad", *more))

    def broken(name: str) -> Path:
        shutil.copytree(sd / "sd", tmp_path / name)
        return tmp_path / name

    def changed(folder: Path, file: str, **entries: object) -> str:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))
        return refused(f"teacher.path={folder}")

    assert "path: nowhere/sd: no such folder" in refused("teacher.path=nowhere/sd")
    assert "hf download nowhere/sd" in refused("teacher.path=nowhere/sd")
    # A commit of the hub is read from the hub's cache; branches, which move, are not.
    commit, cache = "0123456789abcdef" * 2 + "01234567", tmp_path / "hub"
    assert "expected a commit of 40 hexadecimal digits" in refused("teacher.path=some/sd@main")
    assert f"hf download some/sd --revision {commit}" in refused(f"teacher.path=some/sd@{commit}")
    shutil.copytree(sd / "sd", cache / "models--some--sd" / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert Folder(f"some/sd@{commit}").path == cache / "models--some--sd" / "snapshots" / commit
    assert "no model_index.json in it" in refused(f"teacher.path={sd}")
    assert "family: found 'dit', but" in refused("teacher.family=dit")
    folder = broken("part")
    shutil.rmtree(folder / "unet")
    assert f"{folder / 'unet'}: missing" in refused(f"teacher.path={folder}")
    folder = broken("bin")
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    assert "alone, whose loading can run code; expected safetensors" in refused(f"teacher.path={folder}")
    folder = broken("variant")
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    assert "expected weights of the variant None; type teacher.variant=NAME" in refused(
        f"teacher.path={folder}"
    )
    scheduler = "scheduler/scheduler_config.json"
    assert "_class_name: found 'Unheard', expected one of DDIMScheduler" in changed(
        broken("scheduler"), scheduler, _class_name="Unheard"
    )
    assert "prediction_type: found 'noise'" in changed(broken("kind"), scheduler, prediction_type="noise")
    assert "trained_betas: found a list" in changed(broken("betas"), scheduler, trained_betas=[0.1, 0.2])
    index = broken("index")
    for entry, words in (
        (
            {"text_encoder": ["transformers", "BertModel"]},
            "text_encoder: found 'BertModel', expected CLIPTextModel",
        ),
        (
            {"tokenizer": ["transformers", "AutoTokenizer"]},
            "tokenizer: found 'AutoTokenizer', expected CLIPTok",
        ),
        (
            {"tokenizer": ["mine", "CLIPTokenizer"]},
            "tokenizer: found the library 'mine', expected diffusers or",
        ),
    ):
        kept = (index / "model_index.json").read_text()
        assert words in changed(index, "model_index.json", **entry)
        (index / "model_index.json").write_text(kept)
    assert "_class_name: found 'WanPipeline', expected one of" in changed(
        broken("pipeline"), "model_index.json", _class_name="WanPipeline"
    )
    assert "config.addition_embed_type: found 'text_time', expected None" in changed(
        broken("added"), "unet/config.json", addition_embed_type="text_time"
    )
    assert "expected a multiple of 2" in refused("teacher.resolution=15")
    assert "sample_shape: found [8, 8, 8], but the autoencoder has latents [4,h,w]" in changed(
        broken("latents"), "unet/config.json", in_channels=8
    )
    guided = ("recipe=instaflow", "teacher=pipeline", f"teacher.path={tmp_path / 'ddpm'}", "student=flow")
    teacher_support.ddpm(tmp_path / "ddpm")
    assert "guidance_scale: " in refusal(tmp_path, "train", *guided, "stages.pairs.guidance_scale=3")
    monkeypatch.setattr(encode, "machine_memory", lambda: 6000)
    assert "data.limit: found None: 4 encoded prompts take 4096 bytes, 1024 each, and this" in (
        few := refused()
    )
    assert "expected at most 2 prompts" in few
    assert call_verb(tmp_path, "train", *options(sd, "data.limit=2", "plan=true")).returncode == 0
    stage = encode.Encode(str(folder := broken("size")), {"path": str(sd / "prompts.txt")})
    before = stage.fingerprint()
    changed(folder, "unet/config.json", sample_size=4)
    assert stage.fingerprint() != before, "samples of another shape"
    assert "dtype: found 'int8' (data.encoder_dtype), expected one of" in refused("data.encoder_dtype=int8")


def adapters_of_sid(sd: Path) -> list[str]:
    more = ("student=lora", "student.lora.rank=2", "trainer.checkpoint_every=1", "profile.steps=6")
    return options(sd, "name=run", *more, "~stages.evaluate", "~stages.export", recipe="sid")


@pytest.mark.slow
def test_adapters_on_prompts_continue_bit_equal_after_a_kill(sd: Path, tmp_path: Path) -> None:
    """Of SiD, whose student, fake score, average and teacher have one base."""
    command, whole, parts = adapters_of_sid(sd), tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    call_verb(whole, "train", *command, check=True)
    kill_when(parts, command, has_checkpoint(parts / "runs/run/distill/checkpoints"))
    call_verb(parts, "train", *command, check=True)
    one, killed = (load_file(folder / "runs/run/distill/model.safetensors") for folder in (whole, parts))
    assert len(one) == 2 * 4 * 8, "A and B of four projections of eight attentions, and nothing else"
    assert all(torch.equal(one[name], killed[name]) for name in one)
    moved = [name for name, value in one.items() if name.endswith("lora_B.weight") and value.any()]
    assert len(moved) == len(one) // 2


@pytest.mark.slow
def test_a_student_with_a_smaller_network(sd: Path, tmp_path: Path) -> None:
    """From fresh weights; its samples are decoded as the teacher's."""
    config = json.loads((sd / "sd" / "unet" / "config.json").read_text())
    config |= {"block_out_channels": [4, 8], "attention_head_dim": 2}
    net = {"_target_": "distill.models.families.sd.SD", "config": config}
    process = {"_target_": "distill.process.vp.VPScaledLinear"}
    folder = tmp_path / "own" / "recipe"
    folder.mkdir(parents=True)
    stage = {"init": None, "adapt": None, "net": net, "process": process, "kind": "v"}
    stages = "stages: " + json.dumps({"distill": stage})
    (folder / "small.yaml").write_text(f"# @package _global_\ndefaults: [sid, _self_]\n{stages}\n")
    command = options(sd, "name=run", "eval.count=4", "--config-dir", str(tmp_path / "own"), recipe="small")
    call_verb(tmp_path, "train", *command, check=True)
    student, teacher = (distill.load(tmp_path / "runs" / "run" / name) for name in ("export", "teacher"))
    assert sum(p.numel() for p in student.denoiser.parameters()) < 0.5 * sum(
        p.numel() for p in teacher.denoiser.parameters()
    )
    assert student.sample(1, prompt="a dog").shape == (1, 3, 16, 16)


@pytest.mark.slow
def test_adapters_on_prompts_are_the_same_on_two_processes(sd: Path, tmp_path: Path) -> None:
    command, folders = adapters_of_sid(sd), (tmp_path / "one", tmp_path / "two")
    for folder, more in zip(folders, ((), ("trainer.devices=2", "trainer.shard=world")), strict=True):
        folder.mkdir()
        run_verb(folder, "train", *command, *more)
    one, two = (load_file(folder / "runs/run/distill/model.safetensors") for folder in folders)
    # Sums in another order are 1e-5 apart after six steps of Adam, of which each moves a weight by up to 3e-4.
    assert all((one[name] - two[name]).abs().max() < 5e-5 for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["hipa", "lcm_lora"])
def test_adapters_of_one_step_make_the_same_images_in_plain_diffusers(
    sd: Path, tmp_path: Path, recipe: str
) -> None:
    """Their LoRA, loaded by a stock pipeline with a stock scheduler."""
    from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline

    more = ("student.lora.rank=2", "stages.export.format=lora", "stages.distill.steps=3")
    more += ("stages.distill.method.features=null",) if recipe == "hipa" else ()
    run_verb(tmp_path, "train", *options(sd, "name=run", *more, recipe=recipe))
    run = tmp_path / "runs" / "run"
    student = load_model(run / "distill")
    assert student.denoiser.coupling == ("endpoint" if recipe == "hipa" else "few_step")
    own = trained_parameters(student.denoiser.net)
    assert len(own) == 2 * 4 * 8, "A and B of four projections of eight attentions"
    assert all(bool(p.any()) for p in own.values())
    pipe = StableDiffusionPipeline.from_pretrained(sd / "sd", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    pipe.scheduler = (
        DDIMScheduler.from_config(config, timestep_spacing="trailing")
        if recipe == "hipa"
        else LCMScheduler.from_config(config)
    )
    z, _ = student.noises(0, "sample", torch.tensor([0]))
    call = {"prompt": "a dog", "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt"}
    plain = pipe(latents=z, **call).images
    pipe.load_lora_weights(str(run / "export"), weight_name="pytorch_lora_weights.safetensors")
    made = pipe(latents=z, **call).images
    ours = (student.sample(1, prompt="a dog", steps=1) + 1) / 2
    torch.testing.assert_close(made, ours, rtol=0, atol=1e-4)
    assert (made - plain).abs().max() > 1e-3


@pytest.mark.slow
def test_agd_on_prompts(sd: Path, tmp_path: Path) -> None:
    """Cross-attention terms that read the prompts, and the other kinds on the same base."""
    terms = ("student.lora.rank=0", "student.lora.guidance.kind=attention", "student.lora.guidance.width=8")
    chosen = [each for each in options(sd, "name=run", recipe="agd") if "models.teacher" not in each]
    run_verb(tmp_path, "train", *chosen, *terms, "eval.count=4")
    run = tmp_path / "runs" / "run"
    batch = Pairs(run / "pairs").fetch(torch.arange(3), torch.arange(3))
    assert batch.path.shape == (3, 9, 4, 8, 8)
    assert batch.guidance.shape == (3,)
    student = distill.load(run / "export")
    images = student.sample(2, prompt="a dog", guidance_w=0.0)
    assert not torch.equal(images, student.sample(2, prompt="a dog", guidance_w=3.0))
    with pytest.raises(
        ValueError, match=r"guidance_scale: found 2.0, but this model applies the guidance itself"
    ):
        student.sample(1, guidance_scale=2.0)
    base = load_model(run / "teacher")
    wanted = base.sample(1, steps=2)
    assert not torch.equal(base.sample(1, steps=2, guidance_scale=3.0), wanted)
    for kind in ("embedding", "offset", "attention"):
        lora = {"rank": 0, "guidance": {"kind": kind, "width": 8}}
        model = adapted(base.denoiser, {"lora": lora})
        blocks = {"embedding": 1, "offset": 8, "attention": 8}[kind]
        assert len(model.net.terms) in (blocks, 4), kind
        spec = replace(base.spec, guidance_w=1.0, guidance_w_range=(0.0, 3.0))
        assert torch.equal(Generator(model, spec).sample(1, steps=2), wanted), "identity at the start"


ALL = {
    "instaflow": (),
    "progressive": ("halve.start=8",),
    "consistency": (),
    "consistency_training": (),
    "lcm": (),
    "lcm_lora": ("student.lora.rank=2",),
    "sid": (),
    "dmd": ("stages.distill.method.gan={}",),
    "disback": (),
    "mmd": ("stages.second=null",),
    "mmd_polish": ("stages.second=null",),
}
BOTH = [(name, adapters) for name in ALL for adapters in (False, True) if not (adapters and "lcm" in name)]


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "adapters"), BOTH)
def test_every_recipe_takes_prompts(sd: Path, tmp_path: Path, recipe: str, adapters: bool) -> None:
    """With all weights and with adapters, from the folder to the export."""
    more = [*ALL[recipe], *(["student=lora", "student.lora.rank=2"] if adapters else [])]
    if recipe in ("instaflow", "mmd_polish"):  # with a stage that trains a flow
        more = [*more, "student.process=flow"] if adapters else ["student=flow"]
    chosen = options(sd, "name=run", "eval.count=4", recipe=recipe, flow=False)
    call_verb(tmp_path, "train", *chosen, *more, check=True)
    run = tmp_path / "runs" / "run"
    stored = json.loads((run / "export" / "model.json").read_text())
    assert ("base" in stored) == (adapters or recipe == "lcm_lora")
    assert distill.load(run / "export").sample(1).shape == (1, 3, 16, 16)
