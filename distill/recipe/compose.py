"""Where configs and recipes lie, how recipes become the Hydra group `recipe`, and what a wrong override is
answered."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from distill.recipe.arguments import arguments, check_choice, quoted, slug, swept, typed_again
from distill.recipe.sources import SUFFIXES, register_sources
from distill.stages.renamed import moved_option
from distill.terminal import told

PACKAGE = Path(__file__).resolve().parents[1]


def _root() -> Path:
    """A wheel carries both folders as package data; a checkout has them beside the package."""
    installed = PACKAGE / "_conf"
    return installed if installed.is_dir() else PACKAGE.parent


CONFIGS, RECIPES = _root() / "configs", _root() / "recipes"


def recipes() -> dict[str, Path]:
    """name -> file of every recipe that the package ships."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


@cache
def register_recipes() -> None:
    """Once a process: register every file of `recipes/` as an option of the group `recipe`, merged at the top of the config.
    A user's own recipes are `recipe/*.yaml` under `--config-dir` or a search path."""
    register_sources()
    store = ConfigStore.instance()
    for name, path in recipes().items():
        store.store(
            group="recipe", name=name, node=OmegaConf.load(path), package="_global_", provider="distill"
        )


def chosen_recipe(choices: Mapping[str, Any]) -> str:
    """The recipe of this run; without one, an error that lists them."""
    name = choices.get("recipe")
    if name in (None, "null", "None"):
        listed = "\n".join(f"  recipe={name}" for name in recipes())
        raise ValueError(
            f"recipe: none was chosen; python -m distill.train recipe=NAME with one of\n{listed}"
        )
    return str(name)


def run_name(given: Any, recipe: str, hydra_config: Any, given_arguments: Sequence[str] = ()) -> str:
    """Name of the run folder: `name`, or the recipe, with the profile where it is not the full one, so that a
    trial never blocks the real run. Each run of a multirun adds what it overrides (`given_arguments`: the command
    line, which says what the sweep goes over)."""
    if given is not None and not isinstance(given, str):
        raise ValueError(f"name: found {given!r}, expected a string; put it in quotes")
    profile = hydra_config.runtime.choices.get("profile", "full")
    name = given if given is not None else recipe if profile == "full" else f"{recipe}-{profile}"
    if hydra_config.mode != RunMode.MULTIRUN:
        return name
    over = swept(given_arguments) | {str(key) for key in hydra_config.sweeper.get("params") or {}}
    told_apart = slug(hydra_config.overrides.task, over, named=given is not None)
    return f"{name}-{told_apart}" if told_apart else name


def process_arguments(hydra_config: Any, name: str) -> list[str]:
    """The command line of one process of this run (of a multirun, of this job)."""
    task = [typed_again(o) for o in hydra_config.overrides.task if not o.startswith("name=")]
    hydra = [o for o in hydra_config.overrides.hydra if not o.startswith(("hydra.mode=", "hydra.sweep"))]
    folders = [
        s.path
        for s in hydra_config.runtime.config_sources
        if s.provider == "command-line" and s.schema == "file"
    ]
    return [
        *(part for folder in folders for part in ("--config-dir", folder)),
        *hydra,
        *task,
        f"name={quoted(name)}",
    ]


