"""Names, places and keys at the edges: pictures beside a monitor's, new files in folders of a run, keys of Hydra's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from distill.stages.monitor import Monitor
from distill.stages.outputs import check_comparison, check_file
from distill.world import World


def test_a_resumed_monitor_deletes_its_own_pictures_alone(tmp_path):
    folder = tmp_path / "monitor"
    folder.mkdir()
    mine = ["holiday_2024.png", "step_77.png", "a.png", "diagnostics_9.png"]
    later, earlier = ["step_0000020.png", "diagnostics_0000020.png"], ["step_0000010.png"]
    for name in (*mine, *later, *earlier):
        (folder / name).write_text("x")
    monitor = object.__new__(Monitor)
    monitor.folder, monitor.options = folder, SimpleNamespace(metric="fd")
    monitor.context = SimpleNamespace(world=World(), folder=tmp_path, name="distill")
    monitor.resume(10)
    assert sorted(p.name for p in folder.glob("*.png")) == sorted([*mine, *earlier])


def test_new_files_in_stages_and_exports_are_refused(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.json").write_text("{}")
    for name in ("x.png", "step_0000005.png"):
        with pytest.raises(ValueError, match="expected a path elsewhere"):
            check_file(tmp_path / "export" / name, asked=True, software="distill.sample")
    with pytest.raises(ValueError, match="expected another folder"):
        check_comparison(
            tmp_path / "export" / "comparison.md", tmp_path / "export" / "c.png", "distill.compare"
        )
    check_file(tmp_path / "x.png", asked=True, software="distill.sample")


def test_a_page_of_the_users_is_no_comparison(tmp_path):
    page, picture = tmp_path / "comparison.md", tmp_path / "comparison.png"
    page.write_text("# Comparison of my own thoughts\n")
    with pytest.raises(ValueError, match="is not a comparison"):
        check_comparison(page, picture, "distill.compare")
    page.unlink()
    picture.write_text("mine")
    with pytest.raises(ValueError, match="is not a comparison"):
        check_comparison(page, picture, "distill.compare")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["name=metrics.json"], "name: found 'metrics.json', which the run itself uses"),
        (["name=plan.json"], "name: found 'plan.json', which the run itself uses"),
        (
            ["+eval.models={report.md: {stage: teacher, steps: [1]}}"],
            "models: row label: found 'report.md', which the run itself uses",
        ),
        (["+stages.distill.method._partial_=true"], "method._partial_"),
        (["+stages.distill.method._args_=[1]"], "method._args_"),
        (["+data._partial_=true"], "_partial_: no such key"),
        (["monitor.features={bogus: 1}"], "monitor.features._target_: missing"),
        (["monitor.data={bogus: 1}"], "monitor.data._target_: missing"),
    ],
)
def test_names_and_keys_that_are_not_the_users(refuse, arguments, message):
    assert message in refuse("recipe=instaflow", "profile=smoke", "plan=true", *arguments)
