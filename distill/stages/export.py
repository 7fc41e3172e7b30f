"""The Export stage: a self-contained folder with weights, sampler and model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from distill.evaluation.protocol import Protocol
from distill.exporters.card import card
from distill.files import copy, read_json, write_json, write_text
from distill.models.description import DESCRIPTION, WEIGHTS
from distill.models.native import load_model, save_model
from distill.models.prompts import FILES as PROMPT_FILES
from distill.stages.base import MODEL_FILES, ModelStage, Stage, StageContext, check_types, check_which
from distill.stages.evaluate import Evaluate
from distill.stages.monitor import model_folder
from distill.stages.ownership import patterns


@dataclass
class Export(Stage):
    """Export weights, sampler, model card, picture and table of a model.

    Attributes:
        student: name of the stage whose model is exported.
        evaluate: name of the Evaluate stage whose table and picture the card contains, or None.
        which: "last", the model at the end of training, or "best", the one chosen by its `monitor`.
    """

    REFERENCES: ClassVar[tuple[str, ...]] = ("student", "evaluate")
    FILES: ClassVar[tuple[str, ...]] = (
        *MODEL_FILES,
        *patterns("README.md", "grid.png", "metrics.json", *PROMPT_FILES),
    )
    NEEDED: ClassVar[tuple[str, ...]] = (WEIGHTS, DESCRIPTION, "README.md")

    student: str
    evaluate: str | None = None
    which: str = "last"

    def __post_init__(self) -> None:
        check_types(self)

    def check(self, stages: Mapping[str, Stage]) -> None:
        """Raise ValueError unless student and evaluation are stages of the right kind and of the same model."""
        super().check(stages)
        if not isinstance(stages[self.student], ModelStage):
            raise ValueError(f"student: {self.student!r} makes no model; expected a stage with a model")
        check_which(self.which, self.student, stages)
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

    def run(self, context: StageContext) -> dict[str, Any]:
        """Copy the model, write the card, load the export and check that it draws the same samples as the original."""
        if not context.world.main:
            return {}
        source = model_folder(context.inputs["student"], self.which)
        original = load_model(source)
        conditions = original.conditions.exported(context.folder)
        save_model(context.folder, original.denoiser.with_(conditions=conditions), original.spec)
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
        write_text(
            context.folder / "README.md",
            card(context.recipe, original, rows, protocol, grid=picture, note=note),
        )
        with context.display.bar(1, unit="check") as bar:
            again = load_model(context.folder)
            if not torch.equal(original.sample(4), again.sample(4)):
                raise RuntimeError(f"{context.folder}: the export does not reproduce the samples of {source}")
            bar.update()
        return {"parameters": sum(p.numel() for p in again.denoiser.parameters())}
