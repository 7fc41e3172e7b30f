"""Jobs on a real Slurm: two nodes (of scripts/slurm_local.sh), signals in the middle of a stage, arrays, failures."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoint_support import has_checkpoint
from tests_support import ROOT, environment

TOY = ("recipe=toy_instaflow", "profile=smoke", "cluster=local")
LOCAL = Path(os.environ.get("SLURM_ROOT", "/var/tmp/slurm-local"), "slurm.conf")
LONG = 1500.0  # seconds; the machine of the tests may be slow


def slurm(*command: str, check: bool = True) -> str:
    """What a command of Slurm prints."""
    return subprocess.run(command, capture_output=True, text=True, check=check, env=variables()).stdout


def variables() -> dict[str, str]:
    """The environment of jobs and commands."""
    given = {"SLURM_CONF": os.environ.get("SLURM_CONF", str(LOCAL))} if LOCAL.is_file() else {}
    return environment() | given


def reason() -> str:
    """Why these tests cannot run here; empty if they can."""
    if shutil.which("sbatch") is None:
        return "sbatch is missing: bash scripts/slurm_local.sh installs a Slurm for tests"
    asked = subprocess.run(
        ["sinfo", "-h", "-o", "%D"], capture_output=True, text=True, check=False, env=variables()
    )
    return (
        "" if asked.returncode == 0 and asked.stdout.split() else f"no Slurm answers: {asked.stderr.strip()}"
    )


pytestmark = pytest.mark.slow


def submitted(folder: Path, *arguments: str) -> str:
    """Queue a job; returns its number."""
    command = ["python", "-m", "distill.submit", *TOY, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=variables())
    assert ended.returncode == 0, ended.stderr
    found = re.match(r"job (\d+)", ended.stdout)
    assert found is not None
    return found[1]


def until(there: Callable[[], bool], what: str) -> None:
    """Wait until `there` says so."""
    deadline = time.monotonic() + LONG
    while not there():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


def state(job: str) -> str:
    """The state of a job and, of an array, of each element, in one word if they agree."""
    found = re.findall(r"JobState=(\w+)", slurm("scontrol", "show", "job", job))
    return found[0] if len(set(found)) == 1 else " ".join(found)


def ended(job: str) -> str:
    """The state that a job ends in."""
    until(lambda: state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), f"job {job} did not end")
    return state(job)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where jobs are queued; those that are left are cancelled."""
    if why := reason():
        pytest.skip(why)
    yield tmp_path
    for line in slurm("squeue", "-h", "-o", "%A %Z").splitlines():
        job, _, place = line.partition(" ")
        if place == str(tmp_path):
            slurm("scancel", job, check=False)


