"""`clip` and `dino`: image towers read from a local transformers folder; nothing is ever downloaded.

The name says which network it is, for it is part of every metric: `clip` is CLIP ViT-L/14 at 336 pixels (the tower of
CMMD, 2401.09603) and `dino` DINOv2 ViT-L/14 at 224 (Oquab et al. 2023, 2304.07193; the space that Stein et al. 2023,
2306.04675, found nearest to human judgement). Smaller relatives are named by their patch and size, and so are their
numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from distill.data.plain import plain_torch
from distill.files import canonical_json, read_json, sha256_file, sha256_text
from distill.models.extractors.images import ImageExtractor, import_extra
from distill.names import inside
from distill.typed import parse

EXTRA = "features"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_TYPES = ("clip", "clip_vision_model")
# Their first token is the class token, and `last_hidden_state` is already normalised.
DINO_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit")


class Clip(ImageExtractor):
    """Projected image embeddings of a CLIP tower, not normalised (CMMD normalises them): [B, projection width].

    Images are stretched to the tower's size, without a crop.
    """

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], sha256: str | None = None
    ) -> None:
        c: Any = network.config
        known = (c.patch_size, c.image_size, c.hidden_size, c.projection_dim) == (14, 336, 1024, 768)
        name = "clip" if known else f"clip_p{c.patch_size}_{c.image_size}"
        super().__init__(name, c.projection_dim, c.image_size, mean, std, full_count=10_000, sha256=sha256)
        self.network = network

    def embed(self, inputs: Tensor) -> Tensor:
        """Normalised inputs [B, 3, size, size] to embeddings [B, D]."""
        return self.network(pixel_values=inputs).image_embeds


class Dino(ImageExtractor):
    """Class token after the last layer norm of a DINO (or another ViT) at `size` pixels: [B, hidden width]."""

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        size: int = 224,
        sha256: str | None = None,
    ) -> None:
        c: Any = network.config
        if size < c.patch_size or size % c.patch_size:
            raise ValueError(
                f"features dino: size: found {size}, expected a multiple of the patch {c.patch_size}"
            )
        known = (c.model_type, c.patch_size, c.hidden_size, size) == ("dinov2", 14, 1024, 224)
        name = "dino" if known else f"{c.model_type}_p{c.patch_size}_d{c.hidden_size}_{size}"
        super().__init__(name, c.hidden_size, size, mean, std, full_count=10_000, sha256=sha256)
        self.network = network
        # ViT alone has to be told that its position embeddings are to be resampled.
        self.options = {"interpolate_pos_encoding": True} if c.model_type == "vit" else {}

    def embed(self, inputs: Tensor) -> Tensor:
        """Normalised inputs [B, 3, size, size] to class tokens [B, D]."""
        return self.network(pixel_values=inputs, **self.options).last_hidden_state[:, 0]


@plain_torch()
def load_clip(device: torch.device | str = "cpu", path: str | None = None) -> Clip:
    """The image tower of the CLIP model in the folder `path` (config.json and weights), frozen.

    Mean and deviation are those of the folder's preprocessor_config.json, else OpenAI's. Raises FileNotFoundError
    naming the folder and the extra, ImportError without transformers, ValueError for a folder of another model or with
    weights missing.
    """
    folder = _folder("clip", path, "CLIP model, e.g. a copy of openai/clip-vit-large-patch14-336")
    library = import_extra("transformers", "clip", EXTRA, folder)
    _check_type("clip", folder, CLIP_TYPES)
    config = library.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    if (
        config.model_type == "clip"
    ):  # both towers: the width of the projection stands with them, not in the tower's own
        config.vision_config.projection_dim = config.projection_dim
        config = config.vision_config
    network = _load("clip", library, library.CLIPVisionModelWithProjection, folder, config=config)
    mean, std = _normalisation(folder, CLIP_MEAN, CLIP_STD)
    return Clip(network, mean, std, _sha256(folder)).frozen(device)


@plain_torch()
def load_dino(device: torch.device | str = "cpu", path: str | None = None, size: int = 224) -> Dino:
    """The DINO or ViT model in the folder `path` (config.json and weights) at `size` pixels, frozen.

    Mean and deviation are those of the folder's preprocessor_config.json, else ImageNet's. Errors as of `load_clip`,
    and ValueError for a `size` that is no multiple of the patch.
    """
    folder = _folder("dino", path, "DINO model, e.g. a copy of facebook/dinov2-large")
    library = import_extra("transformers", "dino", EXTRA, folder)
    _check_type("dino", folder, DINO_TYPES)
    network = _load("dino", library, library.AutoModel, folder)
    mean, std = _normalisation(folder, IMAGENET_MEAN, IMAGENET_STD)
    return Dino(network, mean, std, size, _sha256(folder)).frozen(device)


def _folder(kind: str, path: str | None, model: str) -> Path:
    """The folder at `path`, which has a config and weights."""
    folder = None if path is None else Path(path)
    if folder is None:
        found = "null"
    elif not (folder / "config.json").is_file():
        found = f"no {folder / 'config.json'}"
    elif not any((folder / name).is_file() for name in WEIGHTS):
        found = f"no {folder / WEIGHTS[0]}"
    else:
        return folder
    raise FileNotFoundError(
        f"features {kind}: path: found {found}, expected a local folder with config.json and {WEIGHTS[0]} of a "
        f"transformers {model} (nothing is downloaded; pip install 'distill[{EXTRA}]' brings transformers)"
    )


def _weights(folder: Path) -> Path:
    """The file that transformers reads: safetensors before pickled tensors (which it opens with weights_only)."""
    return next(folder / name for name in WEIGHTS if (folder / name).is_file())


def _check_type(kind: str, folder: Path, types: Sequence[str]) -> None:
    found = _mapping(folder / "config.json").get("model_type")
    if found not in types:
        raise ValueError(
            f"features {kind}: {folder / 'config.json'}: model_type: found {found!r}, expected one of {types}"
        )


def _load(kind: str, library: Any, cls: Any, folder: Path, **options: Any) -> nn.Module:
    """The model with every weight from the folder, in float32: what a folder lacks would be random numbers."""
    safe = _weights(folder).suffix != ".bin"
    try:
        with _quiet(library):
            network, info = cls.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=safe, output_loading_info=True, **options
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"features {kind}: {folder} cannot be read: {str(error).splitlines()[0]}") from error
    # A ViT's pooler is no part of DINO and is not used.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(f"features {kind}: {folder} lacks {len(missing)} weights, the first is {missing[0]}")
    return network.float()


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without transformers' progress bars and its report on the text tower, which is not wanted here."""
    logging = library.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _normalisation(
    folder: Path, mean: Sequence[float], std: Sequence[float]
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation that the folder names, else the given ones."""
    file = folder / "preprocessor_config.json"
    named = _mapping(file) if file.is_file() else {}
    own = []
    for key, default in (("image_mean", mean), ("image_std", std)):
        values = parse(tuple[float, float, float], named.get(key, list(default)), f"{file}: {key}")
        if key == "image_std" and min(values) <= 0:
            raise ValueError(f"{file}: {key}: found {list(values)}, expected positive numbers")
        own.append(values)
    return own[0], own[1]


def _sha256(folder: Path) -> str:
    """sha256 of the weight file; of several, that of the canonical JSON of each shard's."""
    file = _weights(folder)
    if file.suffix != ".json":
        return sha256_file(file)
    where = f"{file}: weight_map"
    shards = sorted(set(parse(dict[str, str], _mapping(file).get("weight_map"), where).values()))
    return sha256_text(canonical_json({shard: sha256_file(inside(folder, shard, where)) for shard in shards}))


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON file of transformers, which holds more than is read here."""
    return parse(dict[str, Any], read_json(path), str(path))
