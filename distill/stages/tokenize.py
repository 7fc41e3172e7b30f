"""The Tokenize stage: data as tokens of a trained tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from hydra.utils import instantiate

from distill.cache.tokens import DESCRIPTION, FILES, TOKENS, Tokens, write_tokens
from distill.models.conditions import of_source
from distill.models.decoder import VQ, Decoder, codebook_of
from distill.models.model import Model
from distill.models.native import load_model
from distill.nets.tokenizer import TokenizerNet
from distill.stages.base import ModelStage, Stage, StageContext, check_types
from distill.stages.made import Made, PairsMade, device_of
from distill.stages.ownership import patterns


@dataclass
class Tokenize(Stage):
    """Encode all images of a source once: the data of autoregressive teachers.

    Attributes:
        tokenizer: name of the stage that trains the tokenizer (method `tokenizer`).
        data: config of the source of images.
    """

    REFERENCES: ClassVar[tuple[str, ...]] = ("tokenizer",)
    FILES: ClassVar[tuple[str, ...]] = patterns(*FILES)
    NEEDED: ClassVar[tuple[str, ...]] = (TOKENS, DESCRIPTION)

    tokenizer: str
    data: dict[str, Any]

    def __post_init__(self) -> None:
        check_types(self)

    def check(self, stages: Mapping[str, Stage]) -> None:
        """The tokenizer comes from a stage that makes a model."""
        super().check(stages)
        if not isinstance(stages[self.tokenizer], ModelStage):
            raise ValueError(
                f"tokenizer: {self.tokenizer!r} makes no model; expected a stage with the method `tokenizer`"
            )

    def fingerprint(self) -> str:
        """Of the images."""
        found: str = instantiate(self.data).fingerprint()
        return found

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """The tokenizer takes the images."""
        made = before[self.tokenizer].model
        assert made is not None
        source, net = instantiate(self.data), made.denoiser.net
        decoder = self._decoder(made.denoiser)
        if tuple(source.sample_shape) != made.denoiser.sample_shape:
            raise ValueError(
                f"data: found images of shape {list(source.sample_shape)}, expected the tokenizer's "
                f"{list(made.denoiser.sample_shape)}"
            )
        assert isinstance(net, TokenizerNet)
        with torch.no_grad():
            shape = tuple(net.encode(torch.zeros(1, *source.sample_shape, device=device_of(net))).shape[1:])
        return Made(pairs=PairsMade(shape, of_source(source), decoder, 1.0, Tokens.has))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Encode on the main process, on the CPU."""
        tokenizer = load_model(context.inputs["tokenizer"]).denoiser
        facts: dict[str, Any] = {}
        if context.world.main:
            facts = write_tokens(context.folder, instantiate(self.data), self._decoder(tokenizer))
        context.world.barrier()
        found = Tokens(context.folder)
        return {"count": len(found), "codes": len(codebook_of(found.decoder)), **facts}

    def _decoder(self, tokenizer: Model) -> Decoder:
        if not isinstance(tokenizer.net, TokenizerNet):
            raise ValueError(
                f"tokenizer: {self.tokenizer!r} makes a {type(tokenizer).__name__}, expected a tokenizer"
            )
        return VQ(tokenizer.net)
