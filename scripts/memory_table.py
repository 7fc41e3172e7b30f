"""Predicted memory of the trainings of real teachers, as the tables of docs/teachers.md: python scripts/memory_table.py

Nothing is allocated: the teachers are folders with the configs of `tests/shapes`, and their networks are on the meta device.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from distill.engine.memory import KINDS, Memory  # noqa: E402
from distill.recipe.compose import CONFIGS, recipes, register_recipes  # noqa: E402
from distill.recipe.expand import expand  # noqa: E402
from distill.recipe.plan import build_stages, dry_run  # noqa: E402
from distill.recipe.schema import read  # noqa: E402

SHAPES = ROOT / "tests" / "shapes"
FAMILIES = {"sd15": "SD 1.5", "sdxl": "SDXL"}
# Layers of LCM-LoRA's adapters (diffusers' train_lcm_distill_lora_*).
LCM_TARGETS = [
    *(
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "proj_in",
        "proj_out",
        "ff.net.0.proj",
        "ff.net.2",
        "conv1",
        "conv2",
    ),
    *("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
]
# Adapters stand on a frozen base in bfloat16; a whole student is trained in float32.
STUDENTS: dict[str, tuple[str, ...]] = {
    "all weights": (),
    "LoRA of rank 64, LCM-LoRA's layers": (
        *("student=lora", "teacher.dtype=bfloat16", "student.lora.rank=64"),
        f"student.lora.targets=[{','.join(LCM_TARGETS)}]",
    ),
    "LoRA of rank 16, attention": ("student=lora", "teacher.dtype=bfloat16"),
}


def sketched_teacher(folder: Path, shape: str) -> Path:
    """Write a pipeline's folder with the configs of `tests/shapes/<shape>.json` and weights of no size."""
    for name, content in json.loads((SHAPES / f"{shape}.json").read_text()).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        if path.name == "config.json":
            save_file({"none": torch.zeros(1)}, path.parent / "model.safetensors")
    (folder / "prompts.txt").write_text("a dog\n")
    return folder


def memories(folder: Path, recipe: str, *options: str) -> dict[str, Memory]:
    """stage -> predicted memory of the stages of a recipe with the teacher of a folder."""
    register_recipes()
    given = [
        *(f"recipe={recipe}", "teacher=pipeline", f"teacher.path={folder}"),
        *(
            "data=prompts",
            f"data.path={folder / 'prompts.txt'}",
            "eval=prompts",
            "++stages.distill.monitor=null",
        ),
        *options,
    ]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        made = dry_run(build_stages(expand(read(compose("config", given)))))
    return {name: each.memory for name, each in made.items() if each.memory is not None}


PAIRS = (
    "+stage@stages.pairs=generate",
    "stages.pairs.teacher=teacher",
    "stages.pairs.count=8",
    "stages.distill.data=pairs",
)
# column -> (stage, recipe, options) of a whole student, and of adapters.
METHODS = {
    "reflow": (
        ("reflow", "instaflow", ("student=flow",)),
        ("reflow", "instaflow", ("student.process=flow",)),
    ),
    "lcm": (
        ("distill", "lcm", ("stages.distill.adapt.net.guidance_embedding=256", *PAIRS)),
        ("distill", "lcm_lora", PAIRS),
    ),
    "sid": (("distill", "sid", ()),) * 2,
    "dmd": (("distill", "dmd", ()),) * 2,
    "dmd with a GAN": (("distill", "dmd", ("stages.distill.method.gan={}", *PAIRS)),) * 2,
}


def table() -> str:
    """The table in Markdown: GiB of one process without activations."""
    lines = [f"| teacher | student | {' | '.join(METHODS)} |", "|---|---|" + "---|" * len(METHODS)]
    for shape, label in FAMILIES.items():
        with tempfile.TemporaryDirectory() as place:
            folder = sketched_teacher(Path(place), shape)
            for student, options in STUDENTS.items():
                cells = []
                for whole, adapter in METHODS.values():
                    stage, recipe, more = adapter if options else whole
                    memory = memories(folder, recipe, *options, *more)[stage]
                    cells.append(f"{sum(memory.total().values()) / 2**30:.1f}")
                lines.append(f"| {label} | {student} | {' | '.join(cells)} |")
                print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def presets() -> str:
    """The table of the recipes of papers: the largest of their trainings, and what it is made of."""
    lines = [f"| recipe | {' | '.join(KINDS)} | together |", "|---|" + "---|" * (len(KINDS) + 1)]
    for name in (name for name in recipes() if name.startswith("paper/")):
        with tempfile.TemporaryDirectory() as place:
            shape = next(shape for shape in FAMILIES if name.endswith(shape))
            totals = [
                m.total() for m in memories(sketched_teacher(Path(place), shape), name).values() if m.updates
            ]
        largest = max(totals, key=lambda total: sum(total.values()))
        cells = [*largest.values(), sum(largest.values())]
        lines.append(f"| `{name}` | {' | '.join(f'{cell / 2**30:.1f}' for cell in cells)} |")
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"{table()}\n\n{presets()}")
