"""`distill.submit`: the text of a job's script, and what is refused before anything is queued."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from tests_support import ROOT, call_verb, command_line, refusal

from distill.cluster.options import Cluster, Container, seconds
from distill.cluster.script import Run, launcher, script
from distill.cluster.submit import asked, submit
from distill.typed import parse

TEMPLATE = ROOT / "slurm" / "train.sbatch"
TOY = ("recipe=toy_instaflow", "profile=smoke", "cluster=slurm")


@pytest.fixture(autouse=True)
def no_slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is queued where the tests run."""
    place = tmp_path_factory.mktemp("none")
    (place / "sbatch").write_text("#!/bin/sh\necho queued by a test >&2\nexit 1\n")
    (place / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")


def printed(folder: Path, *arguments: str) -> str:
    """The script that a command would queue."""
    text = call_verb(folder, "submit", *TOY, "dry=true", *arguments, check=True).stdout
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert not list(folder.iterdir()), "a trial writes nothing"
    return text


def test_the_script_of_a_job(tmp_path: Path):
    given = ("cluster.nodes=2", "cluster.gpus_per_node=4", "cluster.time=12:00:00", "cluster.account=abc")
    text = printed(
        tmp_path, *given, 'cluster.setup=["module load cuda"]', "cluster.env={A: 'b c'}", "name=a_b"
    )
    head = text.partition("# ---- ")[0]
    asked_for = {line.partition("--")[2] for line in head.splitlines() if line.startswith("#SBATCH ")}
    run = tmp_path / "runs/a_b"
    assert asked_for == {
        *(
            "nodes=2",
            "ntasks-per-node=4",
            "gpus-per-node=4",
            "cpus-per-task=1",
            "time=12:00:00",
            "account=abc",
        ),
        *("signal=USR1@300", "requeue", "open-mode=append", f"chdir={tmp_path}", "job-name=a_b"),
        f"output={run}/jobs/%j.log",
    }
    assert "\nmodule load cuda\n" in head
    assert "\nexport A='b c'\n" in head
    assert "launch=(srun --kill-on-bad-exit=1 --label)" in head
    assert text.endswith(TEMPLATE.read_text().partition("# ---- ")[2]), "the rest is that of the template"


def test_an_array_has_a_run_folder_an_element(tmp_path: Path):
    text = printed(tmp_path, "-m", "seed=0,1", "cluster.parallel=1", "name=s")
    assert "#SBATCH --array=0-1%1" in text
    assert f"#SBATCH --output={tmp_path}/runs/.sweep/jobs/%A_%a.log" in text
    for number in (0, 1):
        found = next(line for line in text.splitlines() if line.strip().startswith(f"{number}) "))
        assert f"run={tmp_path}/runs/s-seed-{number} " in found
        assert f"seed={number}" in found


def executed(
    folder: Path,
    cluster: Cluster | str,
    note: dict[str, object] | None,
    code: int,
    *arguments: str,
    **variables: str,
) -> tuple[int, str]:
    """Run a script, or that of a cluster, with commands of Slurm that only write what they were asked; the exit status and all
    output."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    run = folder / "run"
    run.mkdir(exist_ok=True)
    (run / "stopped.json").write_text(json.dumps(note, indent=2) if note else "")
    for name, body in {
        "srun": f"exit {code}",
        "scontrol": "echo scontrol $*",
        "sbatch": "echo sbatch $* >&2; echo 9",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    written = isinstance(cluster, str)
    text = cluster if written else script(TEMPLATE, cluster, [Run("x", run, ("a=1",))], folder, "told")
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "5",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NAME": "x",
    }
    (folder / "script").write_text(text)
    ended = subprocess.run(
        ["bash", str(folder / "script"), *arguments],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_a_script_queues_again_what_a_signal_stopped_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    note: dict[str, object] = {"signal": "SIGUSR1", "start": "5.0", "stage": "reflow", "idle": 0}
    code, told = executed(tmp_path, Cluster(), note, 143)
    assert (code, "scontrol requeue 5" in told) == (143, True)
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1"}
    assert "scontrol requeue 5_1\n" in executed(tmp_path, Cluster(), note, 143, **array)[1]
    for other, status in ((None, 1), (note | {"start": "5.1"}, 1), (note | {"start": "4.0"}, 0)):
        code, told = executed(tmp_path, Cluster(), other, status)
        assert code == status
        assert "requeue" not in told, "the run failed, or the note is of another start"
    assert "scontrol" not in executed(tmp_path, Cluster(requeue="none"), note, 138)[1]
    code, told = executed(tmp_path, Cluster(requeue="sbatch"), note, 138, SLURM_RESTART_COUNT="0")
    assert code == 138
    assert "sbatch --parsable --dependency=singleton --job-name=x --export=ALL,DISTILL_RESTARTS=1" in told
    assert "continues as job 9" in told
    element = {"SLURM_ARRAY_TASK_ID": "3"}
    assert (
        "--job-name=x-3 --export=ALL,DISTILL_RESTARTS=1 --array=3"
        in executed(tmp_path, Cluster(requeue="sbatch"), note, 138, **element)[1]
    )


def test_restarts_have_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    note: dict[str, object] = {"signal": "SIGUSR1", "start": "5.3", "stage": "reflow", "idle": 0}
    code, told = executed(tmp_path, Cluster(max_restarts=3), note, 138, SLURM_RESTART_COUNT="3")
    assert code == 138
    assert "not queued again: 3 restarts, the most is 3 (cluster.max_restarts)" in told
    assert "requeue 5" in executed(tmp_path, Cluster(max_restarts=4), note, 138, SLURM_RESTART_COUNT="3")[1]
    carried = {"SLURM_RESTART_COUNT": "1", "DISTILL_RESTARTS": "2"}
    assert "not queued again" in executed(tmp_path, Cluster(max_restarts=3), note, 138, **carried)[1]
    told = executed(tmp_path, Cluster(), note | {"idle": 2}, 138, SLURM_RESTART_COUNT="3")[1]
    assert "not queued again: 2 starts in a row without a new checkpoint (cluster.max_idle)" in told


def test_a_script_by_hand_passes_its_arguments_on_to_the_next_job(tmp_path: Path):
    note: dict[str, object] = {"signal": "SIGUSR1", "start": "5.0", "stage": "reflow", "idle": 0}
    text = TEMPLATE.read_text().replace("\nrequeue=scontrol", "\nrequeue=sbatch")
    given = ("recipe=sid", f"runs_dir={tmp_path}", "name=run")
    code, told = executed(tmp_path, text, note, 138, *given)
    assert code == 138
    assert f"DISTILL_RESTARTS=1 {tmp_path}/script {' '.join(given)}\n" in told


def test_the_templates_can_be_used_by_hand():
    for name in ("train", "afterwards"):
        path = ROOT / "slurm" / f"{name}.sbatch"
        ended = subprocess.run(["bash", str(path)], capture_output=True, text=True, check=False)
        assert ended.returncode == 2, ended.stderr
        assert "name=: missing" in ended.stderr or "expected model=... reference=..." in ended.stderr


def test_containers():
    box = Container("image.sqsh", ("/data:/data",))
    assert launcher(Cluster(container=box))[3:5] == [
        "--container-image=image.sqsh",
        "--container-mounts=/data:/data",
    ]
    words = launcher(Cluster(gpus_per_node=1, container=Container("i.sif", ("/d:/d",), "apptainer")))
    assert words[3:8] == ["apptainer", "exec", "--nv", "--bind", "/d:/d"]
    assert words[-1] == "i.sif"
    text = script(TEMPLATE, Cluster(container=box), [Run("x", Path("/r"), ())], Path("/r/jobs"), "told")
    assert "command=(python -m distill.train" in text, "the interpreter is the image's"


@pytest.mark.parametrize(
    ("time", "found"),
    [("30", 1800), ("2:30", 150), ("1:00:00", 3600), ("2-12", 216_000), ("1-1:1:1", 90_061)],
)
def test_limits_of_time(time: str, found: int):
    assert seconds(time) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("recipe=toy_instaflow",),
            "cluster: missing; type cluster=NAME with one of a100_example, local, slurm",
        ),
        (("recipe=toy_instaflow", "cluster=nope"), "nope"),
        (("cluster=slurm",), "recipe: missing"),
        ((*TOY, "cluster.node=2"), "cluster.node: no such key"),
        ((*TOY, "cluster.nodes=0"), "cluster.nodes: found 0, expected at least 1"),
        ((*TOY, "trainer.devices=2"), "trainer.devices: found 2, but in a job srun starts the processes"),
        ((*TOY, "plan=true"), "expected dry=true"),
        ((*TOY, "trainer.fast_dev_run=3"), "trainer.fast_dev_run: found in a job"),
        ((*TOY, "dry=maybe"), "dry: found 'maybe'"),
        ((*TOY, "stages.reflow.steps=x"), "stages.reflow.steps"),
        ((*TOY, "cluster.nodes=5"), "batch_size: found 16, which cannot be split"),
        ((*TOY, "runs_dir=a b"), "found letters that Slurm reads in a way of its own"),
        ((*TOY, "--cfg", "job"), "--cfg: no such flag; expected -m, --config-dir FOLDER"),
    ],
)
def test_refused_before_anything_is_queued(tmp_path: Path, arguments: tuple[str, ...], message: str):
    assert message in refusal(tmp_path, "submit", *arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requeue": "always"}, "cluster.requeue: found 'always'"),
        ({"time": "soon"}, "cluster.time: found 'soon', expected a limit such as"),
        ({"time": 5}, "cluster.signal_lead: found 300 s with time: 5; expected less than 240 s"),
        ({"gpus_per_node": 4, "tasks_per_node": 1}, "expected one task a GPU"),
        ({"extra": ["exclusive"]}, "cluster.extra: found 'exclusive', expected options of sbatch"),
        ({"env": {"1A": "b"}}, "cluster.env: found '1A'"),
        ({"account": "a\n#SBATCH --x"}, "cluster.account: found 'a"),
        ({"setup": ["a\nb"]}, "cluster.setup: found 'a"),
        ({"container": {"image": "i", "runner": "docker"}}, "cluster.container.runner: found 'docker'"),
    ],
)
def test_wrong_options_of_a_cluster(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(Cluster, options, "cluster")


def test_two_elements_of_a_sweep_need_two_folders(tmp_path: Path):
    assert "two elements of the sweep have the run folder" in refusal(
        tmp_path, "submit", *TOY, "dry=true", "-m", "runs_dir=a,a"
    )


def test_what_a_job_was_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sbatch").write_text("#!/bin/sh\ncat > queued\necho '77;local'\n")
    (tools / "sbatch").chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    with command_line(work):
        monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
        told = submit([*TOY, "name=x"])
        (tools / "sbatch").write_text("#!/bin/sh\necho no partition >&2\nexit 1\n")
        with pytest.raises(ValueError, match="sbatch: no partition"):
            submit([*TOY, "name=y"])
    assert told.startswith(f"job 77\n  {work}/runs/x  log: {work}/runs/x/jobs/77.log")
    place = work / "runs/x/jobs/77"
    assert (place / "train.sbatch").read_text() == (work / "queued").read_text()
    facts = json.loads((place / "job.json").read_text())
    assert (facts["job"], facts["run"]) == ("77", "x")
    assert shlex.split(facts["arguments"][-1]) == ["name=x"]
    assert any(line.startswith("torch==") for line in (place / "packages.txt").read_text().splitlines())
    assert len((place / "revision.txt").read_text().strip()) == 40
    assert (place / "changes.diff").is_file()


def test_sbatch_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with command_line(tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(FileNotFoundError, match="sbatch: not found; submit on a machine of the cluster"):
            submit([*TOY])


def test_the_parts_of_a_command_line():
    found = asked(["recipe='x'", "cluster=a", "cluster.nodes=2", "-m", "--config-dir", "/c", "dry=true"])
    assert (found.runs, found.cluster, found.folders) == (
        ("recipe='x'",),
        ("cluster=a", "cluster.nodes=2"),
        ("/c",),
    )
    assert (found.sweep, found.dry) == (True, True)
