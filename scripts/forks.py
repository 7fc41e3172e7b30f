"""Runs verbs in forks of a process that has imported the package: the imports take longer than many a run."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import NoReturn

from hydra.core.global_hydra import GlobalHydra

import distill.launch


def run(module: str, arguments: Sequence[str], before: str = "") -> NoReturn:
    """`python -m module arguments` in this process, a fork, which ends with its exit code. `before`: Python to run first."""
    code = 0
    try:
        GlobalHydra.instance().clear()
        sys.argv = [module, *arguments]
        sys.modules.pop(module, None)
        exec(before, {})
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking the interpreter apart takes longer than many a run


class Process:
    """What `distill.launch` uses of `subprocess.Popen`, for `python -m module arguments`.

    Attributes:
        before: Python that every process runs first.
    """

    before = ""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        process_group: int,
        preexec_fn: Callable[[], object],
    ) -> None:
        sys.stdout.flush()  # else the fork writes what waits as well
        sys.stderr.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, process_group)
            preexec_fn()
            os.environ.clear()
            os.environ.update(env)
            run(command[2], command[3:], self.before)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        os.kill(self.pid, 9)


def fork_processes() -> None:
    """From now on the processes of a run are forks too."""
    vars(distill.launch)["subprocess"] = SimpleNamespace(Popen=Process)
