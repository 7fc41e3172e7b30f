"""Running the verbs as a user would: a process of its own, in a folder of its own."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """The user's environment without what would leak into a test."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HYDRA_"))}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# Runs `python -m distill.<verb>` in forks of a process that has imported everything, since that takes longer than most runs of
# the tests. One line of JSON a call; answers with the number of the fork, then with its exit code.
SERVER = """
import json, os, runpy, sys
import distill.compare, distill.evaluate, distill.sample, distill.train
import distill.methods.disback, distill.pipeline.stages, scipy.linalg, sklearn.datasets

for line in sys.stdin:
    call = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(call["folder"])
        os.environ.clear()
        os.environ.update(call["env"])
        for number, name in enumerate([os.devnull, call["out"], call["err"]]):
            os.dup2(os.open(name, os.O_WRONLY if number else os.O_RDONLY), number)
        sys.argv = [call["module"], *call["arguments"]]
        sys.modules.pop(call["module"])
        runpy.run_module(call["module"], run_name="__main__", alter_sys=True)
        sys.exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
_server: list[subprocess.Popen[str]] = []


def server() -> subprocess.Popen[str]:
    """The process of `SERVER`; one for each process of pytest."""
    if not _server:
        command = [sys.executable, "-c", SERVER]
        _server.append(
            subprocess.Popen(
                command, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        )
        atexit.register(_server[0].kill)
    return _server[0]


def run_verb(
    folder: Path, verb: str, *arguments: str, check: bool = True, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """`python -m distill.<verb> arguments` in `folder`; with `check`, a failure shows the end of its messages."""
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        for file in (out, err):
            file.touch()
        call = {"folder": str(folder), "module": f"distill.{verb}", "arguments": arguments}
        call |= {"env": environment(), "out": str(out), "err": str(err)}
        process.stdin.write(json.dumps(call) + "\n")
        process.stdin.flush()
        pid = int(process.stdout.readline())
        alarm = threading.Timer(timeout, os.kill, (pid, signal.SIGKILL))
        alarm.start()
        code = int(process.stdout.readline())
        alarm.cancel()
        result = subprocess.CompletedProcess([verb, *arguments], code, out.read_text(), err.read_text())
    if check:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def kill_when(folder: Path, options: Sequence[str], there: Callable[[], bool], timeout: float = 200) -> None:
    """Start `python -m distill.train` as a user would and SIGKILL all its processes as soon as `there` says so."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distill.train", *options],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + timeout
    while not there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    ended = process.poll()
    if ended is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert ended is None, f"the run ended with {ended} before it could be killed"
    assert there()


def load_script(name: str) -> ModuleType:
    """`scripts/<name>.py` as a module, the same one each time."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
