"""Where configs and recipes lie, and how recipes become the Hydra group `recipe`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
CONFIGS, RECIPES = ROOT / "configs", ROOT / "recipes"


def recipes() -> dict[str, Path]:
    """name -> file of every recipe on disk."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def register_recipes() -> None:
    """Register every file of `recipes/` as an option of the group `recipe`, merged at the top of the
    config."""
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


def default_name(recipe: str, choices: Mapping[str, Any]) -> str:
    """Name of the run folder: the recipe, with the profile where it is not the full one, so that a trial
    never blocks the real run."""
    profile = choices.get("profile", "full")
    return recipe if profile == "full" else f"{recipe}-{profile}"


def full_errors() -> bool:
    """Whether HYDRA_FULL_ERROR=1 asks for tracebacks."""
    return os.environ.get("HYDRA_FULL_ERROR", "0") == "1"
