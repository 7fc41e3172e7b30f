"""Folders of diffusers pipelines: what they hold, checked before anything is loaded, and the only calls of `from_pretrained`.

diffusers and transformers are imported when a part is loaded, and by nothing else than folders of teachers.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from distill.files import canonical_json, read_json, sha256_kept

INDEX = "model_index.json"
CONFIGS = ("config.json", "scheduler_config.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LIBRARIES = ("diffusers", "transformers")
INSTALL = "pip install 'distill[diffusers]'"


class Folder:
    """A pipeline's folder: `model_index.json` and a sub-folder for each part.

    Args:
        path: the folder; or OWNER/NAME@COMMIT, a model of the Hugging Face hub in the hub's cache. Nothing is downloaded.
        variant: of the weights' files: fp16 for model.fp16.safetensors; None: those without.

    Raises:
        FileNotFoundError: names `path`: no such folder or cached model, or no `model_index.json` in it.
        ValueError: a revision that is no commit, or `model_index.json` is not that of a pipeline.
    """

    def __init__(self, path: str | Path, variant: str | None = None) -> None:
        self.path, self.variant = Path(path).expanduser(), variant
        if not self.path.is_dir():
            self.path = _cached(str(path))
        if not (self.path / INDEX).is_file():
            single = sorted(p.name for p in self.path.iterdir() if p.suffix in (".safetensors", ".ckpt"))
            more = (
                f"; {single[0]} is a single file: save it as a folder with diffusers' from_single_file and save_pretrained"
                if single
                else ""
            )
            raise FileNotFoundError(
                f"path: {self.path}: no {INDEX} in it; expected a diffusers pipeline{more}"
            )
        found = read_json(self.path / INDEX)
        if not isinstance(found, Mapping) or not isinstance(found.get("_class_name"), str):
            raise ValueError(f"{self.path / INDEX}: _class_name: missing; expected the name of a pipeline")
        self.index: dict[str, Any] = dict(found)
        self.pipeline: str = found["_class_name"]

    def __contains__(self, part: str) -> bool:
        entry = self.index.get(part)
        return isinstance(entry, list) and len(entry) == 2 and None not in entry

    def class_of(self, part: str, expected: Collection[str] = ()) -> str:
        """The class of a part, one of `expected`. Raises ValueError or FileNotFoundError naming the part."""
        if part not in self:
            kinds = f" ({' or '.join(expected)})" if expected else ""
            raise ValueError(f"{self.path / INDEX}: {part}: missing; a {self.pipeline} needs it{kinds}")
        if not (self.path / part).is_dir():
            raise FileNotFoundError(f"{self.path / part}: missing; {INDEX} names it ({self.index[part][1]})")
        library, found = (str(each) for each in self.index[part])
        if library not in LIBRARIES:
            raise ValueError(
                f"{self.path / INDEX}: {part}: found the library {library!r}, expected {' or '.join(LIBRARIES)}"
            )
        if expected and found not in expected:
            raise ValueError(
                f"{self.path / INDEX}: {part}: found {found!r}, expected {' or '.join(expected)}"
            )
        return found

    def config(self, part: str) -> dict[str, Any]:
        """The config of a part. Raises FileNotFoundError where it has none."""
        self.class_of(part)
        for name in CONFIGS:
            if (path := self.path / part / name).is_file():
                found = read_json(path)
                if not isinstance(found, dict):
                    raise ValueError(f"{path}: found {type(found).__name__}, expected a mapping")
                return found
        raise FileNotFoundError(f"{self.path / part}: holds no {' or '.join(CONFIGS)}")

    def weights(self, part: str) -> list[Path]:
        """The weights of a part: safetensors files. Raises FileNotFoundError where it holds others, or none."""
        files = sorted((self.path / part).glob("*.safetensors"))
        shard = re.compile(r"-\d+-of-\d+$")
        wanted = self.variant or ""
        if found := [file for file in files if shard.sub("", file.stem).partition(".")[2] == wanted]:
            return found
        if files:
            raise FileNotFoundError(
                f"{self.path / part}: found {files[0].name}, expected weights of the variant {self.variant!r}; "
                "type teacher.variant=NAME, the word before .safetensors (null: none)"
            )
        others = sorted(
            p.name for p in (self.path / part).glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
        )
        what = (
            f"found {others[0]} alone, whose loading can run code; expected safetensors: "
            "load it in diffusers and call save_pretrained(safe_serialization=True)"
            if others
            else "no weights in it; expected *.safetensors"
        )
        raise FileNotFoundError(f"{self.path / part}: {what}")

    def load(self, part: str, expected: Collection[str] = (), dtype: str = "float32") -> Any:
        """A part in eval mode on the CPU, its weights as `dtype`; tokenizers have no weights.

        Raises:
            ValueError: names the part, and its class if it is none of `expected` or does not exist.
            ImportError: the extra is not installed.
        """
        name = self.class_of(part, expected)
        tokenizer = "Tokenizer" in name
        if not tokenizer:
            self.weights(part)
        library = self.index[part][0]
        options: dict[str, Any] = {"local_files_only": True}
        if library == "transformers":
            options["trust_remote_code"] = False
        if not tokenizer:
            key = "dtype" if library == "transformers" else "torch_dtype"
            options |= {"use_safetensors": True, key: DTYPES[dtype], "variant": self.variant}
        try:
            loaded = class_named(library, name, f"{self.path / INDEX}: {part}").from_pretrained(
                self.path / part, **options
            )
        except (OSError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"{self.path / part}: cannot be loaded as {name}: {text}") from error
        return loaded if tokenizer else loaded.eval().requires_grad_(False)

    def assembled(self, *, only: Collection[str] | None = None, **parts: Any) -> Any:
        """The pipeline as diffusers loads it, weights in float32, without a progress bar.

        only: parts to load; others are None. parts: those in place of the folder's. Raises like `load`."""
        left_out = [part for part in self.index if part in self and only is not None and part not in only]
        given: dict[str, Any] = {**dict.fromkeys(left_out), **parts}
        try:
            made = class_named(
                "diffusers", self.pipeline, f"{self.path / INDEX}: _class_name"
            ).from_pretrained(
                self.path,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                variant=self.variant,
                **given,
            )
        except (OSError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"{self.path}: cannot be loaded as {self.pipeline}: {text}") from error
        made.set_progress_bar_config(disable=True)
        return made

    def digest(self, parts: Iterable[str]) -> str:
        """sha256 over the contents of some parts, and over `model_index.json`."""
        files = {INDEX: sha256_kept(self.path / INDEX)}
        for part in parts:
            for path in sorted((self.path / part).iterdir()):
                if path.is_file():
                    files[f"{part}/{path.name}"] = sha256_kept(path)
        return hashlib.sha256(canonical_json(files).encode()).hexdigest()


