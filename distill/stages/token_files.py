"""The TokenFiles stage: public files of LlamaGen or VAR, or of a student of Distilled Decoding, as a model of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill.engine.memory import Memory, decoder_row, network_row
from distill.files import sha256_kept
from distill.methods.distilled_decoding import DistilledDecoding
from distill.models.conditions import of_net
from distill.models.decoder import VQ, codebook_of
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.native import load_model, save_model
from distill.models.token_files import Asked, load_networks
from distill.models.tokens import TokenTeacher, set_codebook
from distill.nets.scales import SCALES
from distill.process.prefix import Prefix
from distill.samplers.token_filters import Filters
from distill.stages.base import ModelStage, StageContext, check_types
from distill.stages.made import Made
from distill.stages.token_models import NO_COST, SPEC
from distill.typed import parse


@dataclass(frozen=True)
class Student:
    """What the files of a student do not say.

    Attributes:
        timesteps: groups of data of the states that it was trained on, from 0. split: groups whose tokens come from the
            logits; None: all. Others: of the pairs that it was trained on, for the record.
    """

    timesteps: tuple[int, ...]
    split: int | None = None
    guidance_scale: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


@dataclass
class TokenFiles(ModelStage):
    """Load LlamaGen or VAR: the transformer as the model's net, the tokenizer as its decoder.

    Attributes:
        family: llamagen or var.
        path: file of the transformer. tokenizer: file of the tokenizer.
        student: the transformer is a student of Distilled Decoding, see `Student`; None: a teacher.
        heads, resolution, num_classes, scales: see `models.token_files.Asked`.
    """

    family: str
    path: str
    tokenizer: str
    heads: int | None = None
    resolution: int = 256
    num_classes: int | None = None
    scales: list[int] | None = None
    student: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        self._student = None if self.student is None else parse(Student, self.student, "student")

    def fingerprint(self) -> str:
        """Of both files."""
        return " ".join(sha256_kept(Path(path).expanduser()) for path in (self.path, self.tokenizer))

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """Build the model without weights."""
        model = self._load(weights=False)
        rows = [network_row("network", model.denoiser.net), decoder_row(model.denoiser.decoder.weights())]
        return Made(model=model, memory=Memory([row for row in rows if row is not None]))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Save the model folder, and load it once."""
        if context.world.main:
            loaded = self._load()
            save_model(context.folder, loaded.denoiser, loaded.spec, file_bytes=context.settings.file_bytes)
        context.world.barrier()
        load_model(context.folder)
        return dict(NO_COST)

    def _load(self, *, weights: bool = True) -> Generator:
        student = self._student
        asked = Asked(
            heads=self.heads,
            resolution=self.resolution,
            num_classes=self.num_classes,
            scales=SCALES if self.scales is None else tuple(self.scales),
            student=student is not None,
            split=None if student is None else student.split,
        )
        found = load_networks(self.family, self.path, self.tokenizer, asked, weights=weights)
        decoder = VQ(found.tokenizer)
        shape = (sum(found.net.groups), codebook_of(decoder).shape[1])
        if student is not None:
            return self._sampled(found.net, shape, decoder, student)
        return Generator(TokenTeacher(found.net, shape, decoder=decoder, guidable=found.null), SPEC)

    @staticmethod
    def _sampled(net: Any, shape: tuple[int, ...], decoder: VQ, options: Student) -> Generator:
        """The student with the sampler that the method gives it."""
        set_codebook(net, decoder)
        model = Denoiser(net, Prefix(net.groups), "x0", shape, conditions=of_net(net), decoder=decoder)
        steps = list(range(1, len(options.timesteps) + 1))
        result = DistilledDecoding(model, timesteps=options.timesteps, sample_steps=steps).result()
        baked = Filters(top_k=options.top_k, top_p=options.top_p).words(options.guidance_scale)
        spec = replace(result.sampler, guidance_baked=options.guidance_scale, baked=baked)
        return Generator(model.with_(coupling=result.coupling), spec)
