"""Stages that make a model of tokens out of others, without training: `Filter`, `Marginals` and `Involve`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill.cache.pairs import Pairs
from distill.models.decoder import codebook_of
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.involved import Involved
from distill.models.model import Model
from distill.models.native import load_model, save_model
from distill.models.spec import SamplerSpec
from distill.models.tokens import TokenTeacher
from distill.nets.token_net import StudentAndTeacher, TokenTable
from distill.process.prefix import Prefix
from distill.samplers.token_filters import Filters
from distill.stages.base import ModelStage, Stage, StageContext, check_types
from distill.stages.generate import Generate
from distill.stages.made import Made

NO_COST: dict[str, Any] = {"train_seconds": None, "peak_memory_bytes": None}


def model_of(role: str, before: Mapping[str, Made], name: str) -> Generator:
    """The model that a stage will have made."""
    if (made := before[name].model) is None:
        raise ValueError(f"{role}: {name!r} makes no model; expected a stage with a model")
    return made


def token_teacher(role: str, model: Model) -> TokenTeacher:
    """The model as one of tokens. Raises ValueError naming `role` for another."""
    if not isinstance(model, TokenTeacher):
        raise ValueError(f"{role}: found a {type(model).__name__}, expected a model of tokens")
    return model


@dataclass
class Filter(ModelStage):
    """A model of tokens with other sampling: temperature, top-k, top-p and the schedule of guidance. Weights stay as they
    are, so nothing is trained again when one of them changes. Pairs and rows of an evaluation that name this stage have its
    sampling.

    Attributes:
        teacher: name of the stage whose model it is. Others: see `samplers.token_filters.Filters`.
    """

    REFERENCES: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: str
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_schedule: str = "constant"
    guided_groups: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        names = ("temperature", "top_k", "top_p", "guidance_schedule", "guided_groups")
        self._filters = Filters(**{name: getattr(self, name) for name in names})

    def _made(self, generator: Generator) -> Generator:
        model = token_teacher("teacher", generator.denoiser).with_(filters=self._filters)
        return Generator(model, generator.spec)

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """The model with these filters."""
        return Made(model=self._made(model_of("teacher", before, self.teacher)))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Save the model folder."""
        made = self._made(load_model(context.inputs["teacher"]))
        if context.world.main:
            save_model(context.folder, made.denoiser, made.spec, file_bytes=context.settings.file_bytes)
        return dict(NO_COST)


@dataclass
class Marginals(ModelStage):
    """Independent tokens: how often each token stands at each position of pairs, for each class or over all. What sampling all
    tokens at once amounts to without Distilled Decoding: the row to beat.

    Attributes:
        pairs: name of a Generate stage of a model of tokens.
        by_class: a table for each class; false: one for all.
    """

    REFERENCES: ClassVar[tuple[str, ...]] = ("pairs",)

    pairs: str
    by_class: bool = True

    def __post_init__(self) -> None:
        check_types(self)

    def check(self, stages: Mapping[str, Stage]) -> None:
        """The pairs come from a Generate stage."""
        super().check(stages)
        if not isinstance(stages[self.pairs], Generate):
            raise ValueError(f"pairs: {self.pairs!r} makes no pairs; expected a Generate stage")

    def _empty(self, pairs: Any) -> TokenTeacher:
        """The model of pairs (or of `PairsMade`), without counts."""
        length = pairs.sample_shape[0]
        table = TokenTable(
            vocabulary=len(codebook_of(pairs.decoder)),
            length=length,
            num_classes=pairs.conditions.num_classes if self.by_class else 0,
        )
        return TokenTeacher(table, pairs.sample_shape, conditions=pairs.conditions, decoder=pairs.decoder)

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """The pairs are of tokens."""
        pairs = before[self.pairs].pairs
        if pairs is None or "tokens" not in pairs.has:
            raise ValueError(f"pairs: {self.pairs!r} has no tokens; expected pairs of a model of tokens")
        return Made(model=Generator(self._empty(pairs), SPEC))

    @torch.no_grad()
    def run(self, context: StageContext) -> dict[str, Any]:
        """Count, and save the logarithms of the shares."""
        pairs = Pairs(context.inputs["pairs"])
        model = self._empty(pairs)
        table = model.net.table
        assert isinstance(table, torch.nn.Embedding)
        rows = torch.arange(len(pairs))
        batch = pairs.fetch(rows, rows)
        assert batch.tokens is not None
        label = batch.cond.get("label") if len(table.weight) > 1 else None
        length, vocabulary = model.output_shape
        counts = token_counts(batch.tokens, label, length, vocabulary, len(table.weight))
        # A token that was never seen keeps a weight that no sample of an evaluation finds, and stays finite in a file.
        table.weight.copy_(
            (counts / counts.sum(2, keepdim=True).clamp(min=1)).clamp(min=1e-30).log().flatten(1)
        )
        if context.world.main:
            save_model(context.folder, model, SPEC, file_bytes=context.settings.file_bytes)
        return dict(NO_COST)


SPEC = SamplerSpec(steps=16, any_steps=True, solver="heun")


def token_counts(tokens: Tensor, label: Tensor | None, length: int, vocabulary: int, classes: int) -> Tensor:
    """[classes,L,V] how often each token stands at each position of tokens [n,L], float64."""
    label = torch.zeros(len(tokens), dtype=torch.int64) if label is None else label
    places = (label[:, None] * length + torch.arange(length)) * vocabulary + tokens
    counts = torch.bincount(places.flatten(), minlength=classes * length * vocabulary)
    return counts.view(classes, length, vocabulary).double()


@dataclass
class Involve(ModelStage):
    """Teacher-involved sampling of a student of Distilled Decoding, see `models.involved.Involved`.

    Attributes:
        student, teacher: names of their stages.
        first, last: groups that the teacher makes, 0 <= first < last < K.
    """

    REFERENCES: ClassVar[tuple[str, ...]] = ("student", "teacher")

    student: str
    teacher: str
    first: int
    last: int

    def __post_init__(self) -> None:
        check_types(self)

    def _made(self, student: Generator, teacher: Generator) -> Generator:
        model, other = student.denoiser, token_teacher("teacher", teacher.denoiser)
        if not isinstance(model, Denoiser) or not isinstance(model.process, Prefix):
            raise ValueError(f"student: {self.student!r} is no student of Distilled Decoding; expected one")
        made = Involved(
            StudentAndTeacher(model.net, other.net),
            model.sample_shape,
            model.process.groups,
            self.first,
            self.last,
            conditions=model.conditions,
            decoder=model.decoder,
            filters=other.filters,
        )
        return Generator(made, SPEC)

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """The two fit."""
        student, teacher = (
            model_of("student", before, self.student),
            model_of("teacher", before, self.teacher),
        )
        return Made(model=self._made(student, teacher))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Save the model folder."""
        made = self._made(load_model(context.inputs["student"]), load_model(context.inputs["teacher"]))
        if context.world.main:
            save_model(context.folder, made.denoiser, made.spec, file_bytes=context.settings.file_bytes)
        return dict(NO_COST)
