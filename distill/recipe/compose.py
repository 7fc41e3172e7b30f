"""Finds configs, registers recipes as the Hydra group `recipe`, explains bad overrides."""

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

from distill.recipe.arguments import arguments, check_choice, quoted, slug, swept, to_argument
from distill.recipe.sources import SUFFIXES, plain, register_sources
from distill.stages.renamed import moved_option
from distill.terminal import report_errors
from distill.typed import NOT_IMPLEMENTED

PACKAGE = Path(__file__).resolve().parents[1]


def _root() -> Path:
    """Return the parent of `configs` and `recipes`: package data in a wheel, the repository in a checkout."""
    installed = PACKAGE / "_conf"
    return installed if installed.is_dir() else PACKAGE.parent


CONFIGS, RECIPES = _root() / "configs", _root() / "recipes"


def recipes() -> dict[str, Path]:
    """Return name -> file of the recipes in the package."""
    paths = [*sorted(RECIPES.glob("*.yaml")), *sorted(RECIPES.glob("*/*.yaml"))]
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in paths}


@cache
def register_recipes() -> None:
    """Register every file of `recipes/` as an option of the group `recipe`, merged into the root of the config.

    Users add recipes as `recipe/*.yaml` in a folder given by `--config-dir` or the search path."""
    register_sources()
    store = ConfigStore.instance()
    for name, path in recipes().items():
        group, _, own = f"recipe/{name}".rpartition("/")
        store.store(group=group, name=own, node=OmegaConf.load(path), package="_global_", provider="distill")


def chosen_recipe(choices: Mapping[str, Any]) -> str:
    """Return the recipe of this run. Raises ValueError with a list of recipes if none is given."""
    name = choices.get("recipe")
    if name in (None, "null", "None"):
        listed = "\n".join(f"  recipe={name}" for name in recipes())
        raise ValueError(f"recipe: missing; type python -m distill.train recipe=NAME with one of\n{listed}")
    return str(name)


def run_name(given: Any, recipe: str, hydra_config: Any, given_arguments: Sequence[str] = ()) -> str:
    """Return the name of the run folder: `name`, or `<recipe>` without its folder, or `<recipe>-<profile>` for profiles other
    than "full".

    Runs of a multirun append their overrides (`arguments.slug`), and runs that an agent of a W&B sweep starts the id of their
    run there, so that each has a folder, to which the agent comes back.

    Args:
        given: the config's `name`, or None.
        recipe: name of the recipe.
        hydra_config: config of Hydra.
        given_arguments: the command line, which determines the keys of the sweep.
    """
    if given is not None and not isinstance(given, str):
        raise ValueError(f"name: found {given!r}, expected a string; put it in quotes")
    profile = hydra_config.runtime.choices.get("profile", "full")
    recipe = recipe.rpartition("/")[2]
    name = given if given is not None else recipe if profile == "full" else f"{recipe}-{profile}"
    run = os.environ.get("WANDB_RUN_ID")
    # The processes of a run are given its name, which has the id.
    if "WANDB_SWEEP_ID" in os.environ and run and not name.endswith(f"-{run}"):
        name = f"{name}-{run}"
    if hydra_config.mode != RunMode.MULTIRUN:
        return name
    over = swept(given_arguments) | {str(key) for key in hydra_config.sweeper.get("params") or {}}
    suffix = slug(hydra_config.overrides.task, over, named=given is not None)
    return f"{name}-{suffix}" if suffix else name


def process_arguments(hydra_config: Any, name: str) -> list[str]:
    """Return the command line of one process of this run (in a multirun: of this job)."""
    hydra = [o for o in hydra_config.overrides.hydra if not o.startswith(("hydra.mode=", "hydra.sweep"))]
    folders = [
        s.path
        for s in hydra_config.runtime.config_sources
        if s.provider == "command-line" and s.schema == "file"
    ]
    return [
        *(part for folder in folders for part in ("--config-dir", folder)),
        *hydra,
        *task_arguments(hydra_config.overrides.task, name),
    ]


def task_arguments(overrides: Sequence[str], name: str) -> list[str]:
    """Return the overrides of a run as arguments, with its name."""
    return [*(to_argument(o) for o in overrides if not o.startswith("name=")), f"name={quoted(name)}"]


