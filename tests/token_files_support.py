"""Tiny files in the layout of LlamaGen's and VAR's public ones, with random weights, for images of 8x8 in 10 classes."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.nets.llamagen import LlamaGen
from distill.nets.var import VAR
from distill.nets.vq import ScaleTokenizer, VQTokenizer

SCALES = (1, 2, 4)
VQ = {"channels": 1, "width": 32, "multiples": (1, 2), "blocks": 1, "vocabulary": 16, "size": 4}
GPT = {
    "width": 32,
    "depth": 2,
    "heads": 2,
    "grid": 4,
    "vocabulary": 16,
    "size": 4,
    "num_classes": 10,
    "hidden": 48,
}
TRANSFORMER = {
    "depth": 2,
    "width": 32,
    "heads": 2,
    "scales": SCALES,
    "vocabulary": 16,
    "size": 4,
    "num_classes": 10,
}


def random(net: nn.Module, seed: int) -> nn.Module:
    """The net with weights of which none is zero."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            fan = parameter[0].numel() if parameter.dim() > 1 else 25
            parameter.copy_(torch.randn(parameter.shape, generator=draws) / fan**0.5)
    return net.eval()


def without(net: nn.Module, *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in net.state_dict().items() if not name.startswith(names)}


def llamagen_tokenizer(net: VQTokenizer) -> dict[str, Tensor]:
    """Names of LlamaGen's tokenizer (`tokenizer_image/vq_model.py`): levels are `conv_blocks` in the order in which they run,
    with `res` and `attn`; the middle is a list; query, key and value are three convolutions."""
    levels, made = len(net.encoder.down), {}
    middle = {"block_1": 0, "attn_1": 1, "block_2": 2}
    for name, value in net.state_dict().items():
        name = re.sub(r"mid\.(\w+)\.", lambda found: f"mid.{middle[found[1]]}.", name)
        name = re.sub(r"encoder\.down\.", "encoder.conv_blocks.", name)
        name = re.sub(
            r"decoder\.up\.(\d)", lambda found: f"decoder.conv_blocks.{levels - 1 - int(found[1])}", name
        )
        name = re.sub(r"(conv_blocks\.\d)\.block", r"\1.res", name).replace(
            "embedding.", "quantize.embedding."
        )
        parts = value.chunk(3) if ".qkv." in name else [value]
        made |= {
            name.replace(".qkv.", f".{letter}."): part for letter, part in zip("qkv", parts, strict=False)
        }
    return made | {"quantize.codebook_used": torch.zeros(65536)}


def var_tokenizer(net: ScaleTokenizer) -> dict[str, Tensor]:
    """Names of VAR's tokenizer (`models/vqvae.py`)."""
    made = {
        name.replace("embedding.", "quantize.embedding.").replace(
            "scales.phis.", "quantize.quant_resi.qresi_ls."
        ): value
        for name, value in net.state_dict().items()
    }
    return made | {"quantize.ema_vocab_hit_SV": torch.zeros(len(SCALES), 16)}


def llamagen(folder: Path, *, student: bool = False) -> tuple[LlamaGen, VQTokenizer]:
    """`gpt.pt` as LlamaGen's training writes it, or a student's with averages, and `vq.pt`."""
    net, vq = random(LlamaGen(**GPT, student=student), 1), random(VQTokenizer(grid=4, inner=32, **VQ), 2)
    state = without(net, "codebook")
    weights = {"model": {name: torch.zeros_like(value) for name, value in state.items()}, "ema": state}
    folder.mkdir(exist_ok=True)
    torch.save(
        (weights if student else {"model": state}) | {"args": Namespace(lr=1e-4), "steps": 3},
        folder / "gpt.pt",
    )
    torch.save({"model": llamagen_tokenizer(vq)}, folder / "vq.pt")
    return net, vq


def var(folder: Path, *, student: bool = False, shared: bool = False) -> tuple[VAR, ScaleTokenizer]:
    """`var.pth`, of a student as its training writes it, and `vae.pth`."""
    net = random(VAR(**TRANSFORMER, student=student, shared_adaln=shared), 3)
    vq = random(ScaleTokenizer(scales=SCALES, **VQ), 4)
    if not student:
        net.quantize.load_state_dict(vq.scales.state_dict())
    state = without(net, "codebook", "quantize.")
    state["lvl_1L"] = net.level[None]
    state["attn_bias_for_masking"] = torch.zeros(1, 1, len(net.level), len(net.level))
    folder.mkdir(exist_ok=True)
    torch.save({"trainer": {"ema_parameters": state, "iter": 7}} if student else state, folder / "var.pth")
    torch.save(var_tokenizer(vq), folder / "vae.pth")
    return net, vq


def options(recipe: str, folder: Path) -> list[str]:
    """Options of a paper's recipe for the files in a folder: sizes that are theirs, and digits as the real images."""
    llama = ("gpt.pt", "vq.pt", "teacher.heads=2", "teacher.resolution=8")
    small = {
        "paper/dd_llamagen_l": llama,
        "paper/dd_student": llama,
        "paper/dd_var_d16": ("var.pth", "vae.pth", "teacher.scales=[1,2,4]"),
    }
    path, tokenizer, *sizes = small[recipe]
    given = [f"teacher.path={folder / path}", f"teacher.tokenizer={folder / tokenizer}", *sizes]
    if recipe == "paper/dd_student":
        return [*given, "teacher.student.timesteps=[0,2]", "teacher.student.split=2"]
    return [
        *given,
        "data=digits",
        "~data.resolution",
        "features=digits64",
        "stages.distill.adapt.net.split=1",
        "stages.distill.method.timesteps=[0,2]",
    ]
