"""The section of a card that says how an export is used in other programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.exporters.schedulers import Stock
from distill.models.generator import Generator


def called(call: Mapping[str, Any], generator: Generator) -> str:
    """Arguments of a pipeline's call as Python, with what is drawn."""
    first = {"prompts": ['"a dog"'], "labels": ["class_labels=[3]"]}.get(generator.conditions.kind, [])
    return ", ".join([*first, *(f"{name}={value!r}" for name, value in call.items())])


def steps(generator: Generator) -> str:
    """Exact times and guidance, for every program."""
    spec = generator.spec
    times = ", ".join(f"{time:.10g}" for time in spec.grid(generator.denoiser.process).tolist())
    learned = (
        ""
        if spec.guidance_baked == 1
        else f"; it has learned the guidance {spec.guidance_baked:g}: do not add any"
    )
    return f"Made for {spec.steps} step(s) at the times {times} (the last is the end){learned}."


def of_pipeline(generator: Generator, call: Mapping[str, Any], stock: Stock | None) -> str:
    """Of a folder of diffusers."""
    given = called(call, generator)
    load = [
        "from diffusers import DiffusionPipeline",
        "",
        'pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")',
    ]
    note = "The defaults of diffusers are other steps and another guidance: pass these arguments."
    if stock is None:
        load.insert(1, "from pipeline import ExactScheduler  # pipeline.py of this folder")
        load.append("pipe.scheduler = ExactScheduler()")
        note = "No stock scheduler of diffusers takes these steps: the one in `scheduler` is the teacher's. Use `pipeline.py`."
    return "\n\n".join([_python([*load, f"images = pipe({given}).images"]), note, steps(generator)])


def of_lora(generator: Generator, file: str, call: Mapping[str, Any] | None, stock: Stock | None) -> str:
    """Of a LoRA file; `call`: None for nets of this package."""
    if call is None:
        text = (
            f"`{file}` has the names of the net's layers, and rank, alpha and layers in its header (`lora_adapter_metadata`). "
            f"It is a start for training: `student=lora student.lora.file={file}`."
        )
        return "\n\n".join([text, steps(generator)])
    load = ["from diffusers import DiffusionPipeline" + ("" if stock is None else f", {stock.name}"), ""]
    load += ['pipe = DiffusionPipeline.from_pretrained("path/to/the/base")']
    load += [f'pipe.load_lora_weights("path/to/this/folder", weight_name="{file}")']
    note = ""
    if stock is None:
        note = "No stock scheduler of diffusers takes these steps: format=diffusers writes one beside the whole pipeline."
    else:
        load.append(f"pipe.scheduler = {stock.name}(**{stock.config!r})")
    code = _python([*load, f"images = pipe({called(call, generator)}).images"])
    return "\n\n".join(part for part in (code, note, steps(generator)) if part)


def of_workflow(generator: Generator, file: str) -> str:
    """Of a workflow of ComfyUI."""
    place = "loras" if "lora" in file else "diffusion_models"
    return "\n\n".join(
        [
            f"Copy `{file}` into ComfyUI's `models/{place}`, load `workflow.json`, and choose the checkpoint of the base in "
            f"its first node. The sampler, its noise levels and cfg {generator.spec.guidance_scale:g} are those of the "
            "student: keep them.",
            steps(generator),
        ]
    )


def _python(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])
