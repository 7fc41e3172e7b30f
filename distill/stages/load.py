"""The Load stage: copies an existing model into the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from distill.files import canonical_json, copy, read_json, sha256_file, sha256_text, write_json
from distill.models.description import DESCRIPTION, Description
from distill.models.native import load_model, model_files, placed, sketch_model
from distill.models.prompts import FILES as PROMPT_FILES
from distill.models.weights import weights_digest, weights_path
from distill.stages.base import MODEL_FILES, ModelStage, StageContext
from distill.stages.made import Made, try_model
from distill.stages.ownership import needed, patterns


@dataclass
class Load(ModelStage):
    """Load an existing model: a training stage of another run, or an export.

    Attributes:
        path: a model folder (model.json, and model.safetensors or several files with an index).
    """

    FILES: ClassVar[tuple[str, ...]] = (*MODEL_FILES, *patterns(*PROMPT_FILES))

    path: str
    _found: str | None = field(default=None, init=False, repr=False)  # digest of the model at `path`

    def fingerprint(self) -> str:
        """Return the sha256 of the weights and of their description, which names the digest of prompts."""
        self._found = self._digest(Path(self.path))
        return self._found

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """Load the model; large ones without weights."""
        return Made(model=try_model(Path(self.path)))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Copy the model into the run, and check the copy."""
        source = Path(self.path)
        if context.world.main:
            for path in model_files(source)[:-1]:
                copy(path, context.folder / path.name)
            if Description.read(source).base is None:
                copy(source / DESCRIPTION, context.folder / DESCRIPTION)
            else:
                described = placed(read_json(source / DESCRIPTION), source, context.folder)
                write_json(context.folder / DESCRIPTION, described)
            sketch_model(source).denoiser.conditions.copy_to(context.folder)
        context.world.barrier()
        if self._found not in (None, self._digest(context.folder)):
            raise ValueError(f"path: {source} changed during the run; start the run again")
        load_model(context.folder)
        return {"train_seconds": None, "peak_memory_bytes": None}

    @staticmethod
    def _digest(folder: Path) -> str:
        base = Description.read(folder).base
        files = [needed(path, "a model folder") for path in (weights_path(folder), folder / DESCRIPTION)]
        weights = weights_digest(files[0])
        if base is None:
            return weights + sha256_file(files[1])
        # Wherever the base lies, it is the same.
        described = read_json(folder / DESCRIPTION) | {"base": base.sha256}
        return weights + sha256_text(canonical_json(described))
