"""Names and paths reach every verb letter for letter, and no two jobs of a sweep share a folder."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from tests_support import copied_run, environment, run_verb

from distill import compare, sample, terminal
from distill.names import check_name
from distill.recipe import compose
from distill.recipe.arguments import arguments, is_sweep, quoted, slug, to_argument
from distill.train import main

ODD = [
    "a=b",
    "p (1)",
    "été",
    "my run #2",
    "1.10",
    "1e3",
    "0x10",
    "1_000",
    "yes",
    "[a]",
    "{a}",
    "it's",
    'say "hi"',
]
ODD += [
    "${seed}",
    "$HOME",
    "a\\b",
    "a\\",
    "\\${x}",
    "x,y",
    "null ",
    "true",
    "-1",
    "@",
    "a:b",
    "~a",
    "2024",
    "?",
    "*.x",
]


def composed(argument: str) -> object:
    """What an override puts into a config."""
    override = OverridesParser.create().parse_override(argument)
    cfg = OmegaConf.create({"seed": 7})
    OmegaConf.update(cfg, "value", override.value())
    return OmegaConf.to_container(cfg, resolve=True)["value"]


@pytest.mark.parametrize("text", ODD)
def test_a_name_is_what_was_typed(text):
    (argument,) = arguments([f"name={text}"])
    assert composed(argument) == text
    assert arguments([argument]) == [argument], "what is quoted stays so"
    assert composed(to_argument(argument)) == text or "${" in text


def test_any_text_survives_the_grammar():
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choice("ab \\'\"$${}#=,()[]é\n~:1.") for _ in range(draw.randrange(9)))
        assert composed(f"name={quoted(text)}") == text


def test_paths_at_any_depth_are_quoted_and_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["runs_dir=~/x", "teacher.path=/a b", "+stages.pairs.path=c=d", "data.path=~", "name=~", "seed=1"]
    expected = ["/home/me/x", "/a b", "c=d", "/home/me", "~", 1]
    assert [composed(a) for a in arguments(given)] == expected
    assert arguments(["--config-dir", "~/c", "name=null"]) == ["name=null", "--config-dir", "/home/me/c"]


def test_flags_may_stand_anywhere_and_sweeps_keep_their_meaning():
    assert arguments(["recipe=a", "-m", "seed=0,1"]) == ["recipe='a'", "seed=0,1", "-m"]
    assert arguments(["-m", "name=1.10,b"]) == ["name='1.10','b'", "-m"]
    assert arguments(["-m", "name=choice(a,b)"]) == ["name=choice(a,b)", "-m"]
    assert is_sweep("name='1.10','b'")
    assert arguments(["-m", "runs_dir=/p (1)", "seed=0,1"])[0] == "runs_dir='/p (1)'"
    assert arguments(["--config-dir", "a=b", "seed=1"]) == ["seed=1", "--config-dir", "a=b"]
    assert arguments(["steps=1,2"]) == ["steps=[1,2]"]


def test_text_that_is_not_utf8_is_refused_at_once():
    with pytest.raises(ValueError, match="not UTF-8"):
        arguments([os.fsdecode(b"model=\xff")])
    with pytest.raises(ValueError, match=r"model: found .*not UTF-8"):
        sample.parse([os.fsdecode(b"model=\xff")])
    with pytest.raises(ValueError, match=r"runs: found .*not UTF-8"):
        compare.parse([os.fsdecode(b"\xff")])


def test_slugs_of_different_jobs_differ():
    values = [
        "-1",
        "1",
        "+1",
        "a-b",
        "a b",
        "a,b",
        "[1,2]",
        "{a: 1}",
        "a.b",
        "a_b",
        "1e-3",
        "1e3",
        "é",
        "e",
        "1-2",
        "",
        "x" * 300,
    ]
    keys = ["seed", "b.c", "optim@x.y"]
    found: dict[str, tuple[str, ...]] = {}
    for jobs in (1, 2, 3):
        for chosen in itertools.product(values, repeat=jobs):
            told = tuple(f"{key}={value}" for key, value in zip(keys, chosen, strict=False))
            name = f"sw-{slug(told, set(), named=True)}"
            check_name(name, "name")
            assert found.setdefault(name, told) == told
    assert slug(["seed=1", "lr=1e-3"], set(), named=True) == "lr-1e-3-seed-1", "plain ones stay readable"


def test_what_a_sweep_goes_over_tells_its_jobs_apart():
    assert slug(["recipe=sid", "trainer.threads=1"], set(), named=True) == ""
    assert slug(["recipe=sid"], {"recipe"}, named=True) == "recipe-sid"
    assert slug(["recipe=sid"], {"recipe"}, named=False) == "", "the name is the recipe"
    assert slug(["trainer.threads=1"], {"trainer.threads"}, named=False) == "trainer.threads-1"


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    def call(*given: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["distill.train", *given, "plan=true", "profile=smoke"])
        GlobalHydra.instance().clear()
        compose.run_verb(main)
        return capsys.readouterr().out

    return call


def test_plans_of_odd_names(plan, tmp_path):
    assert plan("recipe=toy_instaflow", "name=1.10").startswith("runs/1.10:")
    assert plan("recipe=toy_instaflow", "name=p (1)=é #2").startswith("runs/p (1)=é #2:")
    assert plan("recipe=toy_instaflow", f"runs_dir={tmp_path}/a=b").startswith(
        f"{tmp_path}/a=b/toy_instaflow-smoke:"
    )


def test_a_word_without_a_key_is_no_recipe():
    with pytest.raises(ValueError, match="instaflow: expected key=value, as in recipe=instaflow"):
        arguments(["instaflow", "profile=smoke"])
    assert arguments(["--info", "config", "-m", "seed=1"]) == ["seed=1", "--info", "config", "-m"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "loggers=[{_target_: a.B}]",
            "loggers: found [{_target_: a.B}], expected option names among csv, jsonl, tensorboard, wandb;",
        ),
        ("+loggers=[[jsonl]]", "loggers: found [[jsonl]], expected option names"),
        ("trainer={devices: 2}", "to change single keys, type trainer.KEY=VALUE"),
    ],
)
def test_a_group_takes_names_of_options(plan, capsys, override, message):
    with pytest.raises(SystemExit) as ended:
        plan("recipe=toy_instaflow", override)
    assert message in str(ended.value.code)


def test_a_sweep_makes_a_folder_a_job(plan):
    told = plan("recipe=toy_instaflow", "-m", "name=sw", "seed=-1,1")
    folders = [line.partition(":")[0] for line in told.splitlines() if line.startswith("runs/")]
    assert len(set(folders)) == len(folders) == 2


def test_sample_reads_its_options_strictly():
    options = sample.parse(
        ["model=my run #2", "count=3", "label=null", "force=TRUE", "guidance_w=.5", "seed=1", "seed=2"]
    )
    assert (options.model, options.count, options.label, options.force) == ("my run #2", 3, None, True)
    assert (options.guidance_w, options.seed) == (0.5, 2)
    for given, expected in {
        "count=1e1": "count: found '1e1', expected int",
        "count=1_0": "count: found '1_0', expected int",
        "count=0": "count: expected at least 1, found 0",
        "steps=0": "steps: expected at least 1, found 0",
        "guidance_scale=nan": "guidance_scale: found 'nan', expected float or null",
        "force=1": "force: found '1', expected bool",
        "cuont=1": "cuont: no such key, did you mean count?; expected model, out, count",
        "device=tpu": "device: found 'tpu', expected cpu",
        "device=meta": "device: found 'meta', expected cpu",
    }.items():
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            sample.parse(["model=x", given])
        assert expected in str(raised.value)


def test_a_device_that_is_not_there_is_one_message():
    name = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ValueError, match=f"device: found '{name}', but this machine has"):
        sample.parse(["model=x", f"device={name}"])


def test_compare_takes_paths_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b", "my run #2"):
        Path(name).mkdir()
    options = compare.parse(["a=b", "my run #2", "out=1.10", "metric=kid"])
    assert (options.paths, options.out, options.metric) == (["a=b", "my run #2"], "1.10", "kid")
    with pytest.raises(
        ValueError, match=r"outt: no such key, did you mean out\?; expected metric, out, or a path"
    ):
        compare.parse(["outt=x"])
    with pytest.raises(ValueError, match="paths: no such key; expected metric, out, or a path"):
        compare.parse(["paths=x"])


def test_printable_text():
    assert terminal.printable("a\x1b[31m\u202eé\nb") == "a\\x1b[31m\\u202eé\nb"
    assert terminal.line("a\nb") == "a\\nb"


ODD_SHELL = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://not_installed.backend"}


CLOSED_PIPE = "import os; read, write = os.pipe(); os.close(read); os.dup2(write, 1)"


def in_an_odd_shell(folder: Path, command: list[str]) -> bytes:
    """What a command prints to an ASCII terminal."""
    done = subprocess.run(command, cwd=folder, env=environment() | ODD_SHELL, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


@pytest.mark.slow
def test_shells_and_notebooks(shared, tmp_path):
    """An ASCII terminal and a backend that is not installed; a closed pipe: no traceback."""
    run = copied_run(shared("toy_instaflow"), tmp_path) / "runs" / "run"
    run = run.rename(run.with_name("été"))
    options = [str(run), f"out={tmp_path / 'out'}", "metric=energy"]
    assert b"\\xe9t\\xe9" in in_an_odd_shell(tmp_path, [sys.executable, "-m", "distill.compare", *options])
    closed = run_verb(tmp_path, "compare", *options, check=False, before=CLOSED_PIPE)
    assert (closed.returncode, closed.stderr) == (terminal.CLOSED, "")


@pytest.mark.slow
def test_plans_in_odd_shells_without_asserts(tmp_path):
    command = [sys.executable, "-O", "-m", "distill.train", "recipe=instaflow", "profile=smoke"]
    printed = in_an_odd_shell(tmp_path, [*command, "plan=true", "name=été"])
    assert printed.startswith(b"runs/\\xe9t\\xe9: 7 stages")
    closed = run_verb(tmp_path, "train", *command[4:], "plan=true", check=False, before=CLOSED_PIPE)
    assert (closed.returncode, closed.stderr) == (terminal.CLOSED, "")
