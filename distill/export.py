"""`python -m distill.export model=runs/sid/distill format=lora out=FOLDER`: a model as files for other programs."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from distill import terminal
from distill.exporters import export, hub
from distill.exporters.card import card
from distill.files import make_folder, read_json, write_text
from distill.stages.ownership import PLAN, is_run


@dataclass
class Options:
    """Options:

    model: a model folder: of a stage, or a native export
    out: a new folder
    format: native, diffusers, lora or comfyui
    merged: of a model with an adapter, add its terms to the weights
    pipeline: folder of the diffusers pipeline that the model was made from; null: the one that encoded its prompts
    variant: of the weights in that folder: fp16 for model.fp16.safetensors
    export_dtype: type that the network's parameters are stored in: float32, float16 or bfloat16; null: their own
    file_bytes: the most bytes of weights in one file; above it there are several, and an index
    push_to_hub: OWNER/NAME of a model on the Hugging Face hub that the folder is uploaded to
    dry_run: only say what would be uploaded"""

    model: str = ""
    out: str = ""
    format: str = "native"
    merged: bool = False
    pipeline: str | None = None
    variant: str | None = None
    export_dtype: str | None = None
    file_bytes: int = 5_000_000_000
    push_to_hub: str | None = None
    dry_run: bool = True


def parse(arguments: list[str]) -> Options:
    """Parse `key=value` arguments. Raises ValueError naming the key."""
    options = terminal.read_options(Options, arguments)
    if not options.model:
        raise ValueError("model: missing; expected a model folder, such as model=runs/sid/distill")
    if not options.out:
        raise ValueError("out: missing; expected a new folder, such as out=my_student")
    if os.path.lexists(Path(options.out).expanduser()):
        raise ValueError(f"out: {options.out} exists; expected a new folder")
    hub.check(options.push_to_hub, options.dry_run)
    return options


def name_of(source: Path) -> str:
    """The recipe of the run that a model folder belongs to; the folder's name without a run."""
    plan = source.parent / PLAN
    found = read_json(plan).get("recipe") if is_run(source.parent) and plan.is_file() else None
    return found if isinstance(found, str) else source.name


def main() -> None:
    """Export into a folder beside `out`, which is renamed when everything is checked."""
    with terminal.report_errors():
        if terminal.asked_for_help(__doc__, Options.__doc__):
            return
        options = parse(sys.argv[1:])
        source, out = Path(options.model).expanduser(), Path(options.out).expanduser().absolute()
        wanted = export.Options(**{f.name: getattr(options, f.name) for f in fields(export.Options)})
        part = out.with_name(f".{out.name}.{os.getpid()}.part")
        try:
            make_folder(part)
            made = export.export(source, part, wanted, name := name_of(source.absolute()))
            page = card(name, made.generator, [], None, grid=False, use=made.use)
            write_text(part / "README.md", page)
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        print(terminal.printable("\n".join([f"{options.out}: {options.format}", *made.lines()])))
        if options.push_to_hub is not None:
            print(terminal.printable("\n".join(hub.push(out, options.push_to_hub, options.dry_run))))


if __name__ == "__main__":
    main()
