"""Commands, scripts and whole launchers in forks of the server of `helpers.processes`, where new interpreters would import.

A new interpreter takes seconds to import torch, a fork has it already. The processes are real: each has its own process
id, environment, current folder and output, and can be killed. Each launcher has a test that starts new interpreters.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from helpers.processes import exit_code, in_a_process


def captured(
    target: Callable[..., None],
    *args: object,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Call a function in a process of its own, and return its output as that of a command.

    Args:
        target: function of a module; its uncaught exceptions are printed, as those of a program are.
        args: its arguments.
        cwd: current folder of the process; None for that of this one.
        environment: added to that of this process.
    """
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        variables = {**os.environ, **(environment or {})}
        process = in_a_process(_captured, out, err, cwd or Path.cwd(), variables, target, args)
        code = exit_code(process)
        read = (path.read_text(errors="surrogateescape") if path.exists() else "" for path in (out, err))
        return subprocess.CompletedProcess(target.__name__, code, *read)


def _captured(
    out: Path, err: Path, cwd: Path, environment: Mapping[str, str], target: Callable[..., None], args: Sequence[object]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    target(*args)


def command(*arguments: object) -> None:
    """Run a command of kdcache, as the target of `captured`."""
    from kdcache.cli import main

    main([str(argument) for argument in arguments])


def script(path: Path, *arguments: object) -> None:
    """Run a script for which warnings are errors, as the target of `captured`."""
    warnings.simplefilter("error")
    sys.argv = [str(path), *map(str, arguments)]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def torchrun(*arguments: object) -> None:
    """Run torchrun, as the target of `captured`; it forks its processes."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = PythonFork  # type: ignore[attr-defined,misc]  # imported there
    run.main(["--standalone", *map(str, arguments)])


class PythonFork:
    """What `subprocess.Popen` is, as far as launchers need it, for a new interpreter that runs a module: a fork instead.

    Args:
        args: of the new interpreter.
        env: environment of the process.
        cwd: its current folder; None for that of this one.
        stdin: ignored, as are `stdout` and `stderr`: they are those of this process.
        pass_fds: descriptors that it keeps; all others but input and output are closed.
        start_new_session: whether it leads a session.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | None = None,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        pass_fds: Sequence[int] = (),
        start_new_session: bool = False,
    ) -> None:
        assert args[0] == sys.executable, args
        assert stdout is stderr is None
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(args[args.index("-m") + 1 :], env, cwd, pass_fds, start_new_session)

    @staticmethod
    def _run(
        words: Sequence[str], env: Mapping[str, str], cwd: str | None, pass_fds: Sequence[int], start_new_session: bool
    ) -> None:
        code = 1
        try:
            if start_new_session:
                os.setsid()
            for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
                if descriptor > 2 and descriptor not in pass_fds:
                    _close(descriptor)
            os.environ.clear()
            os.environ.update(env)
            os.chdir(cwd or Path.cwd())
            sys.argv = list(words)
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:  # noqa: BLE001  # whatever it is, the process ends with it
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]  # there is an exception
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork", timeout or 0)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(9)


def _close(descriptor: int) -> None:
    try:
        os.close(descriptor)
    except OSError:  # that of the folder which was listed
        pass
