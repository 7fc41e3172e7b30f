"""What a recipe says is read by somebody, or refused before anything runs: at every depth, whoever wrote the file."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from distill.recipe import compose as recipe_configs
from distill.train import main


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """`distill.train ... plan=true` in this process: (what it printed, the message that it ended with)."""

    def call(*given: str, recipe: str | bytes | None = None, name: str = "mine.yaml") -> tuple[str, str]:
        monkeypatch.chdir(tmp_path)
        words = ["profile=smoke", "plan=true", *given]
        if recipe is not None:
            path = Path("conf/recipe", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
            words = ["--config-dir", "conf", "recipe=mine", *words]
        monkeypatch.setattr(sys, "argv", ["distill.train", *words])
        GlobalHydra.instance().clear()
        message = ""
        try:
            recipe_configs.run_verb(main)
        except SystemExit as ended:
            message = str(ended.code)
        return capsys.readouterr().out, message

    return call


TOY = "defaults: [toy_instaflow, _self_]\n"


@pytest.mark.parametrize(
    "text",
    [
        TOY + "stages: {distill: {steps: 3}}\n",
        "# @package _global_\n" + TOY + "stages: {distill: {steps: 3}}\n",
        "# @package recipe\n" + TOY + "stages: {distill: {steps: 3}}\n",
        "# mine\n# @package _global_\n" + TOY + "stages: {distill: {steps: 3}}\n",
        "\ufeff" + TOY + "stages: {distill: {steps: 3}}\n",
        (TOY + "stages: {distill: {steps: 3}}\n").replace("\n", "\r\n"),
        TOY + "many: 3\nstages: {distill: {steps: '${many}'}}\n",
        TOY + "many: 3\nother: '${many}'\nstages: {distill: {steps: '${oc.select:other}'}}\n",
    ],
)
def test_a_recipe_needs_no_header(plan, text):
    printed, message = plan("profile.steps=null", recipe=text)
    assert message == ""
    assert re.search("Train +steps 3, batch_size 16", printed)


def test_a_recipe_may_be_called_yml(plan):
    printed, message = plan(
        "profile.steps=null", recipe=TOY + "stages: {distill: {steps: 3}}\n", name="mine.yml"
    )
    assert (message, "steps 3," in printed) == ("", True)
    _, message = plan(recipe=TOY)
    assert "mine.yml: two files with the same name" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TOY + "stagse: {distill: {steps: 3}}\n", "stagse: no such key, did you mean stages?"),
        (TOY + "many: 3\n", "many: no such key"),
        (TOY + "a: 1\nb: '${a}'\n", "no such key"),
        (
            TOY + "stages: {distill: {stepz: 3}}\n",
            "stages.distill.stepz: no such key, did you mean stages.distill.steps?",
        ),
        (TOY + "stages: {pairs: {sampler: 3}}\n", "stages.pairs.sampler: found 3, expected"),
        (TOY + "stages: {distill: {method: {stepz: 3}}}\n", "did you mean stages.distill.method.steps?"),
        (
            TOY + "stages: {distill: {optim: {student: {emma: 1}}}}\n",
            "stages.distill.optim.student.emma: no such key",
        ),
        (
            TOY + "stages: {distill: {optim: {student: {clip: big}}}}\n",
            "optim.student.clip: found 'big', expected float",
        ),
        (
            TOY + "stages: {distill: {optim: {student: {optimizer: {lrr: 1}}}}}\n",
            "optim.student.optimizer.lrr: no such key",
        ),
        (
            TOY + "stages: {distill: {optim: {student: {schedule: {warm: 1}}}}}\n",
            "optim.student.schedule.warm: no such key",
        ),
        (
            TOY + "stages: {distill: {networks: {a: [b]}}}\n",
            "stages.distill.networks.a: found ['b'], expected str",
        ),
        (
            TOY + "stages: {distill: {adapt: {knid: v}}}\n",
            "stages.distill.adapt.knid: no such key, did you mean stages.distill.adapt.kind?",
        ),
        (TOY + "stages: {reflow: {net: {widht: 3}}}\n", "stages.reflow.net.widht: no such key, did you mean"),
        (
            TOY + "stages: {reflow: {net: {width: wide}}}\n",
            "stages.reflow.net.width: found 'wide', expected int",
        ),
        (TOY + "stages: {distill: 5}\n", "stages.distill: found 5, expected a mapping or null"),
        (TOY + "stages: {distill: null}\n", "refers to 'distill', expected one of"),
        (TOY + "stages: {more: {steps: 1}}\n", "stages.more._target_: missing"),
        (
            TOY + "stages: {more: {_target_: builtins.dict}}\n",
            "stages.more._target_: found 'builtins.dict', expected a stage",
        ),
        (
            TOY + "stages: {more: {_target_: no.where.X}}\n",
            "stages.more._target_: found 'no.where.X', which cannot be",
        ),
        (TOY + "repeat: {cary: {teacher: reflow}}\n", "repeat.cary: no such key, did you mean repeat.carry?"),
        (TOY + "repeat: {then: {reflow: {intt: x}}}\n", "repeat.then.reflow.intt: no such key, did you mean"),
        (TOY + "repeat: {carry: {export: reflow}}\n", "repeat.carry.export: has no effect: no stage of"),
        (TOY + "repeat: {stages: [pairs, pairs]}\n", "repeat.stages: found"),
        (
            TOY + "halve: {stage: distill, strat: 4, end: 1}\n",
            "halve.strat: no such key, did you mean halve.start?",
        ),
        (TOY + "profile: {stepz: 4}\n", "profile.stepz: no such key, did you mean profile.steps?"),
        (TOY + "profile: {steps: 4.5}\n", "profile.steps: found 4.5, expected int or null"),
        (TOY + "trainer: {thread: 4}\n", "trainer.thread: no such key, did you mean trainer.threads?"),
        (
            TOY + "loggers: [{_target_: lightning.pytorch.loggers.WandbLogger, projct: x}]\n",
            "loggers[0].projct: no such key, did you mean loggers[0].project?",
        ),
        (
            TOY + "loggers: [{_target_: distill.engine.logging.Wandb}]\n",
            "of an earlier version, expected 'lightning.pytorch.loggers.WandbLogger'",
        ),
        (
            TOY + "loggers: [{_target_: lightning.pytorch.loggers.WandbLogger, id: x}]\n",
            "loggers[0].id: is given by the stage",
        ),
        (
            TOY
            + "callbacks: [{_target_: lightning.pytorch.callbacks.LearningRateMonitor, interval: step}]\n",
            "callbacks[0].interval: no such key",
        ),
        (
            TOY
            + "callbacks: [{_target_: lightning.pytorch.callbacks.ModelCheckpoint, every_n_train_steps: -3}]\n",
            "callbacks[0]: Invalid value for every_n_train_steps",
        ),
        (TOY + "callbacks: [{_target_: torch.nn.Linear}]\n", "expected a subclass of lightning"),
        (TOY + "trainer: {profiler: simpel}\n", "trainer.profiler: found 'simpel', expected one of"),
        (TOY + "trainer: {fast_dev_run: -1}\n", "trainer.fast_dev_run: expected at least 0, found -1"),
        (TOY + "loggers: {a: 1}\n", "Cannot merge DictConfig with ListConfig"),
        (TOY + "name: 1.10\n", "name: found 1.1, expected a string"),
        ("[1, 2]\n", "mine.yaml: found a list, expected a mapping"),
        ("", "stages: found none"),
        (TOY + "stages:\n\tdistill: {}\n", "mine.yaml: while scanning"),
        (TOY + "stages: {distill: {steps: 3, steps: 4}}\n", "mine.yaml: while constructing a mapping"),
        (b"stages: \xff\n", "mine.yaml: 'utf-8' codec can't decode"),
        ("defaults: [instaflo]\n", "instaflo"),
        ("defaults: [/net@stages.x.net: unet_tny]\n", "unet_tny"),
    ],
)
def test_what_nobody_reads_is_refused(plan, text, expected):
    _, message = plan(recipe=text)
    assert expected in message
    assert message.startswith("error: ")


@pytest.mark.parametrize(
    "value", ["${oc.env:TOKEN}", "${x}", "a${oc.decode:${oc.env:TOKEN}}", "${oc.env:TOKEN,none}", "${now:%Y}"]
)
def test_stages_take_nothing_from_the_environment(plan, monkeypatch, value):
    monkeypatch.setenv("TOKEN", "hunter2")
    text = TOY + "x: '${oc.env:TOKEN}'\nstages: {distill: {stream: '" + value + "'}}\n"
    printed, message = plan(recipe=text)
    assert "stages are written to plan.json" in message
    assert "hunter2" not in printed + message


def test_where_runs_lie_may_come_from_the_environment(plan, monkeypatch, tmp_path):
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    printed, message = plan(recipe=TOY + "runs_dir: '${oc.env:SCRATCH}/runs'\n")
    assert message == ""
    assert printed.startswith(f"{tmp_path}/scratch/runs/mine-smoke:")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("teacher.precision=fp8", "(typed as teacher.precision)"),
        ("eval.meter.k=0", "stages.evaluate: meter.k: found 0, expected at least 1 (typed as eval)"),
        ("monitor.metric=recall", "(typed as monitor.metric)"),
        ("rounds=0", "expected an integer of at least 1, found 0 (typed as rounds)"),
    ],
)
def test_a_message_says_where_the_value_is_typed(plan, override, expected):
    assert expected in plan("recipe=instaflow", override)[1]
