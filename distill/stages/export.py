"""The Export stage: a self-contained folder with weights, sampler and model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from distill.evaluation.protocol import Protocol
from distill.exporters import comfyui, export, lora, pipeline
from distill.exporters.card import card
from distill.files import copy, read_json, write_json, write_text
from distill.models.prompts import FILES as PROMPT_FILES
from distill.stages.base import MODEL_FILES, ModelStage, Stage, StageContext, check_types, check_which
from distill.stages.evaluate import Evaluate
from distill.stages.made import Made
from distill.stages.monitor import model_folder
from distill.stages.ownership import patterns
from distill.stages.pretrained import Pretrained


@dataclass
class Export(Stage):
    """Export a model with its sampler, and a card with picture and table.

    Attributes:
        student: name of the stage whose model is exported.
        evaluate: name of the Evaluate stage whose table and picture the card contains, or None.
        which: "last", the model at the end of training, or "best", the one chosen by its `monitor`.
        format, merged, pipeline, variant, export_dtype: see `exporters.export.Options`; pipeline and variant null: those of the
            run's Pretrained stage, or of the text encoders of the model's prompts.
    """

    REFERENCES: ClassVar[tuple[str, ...]] = ("student", "evaluate")
    FILES: ClassVar[tuple[str, ...]] = (
        *MODEL_FILES,
        *patterns("README.md", "grid.png", "metrics.json", *PROMPT_FILES, *lora.FILES, *comfyui.FILES),
        *pipeline.FILES,
    )

    student: str
    evaluate: str | None = None
    which: str = "last"
    format: str = "native"
    merged: bool = False
    pipeline: str | None = None
    variant: str | None = None
    export_dtype: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        self._options = export.Options(
            self.format, self.merged, self.pipeline, self.variant, self.export_dtype
        )

    @classmethod
    def needed(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The card, and the format's main files."""
        return ("README.md", *export.NEEDED[config.get("format", "native")])

    def check(self, stages: Mapping[str, Stage]) -> None:
        """Raise ValueError unless student and evaluation are stages of the right kind and of the same model."""
        super().check(stages)
        if not isinstance(stages[self.student], ModelStage):
            raise ValueError(f"student: {self.student!r} makes no model; expected a stage with a model")
        check_which(self.which, self.student, stages)
        teachers = [stage for stage in stages.values() if isinstance(stage, Pretrained)]
        if self.pipeline is None and len(teachers) == 1:
            self._options = replace(self._options, pipeline=teachers[0].path, variant=teachers[0].variant)
        if self.evaluate is None:
            return
        evaluated = stages[self.evaluate]
        if not isinstance(evaluated, Evaluate):
            raise ValueError(f"evaluate: {self.evaluate!r} is not an Evaluate stage; expected one, or null")
        for label, row in evaluated.models.items():
            if row.stage == self.student and row.which != self.which:
                raise ValueError(
                    f"which: found {self.which!r}, but {self.evaluate}.models.{label} measures the {row.which} model; "
                    "expected the same in both, because the card shows these numbers"
                )

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """Raise ValueError or FileNotFoundError where the student cannot be exported so."""
        student = before[self.student].model
        assert student is not None  # checked by `check`
        export.check(student, self._options)
        return Made()

    def run(self, context: StageContext) -> dict[str, Any]:
        """Export the model and check the export, then write the card."""
        if not context.world.main:
            return {}
        with context.display.bar(1, unit="check") as bar:
            source = model_folder(context.inputs["student"], self.which)
            options = replace(self._options, file_bytes=context.settings.file_bytes)
            made = export.export(source, context.folder, options, context.recipe)
            bar.update()
        rows, picture, note = [], False, ""
        protocol: Protocol | None = None
        if "evaluate" in context.inputs:
            metrics = read_json(context.inputs["evaluate"] / "metrics.json")
            write_json(context.folder / "metrics.json", metrics)
            rows, note = metrics["rows"], metrics["note"]
            protocol = Protocol.from_dict(metrics["protocol"])
            grid = context.inputs["evaluate"] / "grid.png"
            picture = grid.is_file()
            if picture:
                copy(grid, context.folder / "grid.png")
        page = card(context.recipe, made.generator, rows, protocol, grid=picture, note=note, use=made.use)
        write_text(context.folder / "README.md", page)
        return made.facts
