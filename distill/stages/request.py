"""The options of `distill.evaluate`, the real images that they name, and the checks of its output folder."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from distill.data.folder import ImageFolder, holds_images
from distill.data.listing import utf8_path
from distill.data.names import class_names
from distill.evaluation.rows import Straightness
from distill.files import TEMPORARY_SUFFIX, read_json
from distill.models.description import DESCRIPTION
from distill.stages.outputs import check_evaluation
from distill.stages.ownership import ARTIFACT, PUBLISHED, read_object
from distill.terminal import check_utf8
from distill.typed import settle

FOLDER = "distill.data.folder.ImageFolder"
DEVICES = {"auto": "auto", "cpu": "cpu", "cuda": "gpu", "gpu": "gpu"}


@dataclass(frozen=True)
class Request:
    """The options of `distill.evaluate`; see configs/evaluate.yaml for their meaning."""

    model: str | None
    reference: str | None
    features: dict[str, Any]
    steps: int | list | None = None
    count: int | None = None
    seed: int = 0
    batch_size: int = 500
    guidance_scale: float | None = None
    noise_scale: float | None = None
    resolution: int | list | None = None
    device: str = "auto"
    out: str | None = None
    force: bool = False
    name: str | None = None
    k: int = 5
    straightness: Straightness | None = None
    stream: str = "evaluate"

    def __post_init__(self) -> None:
        for key, example in (
            ("model", "a model folder or a folder of images, such as model=runs/instaflow/export"),
            ("reference", "a data set or a folder of images, such as reference=digits"),
        ):
            if getattr(self, key) is None:
                raise ValueError(f"{key}: missing; expected {example}")
        settle(self)
        for key in ("batch_size", "k"):
            if (found := getattr(self, key)) < 1:
                raise ValueError(f"{key}: found {found}, expected at least 1")
        if self.device not in DEVICES:
            raise ValueError(f"device: found {self.device!r}, expected one of {', '.join(DEVICES)}")
        if DEVICES[self.device] == "gpu" and not torch.cuda.is_available():
            raise ValueError(
                f"device: found {self.device!r}, but this machine has no CUDA device; expected cpu"
            )
        steps = self.steps if isinstance(self.steps, list) else [] if self.steps is None else [self.steps]
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in steps) or self.steps == []:
            raise ValueError(
                f"steps: found {self.steps!r}, expected counts of at least 1, such as steps=1,2,4"
            )

    @property
    def torch_device(self) -> torch.device:
        """The device that is meant."""
        cuda = DEVICES[self.device] != "cpu" and torch.cuda.is_available()
        return torch.device("cuda", 0) if cuda else torch.device("cpu")

    @property
    def step_list(self) -> list[int] | None:
        """The step counts, each once; None for the default ones."""
        if self.steps is None:
            return None
        return list(dict.fromkeys(self.steps if isinstance(self.steps, list) else [self.steps]))


def data_configs(folders: Iterable[str]) -> dict[str, Path]:
    """name -> file of every option of the group `data` below some config folders; the first that has a name wins."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(Path(folder, "data").glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def reference_config(request: Request, configs: Mapping[str, Path]) -> dict[str, Any]:
    """The config of the real images: an option of the group `data` by its name, or else a folder."""
    name = str(request.reference)
    if name in configs:
        loaded = OmegaConf.to_container(OmegaConf.load(configs[name]))
        config = {str(key): value for key, value in loaded.items()} if isinstance(loaded, dict) else {}
        if "???" in config.values():
            raise ValueError(
                f"reference: data={name} needs more than its name; give the folder, reference=FOLDER"
            )
        if config.get("_target_") == FOLDER and request.resolution is not None:
            config["resolution"] = request.resolution
        return config
    if Path(name).expanduser().is_dir():
        return {"_target_": FOLDER, "path": name, "resolution": request.resolution}
    near = difflib.get_close_matches(name, configs, n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    listed = ", ".join(configs)
    raise ValueError(
        f"reference: found {name!r}, expected a folder of images or one of the data sets {listed}{hint}"
    )


def is_model(path: Path) -> bool:
    """Whether a folder is a model (else it is a folder of images). Raises FileNotFoundError where it is neither; a run
    or a stage, which may hold pictures, is no folder of images."""
    if not path.is_dir():
        raise FileNotFoundError(
            f"model: {path}: no such folder; expected a model folder or a folder of images"
        )
    if (path / DESCRIPTION).is_file():
        return True
    if (path / "plan.json").is_file() or (path / ARTIFACT).is_file():
        hint = f"did you mean {path / 'export'}?" if (path / "export").is_dir() else "expected a model folder"
        raise FileNotFoundError(
            f"model: {path}: no {DESCRIPTION} in it: a run or a stage, not a model; {hint}"
        )
    if not holds_images(path):
        raise FileNotFoundError(f"model: {path}: neither {DESCRIPTION} nor images in it")
    return False


def label_of(request: Request, path: Path) -> str:
    """What the rows are called: the option, or the folder's name; an export is the student of its run."""
    name = utf8_path(path.resolve().name)
    return check_utf8(request.name or ("student" if name == "export" else name), "name")


def recipe_of(model: Path) -> str | None:
    """The recipe of the run that a model folder lies in."""
    for run in list(model.resolve().parents)[:2]:  # a stage, or the best model that its monitor kept
        if (run / "plan.json").is_file():
            return str(read_json(run / "plan.json")["recipe"])
    return None


def check_reference(real: Any, shape: Sequence[int], name: str, resolution: Any) -> None:
    """Raise ValueError unless the real set holds images of `shape`."""
    if real.value_range is None:
        raise ValueError(
            f"reference: {name} has samples of shape {list(real.sample_shape)}, expected images [C,H,W]"
        )
    if tuple(shape) == tuple(real.sample_shape):
        return
    folder = isinstance(real, ImageFolder) and resolution is None and shape[0] == real.sample_shape[0]
    hint = f"; resolution={shape[-1]} resizes them" if folder and shape[-1] == shape[-2] else ""
    raise ValueError(
        f"reference: {name} has images of {list(real.sample_shape)}, but those to measure are {list(shape)}{hint}"
    )


def check_classes(samples: ImageFolder, real: Any) -> str:
    """Why there are no numbers by class, in a sentence; "" where the samples have no classes or those of the reference.

    Classes are the same where their names are: those of the reference's sub-folders, or 0, 1, 2, ... for a data set of
    numbered classes. Raises ValueError for other sub-folders than the reference's, or another number of classes."""
    if samples.labels is None:
        return ""
    if not real.num_classes:
        return "No numbers by class: the reference has no classes."
    names = class_names(getattr(real, "classes", None) or [str(label) for label in range(real.num_classes)])
    mine = class_names(samples.classes)
    if mine == names:
        return ""
    if isinstance(real, ImageFolder) or len(mine) != len(names):
        expected = ", ".join(names) if isinstance(real, ImageFolder) else f"{real.num_classes} of them"
        raise ValueError(
            f"model: {samples.path} has the classes (sub-folders) {', '.join(samples.classes)}, but those of the "
            f"reference are {expected}"
        )
    shown = ", ".join(utf8_path(name) for name in samples.classes[:3])
    return (
        f"No numbers by class: the sub-folders {shown}, ... of the samples do not say which of the classes {names[0]} .. "
        f"{names[-1]} they hold; name them so."
    )


def fitted(config: Mapping[str, Any], images: Any, channels: int) -> Any:
    """`images` of `config` read again with so many channels, where they are a folder and that loses nothing: equal channels as
    one, or one repeated."""
    if not isinstance(images, ImageFolder) or images.sample_shape[0] == channels:
        return images
    try:
        return instantiate({**config, "channels": channels}, _convert_="all")
    except InstantiationException:
        return images  # it has colour: the error names both shapes


def place(request: Request, model: Path) -> Path:
    """The folder to write to. The default is `evaluation` here, unless that is inside the model's folder."""
    if request.out is not None:
        return Path(request.out).expanduser()
    out = Path("evaluation")
    if out.resolve().is_relative_to(model.resolve()):
        raise ValueError(f"out: the default, {out}, would lie in {model}, which is measured; give out=FOLDER")
    return out


def check_out(out: Path, digest: str, folders: Sequence[Path]) -> None:
    """Raise ValueError unless `out` is new, empty or holds an evaluation of the same things: no other result is
    written over, and no picture is put into the `folders` of images that are measured."""
    for folder in folders:
        if out.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"out: {out} lies in {folder}, whose images are read; expected another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder")
    ours = {*PUBLISHED, *(f".{name}{TEMPORARY_SUFFIX}" for name in PUBLISHED)}  # and what a kill left of them
    others = sorted(p.name for p in out.iterdir() if p.name not in ours) if out.is_dir() else []
    if others:
        raise ValueError(
            f"out: {out} contains {others[0]}, which is not from an evaluation; expected a new folder"
        )
    check_evaluation(out, PUBLISHED)
    metrics = out / "metrics.json"
    if metrics.is_file() and read_object(metrics).get("digest") != digest:
        raise ValueError(
            f"out: {out} holds an evaluation of something else; expected another folder, out=FOLDER"
        )