def run_verb(main: Callable[[], None]) -> None:
    """Run a Hydra main. For a bad override, exit with one message that names the key and the nearest valid key."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise the exception instead of printing a shortened message
    with report_errors(explain):
        register_sources()
        sys.argv[1:] = arguments(sys.argv[1:])
        for argument in sys.argv[1:]:
            check_choice(argument, CONFIGS)
        with _composed_once():
            main()


@contextmanager
def _composed_once() -> Iterator[None]:
    """Skip the second composition in which Hydra reads `hydra.mode` (0.5 s).

    The configs of the package do not set it. Hydra still reads it if the command line has `hydra.*` or a config folder."""
    whole = Hydra.get_mode

    def get_mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
        theirs = any(o.lstrip("+").startswith("hydra.") for o in overrides)
        theirs |= any(a.startswith(("--config", "-c")) for a in sys.argv[1:])
        return whole(self, config_name, overrides) if theirs else None  # None: the flag -m decides

    Hydra.get_mode = get_mode  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = whole  # type: ignore[method-assign]


def explain(error: BaseException) -> str | None:
    """Return the message for an error in composing a config; None for other errors."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: missing; type {error.full_key}=..."
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
        message = f"{group}: found {option!r}{_near(option, error.options)}; expected {listed}"
        return f"{message}{_own_option(group, option)}"
    message = str(error)
    if message.startswith("Error merging override") and error.__cause__ is not None:
        message = f"{message.removeprefix('Error merging override ')}: {str(error.__cause__).splitlines()[0]}"
    return message


def _unknown_key(error: Any) -> str:
    """Return the message for an override of a key that does not exist."""
    parent, key, path = error.parent_node, str(error.key), str(error.full_key)
    where = path.rpartition(".")[0]
    if (target := _group_behind(where)) is not None:
        return f"{path}: {where} is the group {target!r}; override {target}.{key}=..."
    keys = [str(k) for k in parent if str(k) != "hydra"] if isinstance(parent, DictConfig) else []
    keys += (
        []
        if where or "stages" not in keys
        else ["recipe", "data", "net", "teacher", "trainer", "profile", "eval", "loggers", "callbacks"]
    )
    if not where and (others := _recipes_with(key)):
        return f"{path}: no such key in this recipe; the recipes {', '.join(others)} have it"
    keys = sorted(set(keys))
    if (moved := moved_option(key, keys)) is not None:
        return f"{path}: is now {where}.{moved}; write {where}.{moved}=..."
    if (why := NOT_IMPLEMENTED.get(key)) is not None:
        return f"{path}: no such key, {why}; expected {', '.join(keys)}"
    near = _near(key, keys, where)
    add = f"; to add an option that the config omits, type +{path}=..." if where and not near else ""
    return f"{path}: no such key{near}; expected {', '.join(keys)}{add}"


def _group_behind(where: str) -> str | None:
    """Return the group that a recipe or another group's option inserts at `where` by ${group}, or None.

    Hydra's error does not contain it."""
    group, _, inside = where.partition(".")
    places = [(file, where) for file in recipes().values()]
    places += [(file, inside) for file in sorted((CONFIGS / group).glob("*.yaml")) if inside]
    for file, place in places:
        node = plain(file)
        for part in place.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, str) and node.startswith("${"):
            return node.strip("${}")
    return None


def _own_option(group: str, option: str) -> str:
    """Return a hint on --config-dir: the folder that contains a config of this name, if one is found nearby."""
    for folder in (Path(), *sorted(path for path in Path().glob("*") if path.is_dir())):
        if any((folder / group / f"{option}{suffix}").is_file() for suffix in SUFFIXES):
            return f"; to use {folder / group / option}.yaml, add --config-dir {folder}"
    return f"; to add an option, write FOLDER/{group}/NAME.yaml and pass --config-dir FOLDER"


def _recipes_with(key: str) -> list[str]:
    """Return the recipes of the package that have `key` at the top level."""
    return [name for name, file in recipes().items() if key in plain(file)]


def _near(found: str, valid: Sequence[str], where: str = "") -> str:
    """Return ", did you mean x?" for the most similar name, or an empty string."""
    near = difflib.get_close_matches(found, valid, n=1, cutoff=0.5)
    prefix = f"{where}." if where else ""
    return f", did you mean {prefix}{near[0]}?" if near else ""
