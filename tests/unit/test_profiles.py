"""Values of a profile, and the recipes with the numbers of papers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import teacher_support
import token_files_support
import yaml
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from tests_support import ROOT, call_verb

from distill.recipe.compose import CONFIGS, RECIPES, recipes, register_recipes, run_name
from distill.recipe.expand import expand
from distill.recipe.plan import build_stages, dry_run
from distill.recipe.schema import read

LATENT = yaml.safe_load((ROOT / "configs/profile/latent.yaml").read_text())
PRESETS = sorted(name for name in recipes() if name.startswith("paper/"))
PROMPTS = ("teacher=sd", "teacher.path=sd", "data=prompts", "data.path=prompts.txt", "eval=prompts")


def expanded(*options: str) -> dict[str, dict[str, Any]]:
    register_recipes()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return expand(read(compose("config", list(options)), options))


def test_latent_has_values_for_methods_that_exist() -> None:
    methods = {path.stem for path in (ROOT / "configs/method").glob("*.yaml")}
    # Teachers that train from data, and a student of classifier-free guidance, have none; nor have models of tokens.
    tokens = {"tokenizer", "autoregressive", "distilled_decoding", "teacher_score", "distilled_decoding2"}
    assert methods - set(LATENT["methods"]) == {"flow_matching", "denoising", "guided"} | tokens
    assert set(LATENT["adapters"]) == set(LATENT["methods"])


def test_latent_sets_rates_counts_and_averages() -> None:
    stages = expanded("recipe=instaflow", *PROMPTS, "student=flow", "profile=latent")
    assert (stages["pairs"]["count"], stages["pairs"]["sampler"]) == (20000, "teacher")
    assert stages["pairs2"]["sampler"] == {"solver": "euler", "steps": 25}
    assert (stages["pairs"]["guidance_scale"], stages["pairs2"].get("guidance_scale", 1.0)) == (5.0, 1.0)
    assert stages["evaluate"]["models"]["teacher"]["guidance_scale"] == 5.0
    for name in ("reflow", "distill"):
        optim = stages[name]["optim"]["student"]
        assert (optim["optimizer"]["lr"], optim["ema"], optim["optimizer"]["fused"]) == (1e-6, 0.9999, True)
        assert (stages[name]["batch_size"], stages[name]["accumulate"]) == (64, 8)


def test_the_command_line_stands_above_a_profile() -> None:
    options = ("stages.distill.steps=7", "stages.distill.optim.fake.optimizer.lr=0.5", "student=lora")
    stages = expanded(
        "recipe=dmd", *PROMPTS, *options, "+eval.models.teacher.guidance_scale=2", "profile=latent"
    )
    distill = stages["distill"]
    assert (distill["steps"], distill["batch_size"]) == (7, 64)
    rates = {key: optim["optimizer"]["lr"] for key, optim in distill["optim"].items()}
    assert rates == {"student": 5e-5, "fake": 0.5}, "of adapters, and that of the command line"
    assert distill["optim"]["fake"]["optimizer"]["_target_"] == "torch.optim.AdamW"
    assert stages["evaluate"]["models"]["teacher"]["guidance_scale"] == 2


def test_samples_of_the_teacher_for_methods_that_read_images() -> None:
    stages = expanded("recipe=lcm", *PROMPTS, "profile=latent")
    assert (stages["samples"]["count"], stages["samples"]["guidance_scale"]) == (20000, 5.0)
    stages = expanded("recipe=lcm", *PROMPTS, "profile=latent", "data.samples.count=6")
    assert (stages["samples"]["count"], stages["samples"]["guidance_scale"]) == (6, 5.0)


def test_rounds_of_a_halving_have_the_steps_of_the_profile() -> None:
    stages = expanded("recipe=progressive", *PROMPTS, "profile=latent")
    assert {stages[f"distill_{n}"]["steps"] for n in (16, 8, 4, 2, 1)} == {
        LATENT["methods"]["progressive"]["steps"]
    }
    typed = expanded("recipe=progressive", *PROMPTS, "profile=latent", "+halve.rounds.1.steps=9")
    assert typed["distill_1"]["steps"] == 9


def test_wrong_values_are_named() -> None:
    stages = {
        "distill": {
            "_target_": "distill.stages.train.Train",
            "method": {"_target_": "distill.methods.sid.SiD"},
        }
    }
    with pytest.raises(
        ValueError, match=r"profile\.pairs\.students: no such key, did you mean profile\.pairs\.student"
    ):
        expand({"stages": stages, "profile": {"pairs": {"students": {}}}})
    with pytest.raises(ValueError, match=r"profile\.methods\.sid"):
        expand({"stages": stages, "profile": {"methods": {"sid": 3}}})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("teachers")
    teacher_support.sd(place / "sd15", prediction="epsilon")
    teacher_support.sdxl(place / "sdxl")
    token_files_support.llamagen(place / "l")
    token_files_support.var(place / "d16")
    token_files_support.llamagen(place / "student", student=True)
    (place / "prompts.txt").write_text("a dog\n")
    return place


def test_there_are_eight_presets() -> None:
    assert len(PRESETS) == 8
    for name in PRESETS:
        assert (RECIPES / f"{name}.yaml").read_text().startswith("# Not run here. "), name


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_composes_and_plans(folders: Path, name: str) -> None:
    shape = name.rpartition("_")[2]
    small = ["+stages.distill.method.gan.groups=8"] if name == "paper/dmd2_sdxl" else []  # 16 channels
    given = [f"recipe={name}", *small]
    if name.startswith("paper/dd_"):
        given += token_files_support.options(name, folders / shape)
    else:
        given += [f"teacher.path={folders / shape}", f"data.path={folders / 'prompts.txt'}"]
    made = dry_run(build_stages(expanded(*given)))
    memory = made["student" if name == "paper/dd_student" else "distill"].memory
    assert memory is not None
    assert sum(memory.total().values()) > 0
    model = made["export"].model or made["student" if name == "paper/dd_student" else "distill"].model
    assert model is not None
    wanted = {
        "paper/dmd2_sdxl": [999, 749, 499, 249, 0],
        "paper/sid_lsg_sd15": [625, 0],
        "paper/dd_llamagen_l": [1, 1 - 2 / 16, 0],
        "paper/dd_var_d16": [1, 1 - 2 / 3, 0],
        "paper/dd_student": [1, 1 - 2 / 16, 0],
    }
    if name in wanted:
        steps = len(wanted[name]) - 1
        assert model.spec.times[steps] == pytest.approx(wanted[name], abs=1e-6)


def test_a_preset_is_a_recipe_of_the_command_line(folders: Path, tmp_path: Path) -> None:
    given = (f"teacher.path={folders / 'sd15'}", f"data.path={folders / 'prompts.txt'}", "plan=true")
    planned = call_verb(tmp_path, "train", "recipe=paper/sid_lsg_sd15", *given, check=True).stdout
    assert "runs/sid_lsg_sd15: 5 stages" in planned
    assert "steps 19532, batch_size 512" in planned
    assert "recipe=paper/dmd2_sdxl" in call_verb(tmp_path, "train").stderr


def test_runs_of_a_wandb_sweep_have_folders_of_their_own(monkeypatch):
    """Also in the processes of a run, which are given its name; WANDB_RUN_ID alone names no folder."""
    config = SimpleNamespace(runtime=SimpleNamespace(choices={"profile": "full"}), mode=RunMode.RUN)
    monkeypatch.setenv("WANDB_RUN_ID", "ab12cd34")
    assert run_name(None, "paper/sid_edm", config) == "sid_edm"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert run_name(None, "paper/sid_edm", config) == "sid_edm-ab12cd34"
    assert run_name("sid_edm-ab12cd34", "paper/sid_edm", config) == "sid_edm-ab12cd34"
    assert run_name("mine", "sid", config) == "mine-ab12cd34"