def test_a_signal_in_the_middle_of_a_stage_on_two_nodes(folder: Path):
    """The job is queued again, continues, and exports the weights of the undisturbed one."""
    options = ("profile.steps=300", "trainer.shard=world", "trainer.checkpoint_every=50")
    whole = submitted(folder, *options, "name=whole")
    assert ended(whole) == "COMPLETED"
    run = folder / "runs/parts"
    parts = submitted(folder, *options, "name=parts")
    until(has_checkpoint(run / "reflow/checkpoints"), "no checkpoint")
    slurm("scancel", "--signal=USR1", parts)
    until((run / "stopped.json").is_file, "the signal did not stop the run")
    assert ended(parts) == "COMPLETED"
    log = (run / "jobs" / f"{parts}.log").read_text()
    assert "stopped by SIGUSR1" in log
    assert re.search(rf"job {parts}, restart 1, on n\[1-2\]", log), log[-3000:]
    assert not (run / "stopped.json").exists()
    for stage in ("reflow", "distill", "export"):
        files = [folder / "runs" / name / stage / "model.safetensors" for name in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes(), stage


def test_an_array_and_a_job_that_fails(folder: Path):
    """Each element has a run folder; a job whose run fails is FAILED, and its log says why."""
    job = submitted(folder, "-m", "seed=0,1", "name=s", "cluster.nodes=1")
    assert ended(job) == "COMPLETED"
    for seed in (0, 1):
        run = folder / f"runs/s-seed-{seed}"
        assert (run / "export/model.safetensors").is_file()
        assert (run / f"jobs/{job}_{seed}/job.json").is_file()
        assert f"runs/s-seed-{seed}: done." in (folder / f"runs/.sweep/jobs/{job}_{seed}.log").read_text()
    held = submitted(folder, "name=foreign", "cluster.extra=[--hold]")
    (folder / "runs/foreign/.distill").write_text("somebody else's")
    (folder / "runs/foreign/thesis.txt").touch()
    slurm("scontrol", "release", held)
    assert ended(held) == "FAILED"
    log = (folder / f"runs/foreign/jobs/{held}.log").read_text()
    assert "is not empty and was not made by a run" in log
    assert "exit status 1" in log
    assert "queued again" not in log


LONGER = ("profile.steps=4000", "trainer.checkpoint_every=200", "cluster.nodes=1")


def test_the_limit_of_time(folder: Path):
    """The warning comes before it, and the job is queued again until the run is done."""
    long = (
        "profile.steps=12000",
        "stages.reflow.steps=12000",
        "cluster.nodes=1",
    )  # a minute and a half of a fast core
    options = ("cluster.time=00:02:00", "cluster.signal_lead=50", "cluster.max_idle=5")
    job = submitted(folder, *long, *options, "name=limited")
    assert ended(job) == "COMPLETED"
    log = (folder / f"runs/limited/jobs/{job}.log").read_text()
    assert "stopped by SIGUSR1" in log
    assert f"job {job}, restart 1, on n" in log
    assert "runs/limited: done." in log


def test_a_partition_of_higher_priority_takes_the_nodes(folder: Path):
    """The run saves within the time of grace, waits, and continues; its weights are those of a run that was let alone."""
    whole = submitted(folder, *LONGER, "name=whole")
    assert ended(whole) == "COMPLETED"
    job = submitted(folder, *LONGER, "cluster.partition=main", "name=taken")
    until(has_checkpoint(folder / "runs/taken/reflow/checkpoints"), "no checkpoint")
    high = ("--partition=high", "--nodes=2", "--exclusive", f"--output={folder}/high.log", "--parsable")
    other = slurm("sbatch", *high, "--wrap=sleep 5").strip()
    assert ended(other) == "COMPLETED"
    assert ended(job) == "COMPLETED"
    log = (folder / f"runs/taken/jobs/{job}.log").read_text()
    assert "stopped by SIG" in log
    assert f"job {job}, restart 1, on n" in log
    files = [folder / "runs" / name / "export/model.safetensors" for name in ("whole", "taken")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_two_jobs_on_one_run(folder: Path):
    """The second one, which was queued before the first began, ends with the reason, and the first goes on."""
    options = ("profile.steps=40000", "stages.reflow.steps=40000", "cluster.nodes=1", "name=one")
    first, second = (submitted(folder, *options, "cluster.extra=[--hold]") for _ in range(2))
    slurm("scontrol", "release", first)
    until(has_checkpoint(folder / "runs/one/reflow/checkpoints"), "no checkpoint")
    slurm("scontrol", "release", second)
    assert ended(second) == "FAILED"
    assert "one/.lock: the run is locked by process" in (folder / f"runs/one/jobs/{second}.log").read_text()
    assert state(first) == "RUNNING"


def test_templates_by_hand(folder: Path):
    """`slurm/train.sbatch`, and an evaluation as a job after it."""
    train, after = (str(ROOT / "slurm" / f"{name}.sbatch") for name in ("train", "afterwards"))
    options = (
        "--export=ALL,GLOO_SOCKET_IFNAME=lo",
        f"--chdir={folder}",
        "--parsable",
        f"--output={folder}/%j.log",
    )
    job = slurm("sbatch", *options, train, *TOY[:2], "name=hand").strip()
    export = f"model={folder}/runs/hand/export"
    second = slurm(
        "sbatch", *options, f"--dependency=afterok:{job}", after, export, "reference=digits"
    ).strip()
    assert ended(job) == "COMPLETED"
    assert ended(second) == "FAILED", "points are no digits"
    assert "error:" in (folder / f"{second}.log").read_text()
