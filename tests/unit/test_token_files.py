"""Public files of LlamaGen and VAR: networks, tokenizers and students come back from them; bad files are named."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import token_files_support as files
import torch
from tests_support import call_verb
from torch.testing import assert_close

from distill.data.cond import Cond
from distill.data.rng import sample_noise
from distill.models.decoder import VQ, codebook_of
from distill.models.native import load_model
from distill.nets.llamagen import LlamaGen
from distill.nets.tokenizer import nearest_codes
from distill.nets.vq import VQTokenizer
from distill.stages.token_files import TokenFiles

OPTIONS = {
    "llamagen": {"family": "llamagen", "path": "gpt.pt", "tokenizer": "vq.pt", "heads": 2, "resolution": 8},
    "var": {"family": "var", "path": "var.pth", "tokenizer": "vae.pth", "scales": list(files.SCALES)},
}
OPTIONS["var_shared"] = OPTIONS["var"]
MAKE = {"llamagen": files.llamagen, "var": files.var, "var_shared": partial(files.var, shared=True)}
families = pytest.mark.parametrize("family", ["llamagen", "var", "var_shared"])
STUDENT = {"timesteps": [0, 2], "split": 2, "guidance_scale": 2.0, "top_k": 8000}


def stage(known: str, **options) -> TokenFiles:
    return TokenFiles(**OPTIONS[known] | options)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_of_the_public_files(here: Path):
    """Some of the names, as the public scripts write them."""
    files.llamagen(here)
    files.var(here)
    known = torch.load(here / "vq.pt", weights_only=True)["model"]
    assert {
        "encoder.conv_blocks.0.downsample.conv.weight",
        "encoder.conv_blocks.1.attn.0.q.bias",
        "encoder.conv_blocks.1.res.0.nin_shortcut.weight",
        "encoder.mid.1.proj_out.weight",
        "decoder.conv_blocks.0.attn.1.norm.weight",
        "decoder.conv_blocks.0.upsample.conv.weight",
        "decoder.conv_blocks.1.res.1.conv2.weight",
        "decoder.norm_out.weight",
        "quantize.embedding.weight",
        "post_quant_conv.weight",
    } <= set(known)
    known = torch.load(here / "vae.pth", weights_only=True)
    assert {
        "encoder.down.1.attn.0.qkv.weight",
        "decoder.up.0.block.1.norm1.weight",
        "decoder.up.1.upsample.conv.bias",
        "decoder.mid.attn_1.norm.bias",
        "quantize.quant_resi.qresi_ls.3.weight",
        "quantize.embedding.weight",
    } <= set(known)


@torch.no_grad()
@families
def test_a_teacher_comes_back_from_its_files(here: Path, family: str):
    net, vq = MAKE[family](here)
    loaded = stage(family)._load()
    model = loaded.denoiser
    assert torch.equal(codebook_of(model.decoder), vq.codes())
    assert model.guidable
    assert model.conditions.num_classes == 10
    net.codebook.copy_(vq.codes())
    codes = vq.codes()[torch.randint(0, 16, (2, sum(net.groups)), generator=torch.Generator().manual_seed(5))]
    cond, t = Cond.of_labels(torch.tensor([3, 7])), torch.zeros(2)
    for each in (cond, cond.null()):
        assert torch.equal(model(codes, t, each), net(codes, t, each))
    assert_close(model.decoder.decode(codes), vq.decode(codes))
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(6)) * 2 - 1
    assert torch.equal(model.decoder.encode(images), VQ(vq).encode(images))
    z = sample_noise(0, "z", torch.arange(2), model.sample_shape)
    made = model.transport(z, cond, guidance_scale=2.0)[0]
    assert torch.equal(made, vq.codes()[nearest_codes(made, vq.codes())])
    assert loaded.sample(2).shape == (2, 1, 8, 8)
    sketch = stage(family).dry_run({})
    assert all(p.is_meta for p in sketch.model.denoiser.parameters())
    assert sum(sketch.memory.total().values()) > 0


@torch.no_grad()
@families
def test_a_student_comes_back_from_its_files(here: Path, family: str):
    """Of a checkpoint with averages these are read. Guidance of its pairs is recorded, and refused."""
    net, vq = MAKE[family](here, student=True)
    loaded = stage(family, student=STUDENT)._load()
    model, groups = loaded.denoiser, list(net.groups)
    net.codebook.copy_(vq.codes())
    net.split = sum(groups[:2])
    z = sample_noise(0, "z", torch.arange(2), model.sample_shape)
    cond = Cond.of_labels(torch.tensor([3, 7]))
    one = net(z, torch.ones(2), cond)
    assert torch.equal(loaded.generate(z, cond, steps=1), one)
    known = sum(groups[:2])
    again = torch.cat([one[:, :known], z[:, known:]], 1)
    assert torch.equal(
        loaded.generate(z, cond, steps=2), net(again, torch.full((2,), 1 - 2 / len(groups)), cond)
    )
    with pytest.raises(ValueError, match="guidance 2, temperature 1, top-k 8000, top-p off is baked into"):
        loaded.sample(1, guidance_scale=2.0)


def test_the_convolutions_are_those_of_diffusers():
    """Its VQModel has the layers of VQ-GAN under other names."""
    import diffusers  # takes seconds

    theirs = diffusers.VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=32,
        vq_embed_dim=4,
        num_vq_embeddings=16,
        norm_num_groups=32,
    )
    files.random(theirs, 0)
    known = theirs.state_dict()
    ours = files.random(VQTokenizer(grid=4, inner=32, **files.VQ), 1)
    changes = {
        "block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1", "mid": "mid_block",
        "norm_out": "conv_norm_out", "nin_shortcut": "conv_shortcut", "downsample": "downsamplers.0",
        "upsample": "upsamplers.0", "block": "resnets", "attn": "attentions", "proj_out": "to_out.0",
        "down": "down_blocks", "embedding": "quantize.embedding",
    }  # fmt: skip
    state = {}
    for name, value in ours.state_dict().items():
        parts = [changes.get(part, part) for part in name.split(".")]
        if parts[1] == "up":
            parts[1:3] = ["up_blocks", str(1 - int(parts[2]))]
        there = ".".join(parts)
        there = there.replace(".norm.", ".group_norm.") if "attentions" in there else there
        found = [known[there.replace("qkv", f"to_{k}")] for k in "qkv"] if "qkv" in there else [known[there]]
        state[name] = torch.cat(found).view(value.shape)
    ours.load_state_dict(state)
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert_close(ours.features(images), theirs.encode(images).latents, atol=1e-5, rtol=1e-4)
        latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))
        wanted = theirs.decode(latents, force_not_quantize=True).sample
        assert_close(ours.pictures(latents), wanted, atol=1e-5, rtol=1e-4)


class Harmful:
    """What a file could run when it is read without care."""

    def __reduce__(self):
        return (open, ("was_run", "w"))


def with_state(**changes: torch.Tensor | None) -> None:
    """`gpt.pt` with other tensors; None: without one."""
    net = files.random(LlamaGen(**files.GPT), 1)
    state = {**files.without(net, "codebook"), **changes}
    torch.save({"model": {name: value for name, value in state.items() if value is not None}}, "gpt.pt")


def cut_tokenizer() -> None:
    """`vq.pt` without the first block of a level."""
    state = torch.load("vq.pt", weights_only=True)["model"]
    torch.save(
        {"model": {name: value for name, value in state.items() if "conv_blocks.1.res.0.conv1" not in name}},
        "vq.pt",
    )


BAD = {
    "no file": (lambda: Path("gpt.pt").unlink(), {}, "path: gpt.pt: no such file; expected a class-conditional GPT"),
    "no tokenizer": (lambda: None, {"tokenizer": "x.pt"}, "tokenizer: x.pt: no such file; expected a tokenizer"),
    "no checkpoint": (lambda: Path("gpt.pt").write_bytes(b"text"), {}, "path: gpt.pt: not readable as weights alone"),
    "code": (lambda: torch.save({"model": Harmful()}, "gpt.pt"), {}, "path: gpt.pt: not readable as weights alone"),
    "no weights": (lambda: torch.save({"steps": 3}, "gpt.pt"), {}, r"path: gpt.pt: found \['steps'\], expected"),
    "missing": (lambda: with_state(**{"norm.weight": None}), {}, "gpt.pt: .*norm.weight: missing"),
    "unknown": (lambda: with_state(more=torch.zeros(1)), {}, "gpt.pt: .*more: unexpected"),
    "shape": (lambda: with_state(**{"norm.weight": torch.ones(3)}), {}, r"norm.weight: found shape \[3\], expected"),
    "numbers": (lambda: with_state(**{"norm.weight": torch.full((32,), torch.nan)}), {}, "norm.weight: found 32 of 32"),
    "type": (lambda: with_state(**{"norm.weight": torch.ones(32).long()}), {}, "norm.weight: found the type int64"),
    "not a GPT": (lambda: None, {"path": "vq.pt"}, "path: vq.pt: cls_embedding.embedding_table.weight: missing"),
    "swapped": (lambda: None, {"tokenizer": "gpt.pt"}, "tokenizer: gpt.pt: encoder.conv_blocks.0: missing; expected"),
    "tokenizer": (cut_tokenizer, {}, r"tokenizer: vq.pt: encoder.down.1.block.0.conv1.weight \(as VAR calls it\): missing"),
    "a student": (lambda: files.llamagen(Path(), student=True), {}, "final_layer_conti.linear.bias: unexpected"),
    "no student": (lambda: None, {"student": STUDENT}, "final_layer_conti.linear.bias: missing"),
    "heads": (lambda: None, {"heads": None}, "heads: found null, but gpt.pt has the width 32"),
    "resolution": (lambda: None, {"resolution": 9}, "resolution: found 9, expected a multiple of 2"),
    "classes": (lambda: None, {"num_classes": 5}, "num_classes: found 5, but the table of gpt.pt has 11 rows"),
    "family": (lambda: None, {"family": "gpt"}, "family: found 'gpt', expected one of llamagen, var"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(here: Path, name: str):
    files.llamagen(here)
    change, options, message = BAD[name]
    change()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        stage("llamagen", **options)._load()
    assert not (here / "was_run").exists()


def test_scales_and_students_are_checked(here: Path):
    files.var(here)
    with pytest.raises(
        ValueError, match=r"scales: found \[1, 2, 3\], but var.pth has 3 scales of 21 positions"
    ):
        stage("var", scales=[1, 2, 3])._load()
    files.var(here, student=True)
    for wrong, message in (
        ({"timesteps": [1]}, r"timesteps: found \[1\], expected numbers of groups that rise from 0"),
        ({"split": 4}, "split: found 4, expected null, or of a student 0 .. 3 scales"),
        ({"step": 4}, "student.step: no such"),
    ):
        with pytest.raises(ValueError, match=message):
            stage("var", student=STUDENT | wrong)._load()


def test_classes_without_a_null_class(here: Path):
    files.llamagen(here)
    model = stage("llamagen", num_classes=11)._load().denoiser
    assert (model.conditions.num_classes, model.guidable) == (11, False)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_a_recipe_starts_from_public_files(tmp_path: Path, family: str):
    """The paper's recipe with tiny files: pairs by the map, student, evaluation, export, and samples of the export."""
    MAKE[family](tmp_path)
    recipe = {"llamagen": "paper/dd_llamagen_l", "var": "paper/dd_var_d16"}[family]
    cheap = ("stages.distill.accumulate=1", "stages.distill.precision=32-true", "profile=smoke", "name=run")
    given = (f"recipe={recipe}", *files.options(recipe, tmp_path), *cheap)
    call_verb(tmp_path, "train", *given, check=True)
    export = tmp_path / "runs/run/export"
    rows = json.loads((tmp_path / "runs/run/metrics.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["teacher", "student", "student"]
    assert (
        "is baked into" in (export / "README.md").read_text()
        or "guidance" in (export / "README.md").read_text()
    )
    call_verb(tmp_path, "sample", f"model={export}", "count=4", "out=out.png", check=True)
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    assert load_model(export).sample(2, label=3).shape == (2, 1, 8, 8)
