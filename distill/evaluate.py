"""`python -m distill.evaluate model=FOLDER reference=digits`: a model, or anyone's images, measured against real
images."""

from __future__ import annotations

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from distill import interrupt, terminal
from distill.recipe import compose


@hydra.main(version_base="1.3", config_path=str(compose.CONFIGS), config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Compose, measure, print the table and the protocol. Wrong input ends in one message, not a traceback."""
    # Imports torch, which --help does not need.
    from distill.stages.request import Request, data_configs
    from distill.stages.standalone import evaluate, summary

    try:
        with terminal.report_errors(compose.explain), interrupt.watch():
            plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
            assert isinstance(plain, dict)
            sources = HydraConfig.get().runtime.config_sources
            folders = [source.path for source in sources if source.schema == "file"]
            out = evaluate(
                Request(**{str(key): value for key, value in plain.items()}), data_configs(folders)
            )
    except interrupt.Interrupted as stop:
        print(f"{stop}; nothing was written", file=sys.stderr)
        sys.exit(128 + stop.signum)
    print(terminal.printable(summary(out)))


if __name__ == "__main__":
    compose.run_verb(main)
