"""`python -m distill.train recipe=NAME`: from a teacher to an exported, evaluated student; run again, it
continues."""

from __future__ import annotations

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from distill.pipeline import config
from distill.pipeline.run import run, summary

config.register_recipes()


@hydra.main(version_base="1.3", config_path=str(config.CONFIGS), config_name="config")
def main(cfg: DictConfig) -> None:
    """Compose, run, say where everything lies. Wrong input ends in one message, not a traceback."""
    choices = HydraConfig.get().runtime.choices
    try:
        recipe_name = config.chosen_recipe(choices)
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        assert isinstance(plain, dict)
        name = plain["name"] or config.default_name(recipe_name, choices)
        folder = run(plain, name=name, recipe_name=recipe_name)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        if config.full_errors():
            raise
        sys.exit(f"error: {error}")
    if not plain["plan"]:
        print(summary(folder))


if __name__ == "__main__":
    main()
