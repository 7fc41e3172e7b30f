"""Loads config files: recipes need no `# @package` header, byte-order marks are skipped, errors name the file."""

from __future__ import annotations

import copy
import io
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult
from omegaconf import DictConfig, OmegaConf

SUFFIXES = (".yaml", ".yml")
RECIPE = "recipe"


class Files(FileConfigSource):
    """A folder of config files. Recipes are always merged into the root of the config."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Load a file. Raises ConfigLoadError with its path unless it is YAML in UTF-8 without duplicate keys."""
        path = self._file(config_path)
        if path is None:
            raise ConfigLoadError(f"{Path(self.path, config_path)}.yaml: no such file")
        try:
            text = path.read_text(encoding="utf-8-sig")
            header = self._get_header_dict(text[:512])
            found = copy.deepcopy(_parsed(text))
        except (ValueError, OSError, yaml.YAMLError) as error:
            message = " ".join(str(error).replace('in "<file>", ', "").split())
            raise ConfigLoadError(f"{path}: {message}") from error
        if config_path.strip("/").partition("/")[0] == RECIPE:
            if not isinstance(found, DictConfig):
                raise ConfigLoadError(f"{path}: found a list, expected a mapping of keys to values")
            header = header | {"package": "_global_"}
        return ConfigResult(config=found, path=self.full_path(), provider=self.provider, header=header)

    def is_config(self, config_path: str) -> bool:
        """Return whether the file exists."""
        return self._file(config_path) is not None

    def _file(self, config_path: str) -> Path | None:
        name = config_path if config_path.endswith(SUFFIXES) else None
        places = [Path(self.path, name)] if name else [Path(self.path, config_path + s) for s in SUFFIXES]
        found = [place for place in places if place.is_file()]
        if len(found) > 1:
            raise ConfigLoadError(f"{found[0]}, {found[1]}: two files with the same name; remove one")
        return found[0] if found else None


@cache
def _parsed(text: str) -> Any:
    """Parse YAML. Parsing is slow, and all jobs of a sweep read the same files."""
    return OmegaConf.load(io.StringIO(text))


@cache
def plain(file: Path) -> Any:
    """Return a config of the package as mappings and lists, with references unresolved. An error message looks through all of
    them; OmegaConf takes 20 times as long to load one."""
    return yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def register_sources() -> None:
    """Make Hydra load config files with `Files`."""
    Plugins.instance()  # registers Hydra's own source, which is replaced here
    SourcesRegistry.instance().types[Files.scheme()] = Files
