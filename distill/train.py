"""`python -m distill.train recipe=NAME`: trains, distils, evaluates and exports; the same command continues a run."""

from __future__ import annotations

import sys

from distill import interrupt

if __name__ == "__main__":
    interrupt.expect()  # before the imports, which take seconds

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from distill import launch, terminal, world
from distill.recipe import compose, schema
from distill.recipe.run import check, run, summary
from distill.stages.base import FastDevRun

compose.register_recipes()


@hydra.main(version_base="1.3", config_path=str(compose.CONFIGS), config_name="config")
def main(cfg: DictConfig) -> None:
    """Compose and run a recipe, and print the paths of its results. Wrong input exits with one message."""
    hydra_config = HydraConfig.get()
    try:
        with terminal.report_errors(compose.explain), schema.typed_places(cfg):
            world.adopt_srun()
            recipe_name = compose.chosen_recipe(hydra_config.runtime.choices)
            plain = schema.read(cfg, hydra_config.overrides.task)
            name = compose.run_name(plain["name"], recipe_name, hydra_config, sys.argv[1:])
            devices = plain["trainer"]["devices"]
            if launch.needed(devices) and not plain["plan"]:
                # Report errors once, before several processes start.
                check(plain, name=name, processes=devices)
                if code := launch.launch(
                    "distill.train", compose.process_arguments(hydra_config, name), devices
                ):
                    sys.exit(code)
                return
            try:
                with interrupt.watch():
                    folder = run(plain, name=name, recipe_name=recipe_name)
            except FastDevRun as tried:
                print(terminal.printable(str(tried)), file=sys.stderr)
                return
    except interrupt.Interrupted as stop:
        print(f"{stop}; the same command continues", file=sys.stderr)
        sys.exit(128 + stop.signum)
    finally:
        world.leave()
    if not plain["plan"] and terminal.is_main():
        print(terminal.printable(summary(folder)))


if __name__ == "__main__":
    compose.run_verb(main)
