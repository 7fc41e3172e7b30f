"""A workflow of ComfyUI in its API format, with the exact noise levels of a student, beside the file that it loads.

Only nodes of ComfyUI's core. Its samplers take noise levels sigma / alpha: networks of a table of betas get the index of the
nearest level, flows sigma itself. The first state is unit noise at the last level of the model, else noise of the first level.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill.exporters import lora
from distill.exporters.pipeline import check_network, core_of, sampling
from distill.exporters.schedulers import ALIKE, Case, case_of
from distill.files import write_json, write_safetensors
from distill.models.adapters import adapter_of
from distill.models.families.core import Core
from distill.models.families.flux import Flux
from distill.models.families.sd import SD
from distill.models.families.sd3 import SD3
from distill.models.families.sdxl import SDXL
from distill.models.generator import Generator
from distill.models.pretrained import DTYPES, Folder
from distill.models.prompts import Prompts
from distill.process.flow import Flow
from distill.process.vp import VPScaledLinear

WORKFLOW, LORA, MODEL = FILES = ("workflow.json", "student_lora.safetensors", "student_model.safetensors")
SAMPLING = {"eps": "eps", "v": "v_prediction", "x0": "x0"}
Node = dict[str, Any]


def write(
    folder: Path, generator: Generator, pipeline: Folder, facts: Mapping[str, Any], *, dtype: str | None
) -> dict[str, float]:
    """Write the workflow, and the adapter of a model or its network, with the names that ComfyUI knows.

    dtype: of the stored network; None: its own.

    Returns:
        file -> see `exporters.lora.write`, of an adapter.

    Raises:
        ValueError: names `format`: steps, a start, an input or a family that ComfyUI's nodes do not have; or `pipeline`.
    """
    core = core_of(generator)
    sigmas = levels(generator)
    check_network(pipeline, core)
    found: dict[str, float] = {}
    if adapter_of(generator.denoiser.net) is None:
        weights = core.net.state_dict()
        if dtype is not None:
            weights |= {name: p.to(DTYPES[dtype]) for name, p in core.net.named_parameters()}
        write_safetensors(folder / MODEL, weights)
    else:
        found = lora.write(folder, generator.denoiser, pipeline, facts, kohya=LORA)
    write_json(folder / WORKFLOW, workflow(generator, pipeline, sigmas))
    return found


def levels(generator: Generator) -> list[float]:
    """Noise levels of the network's calls, and 0. Raises ValueError naming `format`."""
    core, spec = core_of(generator), generator.spec
    if not isinstance(core, SD | SDXL | SD3 | Flux):
        raise _refused(f"networks of the class {type(core).__name__} have no loader in it")
    if spec.guidance_w is not None:
        raise _refused("its nodes cannot give the network the guidance as an input; train with embed_w=false")
    case = case_of(generator, ())
    if case is None or case.raw or (case.boundary is not None and not case.boundary_is_small):
        raise _refused(
            "its samplers do not take the model's steps; format=diffusers writes a script that does"
        )
    if isinstance(case.process, Flow):
        if case.times[0] != 1 or case.start != 1:
            raise _refused(f"its flows start at t = 1, the model at {case.times[0]:g}")
        return [*case.times[:-1], 0.0]
    return _table_levels(case)


def _table_levels(case: Case) -> list[float]:
    if case.process.config() != VPScaledLinear().config():
        raise _refused(f"its model has the betas of {VPScaledLinear()!r} alone, found {case.process!r}")
    if any(time != int(time) for time in case.times[:-1]):
        raise _refused(f"its network gets whole indices of the table, the model {list(case.times[:-1])}")
    times = torch.tensor(case.times[:-1], dtype=torch.float64)
    sigma, alpha = case.process.sigma(times), case.process.alpha(times)
    first = 1.0 if case.times[0] == case.process.t_max else float(sigma[0])
    if abs(case.start - first) > ALIKE:
        raise _refused(
            f"it starts at t = {case.times[0]:g} with {first:.4g} times unit noise, the model with {case.start:.4g}"
        )
    return [*(sigma / alpha).tolist(), 0.0]


def workflow(generator: Generator, pipeline: Folder, sigmas: list[float]) -> dict[str, Node]:
    """The nodes by number. The user puts the base's checkpoint in the first one."""
    core, spec = core_of(generator), generator.spec
    _, height, width = generator.shape
    case = case_of(generator, ())
    assert case is not None
    nodes: dict[str, Node] = {}

    def add(kind: str, **inputs: Any) -> list[Any]:
        nodes[str(len(nodes) + 1)] = {"class_type": kind, "inputs": inputs}
        return [str(len(nodes)), 0]

    base = add("CheckpointLoaderSimple", ckpt_name=f"{pipeline.path.name}.safetensors")
    clip, vae = [base[0], 1], [base[0], 2]
    if adapter_of(generator.denoiser.net) is not None:
        model = add("LoraLoaderModelOnly", model=base, lora_name=LORA, strength_model=1.0)
    else:
        model = add("UNETLoader", unet_name=MODEL, weight_dtype="default")
    if not isinstance(case.process, Flow):
        model = add("ModelSamplingDiscrete", model=model, sampling=SAMPLING[case.kind], zsnr=False)
    positive = _encoded(add, core, clip, _prompt(generator))
    negative = _encoded(add, core, clip, str(sampling(generator, pipeline)[1].get("negative_prompt", "")))
    if isinstance(core, SDXL) and not any(float(null.abs().max()) for null in _nulls(generator)):
        negative = add("ConditioningZeroOut", conditioning=negative)
    guider = add("CFGGuider", model=model, positive=positive, negative=negative, cfg=spec.guidance_scale)
    latents = "EmptyLatentImage" if isinstance(core, SD | SDXL) else "EmptySD3LatentImage"
    sampled = add(
        "SamplerCustomAdvanced",
        noise=add("RandomNoise", noise_seed=0),
        guider=guider,
        sampler=add("KSamplerSelect", sampler_name="lcm" if case.fresh else "euler"),
        # The node reads plain decimals alone.
        sigmas=add("ManualSigmas", sigmas=", ".join(f"{sigma:.10f}" for sigma in sigmas)),
        latent_image=add(latents, width=width, height=height, batch_size=1),
    )
    images = add("VAEDecode", samples=sampled, vae=vae)
    add("SaveImage", images=images, filename_prefix="student")
    return nodes


def _encoded(add: Any, core: Core, clip: list[Any], text: str) -> list[Any]:
    if isinstance(core, SDXL):
        names = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
        sizes = {name: int(number) for name, number in zip(names, core.time_ids, strict=True)}
        return list(add("CLIPTextEncodeSDXL", clip=clip, text_g=text, text_l=text, **sizes))
    made = add("CLIPTextEncode", text=text, clip=clip)
    if isinstance(core, Flux) and core.guidance is not None:
        made = add("FluxGuidance", conditioning=made, guidance=core.guidance)
    return list(made)


def _prompt(generator: Generator) -> str:
    assert isinstance(generator.conditions, Prompts)  # of these families
    return generator.conditions.table.prompts[0]


def _nulls(generator: Generator) -> list[torch.Tensor]:
    assert isinstance(generator.conditions, Prompts)
    return list(generator.conditions.table.nulls.values())


def _refused(why: str) -> ValueError:
    return ValueError(f"format: found 'comfyui', but {why}")
