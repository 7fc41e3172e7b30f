"""Options with another name than in earlier versions: digests stay, recipes are refused with the name of now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests_support import refusal

from distill.methods.families.options import Guidance, Updates
from distill.stages.artifact import digest_of, hashed_config
from distill.stages.renamed import MOVED, former_names, with_name_of_now
from distill.typed import filled

FORMER = {
    "_target_": "distill.methods.dmd.DMD",
    "levels": None,
    "unit_noise": False,
    "input": "backward_sim",
    "generator_times": None,
    "fake_times": None,
    "weighting": "auto",
    "sigma_data": 0.5,
    "reduction": "mean",
    "guidance_teacher": 1.0,
    "null_prob": 0.0,
    "normalise": True,
    "floor": 1e-3,
    "fake_updates_per_generator": 1,
    "gan": None,
    "labels": "data",
    "noise_scale": 1.0,
}
NOW: dict[str, Any] = {
    "_target_": "distill.methods.dmd.DMD",
    "sampling": {"levels": None, "unit_noise": False, "labels": "data"},
    "input": "backward_sim",
    "generator_times": None,
    "fake": {"times": None, "weighting": "auto", "sigma_data": 0.5},
    "guidance": {"teacher": 1.0, "null_prob": 0.0},
    "updates": {"fake_per_student": 1, "first": None, "samples": None},
    "reduction": "mean",
    "normalise": True,
    "floor": 1e-3,
    "gan": None,
    "noise_scale": 1.0,
}


def digest(method: dict[str, Any]) -> str:
    return digest_of(hashed_config({"_target_": "distill.stages.train.Train", "method": method}, ()))


def test_a_method_keeps_the_digest_that_it_had() -> None:
    assert former_names(NOW) == former_names(FORMER) == FORMER
    assert digest(NOW) == digest(FORMER)
    for other in ({"first": "fake"}, {"samples": "fresh"}, {"fake_per_student": 2}):
        assert digest(NOW | {"updates": NOW["updates"] | other}) != digest(NOW)
    plain = {"_target_": "x.Y", "null_prob": 0.1, "times": "uniform", "guidance": {"strength": 2.0}}
    assert former_names(plain) == plain


def test_differences_have_the_names_of_now() -> None:
    assert with_name_of_now("config.method.levels: 1 -> 2", NOW) == "config.method.sampling.levels: 1 -> 2"
    for line in ("config.method.floor: 1 -> 2", "config.method.window: 1 -> 2", "config.steps: 1 -> 2"):
        assert with_name_of_now(line, NOW) == line


@pytest.mark.parametrize(
    ("former", "now"), [("guidance_teacher", MOVED["guidance_teacher"]), ("levels", "sampling.levels")]
)
def test_a_former_name_is_answered_with_the_place_of_now(former: str, now: str, tmp_path: Path) -> None:
    """On the command line, which Hydra reads, and in a recipe of one's own."""
    method = "stages.distill.method"
    options = ("recipe=sid", "profile=smoke", "plan=true")
    said = refusal(tmp_path, "train", *options, f"{method}.{former}=2")
    assert f"{method}.{former}: is now {method}.{now}; write {method}.{now}=..." in said
    recipe = tmp_path / "conf" / "recipe" / "mine.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(f"defaults: [sid, _self_]\nstages: {{distill: {{method: {{{former}: 2}}}}}}\n")
    said = refusal(tmp_path, "train", "--config-dir", "conf", "recipe=mine", *options[1:])
    assert f"{method}.{former}: is now method.{now}; write it there" in said


def test_a_block_keeps_the_defaults_of_its_method() -> None:
    default = Updates(fake_per_student=5)
    assert filled(default, {"first": "fake"}, "updates") == Updates(5, "fake")
    assert filled(default, Updates(2), "updates") == Updates(2)
    with pytest.raises(ValueError, match=r"^guidance.techer: no such key, did you mean guidance.teacher\?"):
        filled(Guidance(), {"techer": 2.0}, "guidance")
    with pytest.raises(
        ValueError, match=r"^updates.first: found 'both', expected one of 'student', 'fake' or null"
    ):
        filled(default, {"first": "both"}, "updates")


def test_an_option_that_came_later_keeps_the_digests_of_before() -> None:
    assert former_names({"w_min": 0.0, "embed_w": True}) == {"w_min": 0.0}
    assert former_names({"w_min": 0.0, "embed_w": False}) == {"w_min": 0.0, "embed_w": False}