def _cached(path: str) -> Path:
    """The folder of OWNER/NAME@COMMIT in the hub's cache ($HF_HOME). A commit, because branches move."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@(.*))?", path)
    if found is None or path.startswith("."):
        raise FileNotFoundError(f"path: {path}: no such folder; expected a diffusers pipeline with {INDEX}")
    name, commit = found.groups()
    if commit is None:
        raise FileNotFoundError(
            f"path: {path}: no such folder; expected a diffusers pipeline with {INDEX}; to use a model of the Hugging Face "
            f"hub, download it first: hf download {path} --local-dir FOLDER, or hf download {path} --revision COMMIT and "
            f"type {path}@COMMIT"
        )
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise ValueError(
            f"path: {path}: found the revision {commit!r}, expected a commit of 40 hexadecimal digits"
        )
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(f"path: {path}: needs the package huggingface_hub: {INSTALL}") from error
    try:
        return Path(hub.snapshot_download(name, revision=commit, local_files_only=True))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"path: {path}: not in the hub's cache; expected it there: hf download {name} --revision {commit}"
        ) from error


def class_named(library: str, name: str, where: str) -> Any:
    """A class of diffusers or transformers. Raises ImportError without the extra, ValueError for an unknown class."""
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        raise ImportError(f"{where}: needs the package {library}: {INSTALL}") from error
    module.utils.logging.disable_progress_bar()
    found = getattr(module, name, None)
    if not isinstance(found, type):
        raise ValueError(f"{where}: found {name!r}, which {library} {module.__version__} does not have")
    return found