def run_verb(main: Callable[[], None]) -> None:
    """Run a Hydra main; an override that does not fit ends in one message that names the key and the nearest
    valid one."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print and exit; its exception says more
    with told(explain):
        register_sources()
        sys.argv[1:] = arguments(sys.argv[1:])
        for argument in sys.argv[1:]:
            check_choice(argument, CONFIGS)
        with _composed_once():
            main()


@contextmanager
def _composed_once() -> Iterator[None]:
    """Hydra composes every config once more to read `hydra.mode` (half a second). Ours do not set it; what the command line
    adds (`hydra.*`, a folder of configs) may, and is read as ever."""
    whole = Hydra.get_mode

    def get_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        theirs = any(o.lstrip("+").startswith("hydra.") for o in overrides)
        theirs |= any(a.startswith(("--config", "-c")) for a in sys.argv[1:])
        return whole(self, config_name, overrides) if theirs else None  # None: as -m says

    Hydra.get_mode = get_mode  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = whole  # type: ignore[method-assign]


def explain(error: BaseException) -> str | None:
    """One message for an error of composing a config; None for other errors."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: missing; give it a value, as in {error.full_key}=..."
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConfigAttributeError | ConfigKeyError):
        cause = cause.__cause__
    if cause is not None and cause.parent_node is not None:
        return _unknown_key(cause)
    if isinstance(error, MissingConfigException) and error.options:
        wanted = str(error.missing_cfg_file)
        group, _, option = wanted.rpartition("/")
        listed = ", ".join(error.options)
        told = (
            f"{group}: found no option {option!r}; {group} is one of: {listed}{_near(option, error.options)}"
        )
        return f"{told}{_own_option(group, option)}"
    told = str(error)
    if told.startswith("Error merging override") and error.__cause__ is not None:
        told = f"{told.removeprefix('Error merging override ')}: {str(error.__cause__).splitlines()[0]}"
    return told


def _unknown_key(error: Any) -> str:
    """An override names a key that is not there: which part is wrong, and what is near it."""
    parent, key, path = error.parent_node, str(error.key), str(error.full_key)
    where = path.rpartition(".")[0]
    if (target := _group_behind(where)) is not None:
        return f"{path}: {where} is the group {target!r}; override {target}.{key}=..."
    keys = [str(k) for k in parent if str(k) != "hydra"] if isinstance(parent, DictConfig) else []
    keys += (
        []
        if where or "stages" not in keys
        else ["recipe", "data", "net", "teacher", "trainer", "profile", "eval", "loggers"]
    )
    if not where and (others := _recipes_with(key)):
        return f"{path}: no such key in this recipe; expected another key, or one of the recipes {', '.join(others)}"
    keys = sorted(set(keys))
    if (moved := moved_option(key, keys)) is not None:
        return f"{path}: is now {where}.{moved}; write {where}.{moved}=..."
    inside = f"{where} has" if where else "the options are"
    near = _near(key, keys, where)
    add = f"; an option that the config leaves out is added with +{path}=..." if where and not near else ""
    return f"{path}: no such key{near}; {inside}: {', '.join(keys)}{add}"


def _group_behind(where: str) -> str | None:
    """The group that a recipe, or an option of another group, puts at a place by ${group}, or None. (Hydra's error no
    longer tells.)"""
    group, _, inside = where.partition(".")
    places = [(file, where) for file in recipes().values()]
    places += [(file, inside) for file in sorted((CONFIGS / group).glob("*.yaml")) if inside]
    for file, place in places:
        node: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        for part in place.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, str) and node.startswith("${"):
            return node.strip("${}")
    return None


def _own_option(group: str, option: str) -> str:
    """How to name the folder of a user's own option: the one in which a file of that name lies, where it is near."""
    for folder in (Path(), *sorted(path for path in Path().glob("*") if path.is_dir())):
        if any((folder / group / f"{option}{suffix}").is_file() for suffix in SUFFIXES):
            return f"; to use {folder / group / option}.yaml, add --config-dir {folder}"
    return f"; an option of your own is a file FOLDER/{group}/NAME.yaml, with --config-dir FOLDER"


def _recipes_with(key: str) -> list[str]:
    """Recipes of the package that have a key of their own at the top."""
    return [name for name, file in recipes().items() if key in OmegaConf.load(file)]


def _near(found: str, valid: Sequence[str], where: str = "") -> str:
    """ ", did you mean x?", where something is near."""
    near = difflib.get_close_matches(found, valid, n=1, cutoff=0.5)
    prefix = f"{where}." if where else ""
    return f", did you mean {prefix}{near[0]}?" if near else ""
