"""Samples of prompts beside each other, where there is no real set to compare them with; and their CLIP score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from distill.evaluation.grid import image_grid, save_png
from distill.evaluation.measure import RealSet
from distill.evaluation.meters.meter import Meter, Shown, at_least
from distill.evaluation.protocol import NO_FEATURES, Protocol
from distill.files import read_json, sha256_kept, sha256_text
from distill.models.generator import Generator

PICTURE_WIDTH = 1200  # pixels
QUOTED = 60  # characters of a prompt in the caption
CLIP_BATCH = 32


class NoImages(RealSet):
    """In place of a real set: rows hold what follows from how samples are made, such as the distance to the teacher's."""

    kind = "prompts"

    def __init__(self) -> None:
        super().__init__("reference", torch.zeros(0, 1))
        self.resolution: tuple[int, ...] = ()

    def floor(self, splits: int = 5) -> dict[str, float]:
        """None."""
        return {}

    def references(self, floor: Mapping[str, float] | None = None) -> dict[str, float]:
        """None."""
        return {}

    def protocol(self, count: int, description: str, class_balanced: bool = True, **more: Any) -> Protocol:
        """As `RealSet.protocol`; prompts have no classes, and there are no features."""
        return super().protocol(
            count,
            description,
            class_balanced=False,
            features=NO_FEATURES,
            features_sha256=None,
            reference_digest="",
            resolution=self.resolution,
            **more,
        )


@dataclass
class PromptMeter(Meter):
    """A picture with a prompt a column, and the distance of students to their teacher; no metric needs real images.

    Attributes:
        columns: prompts in the picture.
        clip: folder of a CLIP model of transformers with text and image tower, for the metric `clip_score`; None: not measured.
    """

    kind: ClassVar[str] = "prompts"
    columns: int = 6
    clip: str | None = None

    def __post_init__(self) -> None:
        at_least(self, "columns")
        self.least, self.latents = 1, True
        self.shown, self.caption = self.columns, "a prompt a column"
        self.real = NoImages()
        if self.clip is not None:
            check_clip(Path(self.clip))
            self.clip_score = ClipScore(Path(self.clip))

    def fingerprint(self) -> str:
        """Of the CLIP model, if there is one."""
        if self.clip is None:
            return ""
        files = sorted(path for path in Path(self.clip).iterdir() if path.is_file())
        return sha256_text("".join(f"{path.name} {sha256_kept(path)}\n" for path in files))

    def trial(
        self, sample_shape: Sequence[int], labels: Tensor | None
    ) -> tuple[dict[str, float | None], dict[str, float]]:
        """No metric of samples is measured."""
        return {}, {}

    def prepare(self, seed: int, stream: str, count: int, device: torch.device) -> None:
        """There is no real set; a CLIP model runs on `device`."""
        self.description = "no real images"
        if isinstance(self.clip_score, ClipScore):
            self.clip_score.device = device

    def measure(
        self, samples: Tensor, labels: Tensor | None, extracted: Mapping[str, Tensor] | None = None
    ) -> dict[str, float | None]:
        """None; `teacher_mse` compares with the teacher's samples."""
        assert isinstance(self.real, NoImages)
        self.real.resolution = tuple(samples.shape[1:])
        return {}

    def draw(self, shown: Sequence[Shown], path: Path, seed: int, stream: str) -> None:
        """A labelled row of images each; the caption lists the prompts."""
        columns = max(1, min(self.columns, PICTURE_WIDTH // shown[0].samples.shape[-1]))
        save_png(image_grid([(row.title, row.samples[:columns]) for row in shown]), path)
        generator = shown[0].generator
        table = None if generator is None else getattr(generator.conditions, "table", None)
        if table is not None:
            quoted = [
                f"{number + 1}. {table.prompts[number % len(table.prompts)][:QUOTED]}"
                for number in range(columns)
            ]
            self.caption = "columns: " + "; ".join(quoted)


def check_clip(folder: Path) -> None:
    """Raise ValueError or FileNotFoundError unless a folder holds a CLIP model with its tokenizer, in safetensors."""
    images = ("preprocessor_config.json", "processor_config.json")  # of transformers 4 and 5
    for names in (("config.json",), ("model.safetensors",), ("tokenizer_config.json",), images):
        if not any((folder / name).is_file() for name in names):
            raise FileNotFoundError(
                f"meter.clip: {folder / names[0]}: missing; expected a local folder of a CLIP model, such as a copy of "
                "openai/clip-vit-base-patch16"
            )
    if (found := read_json(folder / "config.json").get("model_type")) != "clip":
        raise ValueError(f"meter.clip: {folder}: found a model of type {found!r}, expected 'clip'")


class ClipScore:
    """CLIP score by the model in a local folder, loaded at the first call. (That of torchmetrics 1 does not run with
    transformers 5.)"""

    def __init__(self, folder: Path) -> None:
        self.folder, self.device = folder, torch.device("cpu")
        self._loaded: tuple[Any, Any] | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor, generator: Generator) -> float:
        """max(mean of 100 cos(image, prompt), 0) of decoded images [N,C,H,W] in [-1, 1] and the prompts of samples 0 .. N - 1
        of a model; prompts are cut at the length that CLIP reads."""
        table: Any = getattr(generator.conditions, "table", None)
        if table is None:
            raise ValueError("meter.clip: found a model without prompts; expected null")
        model, processor = self._loaded = self._loaded or self._load()
        prompts = [table.prompts[number % len(table.prompts)] for number in range(len(images))]
        total = 0.0
        for start in range(0, len(images), CLIP_BATCH):
            part = ((images[start : start + CLIP_BATCH].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            options = {"padding": True, "truncation": True, "return_tensors": "pt"}
            given = processor(text=prompts[start : start + CLIP_BATCH], images=list(part), **options)
            made = model(**given.to(self.device))
            total += float(cosine_similarity(made.image_embeds, made.text_embeds).double().sum())
        return max(100 * total / len(images), 0.0)

    def _load(self) -> tuple[Any, Any]:
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise ImportError("meter.clip: needs transformers: pip install 'distill[features]'") from error
        model = CLIPModel.from_pretrained(self.folder, local_files_only=True, use_safetensors=True)
        return model.eval().to(self.device), CLIPProcessor.from_pretrained(self.folder, local_files_only=True)
