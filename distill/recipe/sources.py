"""Config files as people write them: recipes need no header, a byte-order mark hides nothing, and what cannot be read is
told with its file."""

from __future__ import annotations

import io
from pathlib import Path

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult
from omegaconf import DictConfig, OmegaConf

SUFFIXES = (".yaml", ".yml")
RECIPE = "recipe"


class Files(FileConfigSource):
    """Folders of config files. A recipe is merged at the top, whatever its header says."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file; raises ConfigLoadError with its path where it is no mapping in UTF-8 with each key once."""
        path = self._file(config_path)
        if path is None:
            raise ConfigLoadError(f"{Path(self.path, config_path)}.yaml: no such file")
        try:
            text = path.read_text(encoding="utf-8-sig")
            header = self._get_header_dict(text[:512])
            found = OmegaConf.load(io.StringIO(text))
        except (ValueError, OSError, yaml.YAMLError) as error:
            told = " ".join(str(error).replace('in "<file>", ', "").split())
            raise ConfigLoadError(f"{path}: {told}") from error
        if config_path.strip("/").partition("/")[0] == RECIPE:
            if not isinstance(found, DictConfig):
                raise ConfigLoadError(f"{path}: found a list, expected a mapping of keys to values")
            header = header | {"package": "_global_"}
        return ConfigResult(config=found, path=self.full_path(), provider=self.provider, header=header)

    def is_config(self, config_path: str) -> bool:
        """Whether there is such a file."""
        return self._file(config_path) is not None

    def _file(self, config_path: str) -> Path | None:
        name = config_path if config_path.endswith(SUFFIXES) else None
        places = [Path(self.path, name)] if name else [Path(self.path, config_path + s) for s in SUFFIXES]
        found = [place for place in places if place.is_file()]
        if len(found) > 1:
            raise ConfigLoadError(f"{found[0]}, {found[1]}: two files of one name; expected one")
        return found[0] if found else None


def register_sources() -> None:
    """Read files below config folders through `Files`."""
    Plugins.instance()  # registers Hydra's own, which this replaces
    SourcesRegistry.instance().types[Files.scheme()] = Files
