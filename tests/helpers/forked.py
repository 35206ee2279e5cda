"""Commands, scripts and launchers in forks of the server of `helpers.processes`, where new interpreters would import.

A new interpreter takes seconds to import torch, a fork has it already. The processes are real: each has its own process
id, environment, current folder and output, and can be killed. Each launcher has a test that starts new interpreters.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest

from helpers import pictures
from helpers.processes import FORKS, exit_code, in_a_process
from kdcache.train import sweep_local
from kdcache.train.sweep_worker import enter_worker


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
        return subprocess.CompletedProcess(str(target), code, *read)


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


def script(path: Path, *arguments: object, but: str = "") -> None:
    """Run a script for which warnings are errors, as the target of `captured`; the Pythons that it starts are forks.

    Args:
        path: of the script.
        arguments: of its command.
        but: see `fork_pythons`.
    """
    warnings.simplefilter("error")
    fork_pythons(but)
    sys.argv = [str(path), *map(str, arguments)]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def torchrun(*arguments: object) -> None:
    """Run torchrun, as the target of `captured`; the processes that it starts are forks."""
    fork_pythons()
    _interpret(["-m", "torch.distributed.run", "--standalone", *map(str, arguments)])


@contextmanager
def forked_workers() -> Iterator[None]:
    """Let the workers of sweeps be forks, of the server or of a fork of it, until the block ends."""
    context = FORKS if parent_process() is None else get_context("fork")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_local, "get_context", lambda _: context)
        patch.setattr(sweep_local, "enter_worker", partial(_enter_worker, pictures.are_small()))
        yield


def _enter_worker(small_pictures: bool, *args: Any) -> None:
    pictures.set_small(small_pictures)
    enter_worker(*args)


def fork_pythons(but: str = "") -> None:
    """Let this process fork where it would start a new Python interpreter.

    Args:
        but: an argument of the commands of which new interpreters are started all the same.
    """
    PythonFork.new = but
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    # Of two threads, or more, of which one forks, the new process has that one alone.
    warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
    for module in (subprocess, subprocess_handler):
        module.Popen = PythonFork  # type: ignore[attr-defined]  # it is imported into the second


class PythonFork(subprocess.Popen[Any]):
    """A process that would be a new Python interpreter and is a fork; any other command is run as usual."""

    new: ClassVar[str] = ""
    """See `fork_pythons`."""

    def _execute_child(
        self,
        args: Any,
        executable: Any,
        preexec_fn: Any,
        close_fds: bool,
        pass_fds: Sequence[int],
        cwd: Any,
        env: Mapping[str, str] | None,
        *rest: Any,
    ) -> None:
        """Start the process, where `subprocess.Popen` does so, with the same arguments."""
        if isinstance(args, (str, bytes)) or args[0] != sys.executable or self.new in args:
            super()._execute_child(  # type: ignore[misc]  # a private method: there is no other place to fork
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest
            )
            return
        pipes, start_new_session = rest[3:9], rest[14]
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid == 0:
            kept = {descriptor: number for number, descriptor in enumerate((pipes[0], pipes[3], pipes[5]))}
            _be_interpreter([*map(str, args[1:])], kept, pass_fds, cwd, env, start_new_session)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]  # as the method does that this replaces


def _be_interpreter(
    words: list[str],
    streams: Mapping[int, int],
    pass_fds: Sequence[int],
    cwd: Any,
    env: Mapping[str, str] | None,
    start_new_session: bool,
) -> None:
    """Be the interpreter of a command in a process that was just forked, and end it.

    Args:
        words: the command after the path of the interpreter.
        streams: descriptor, or -1 -> 0, 1 or 2, which it is to be; those that are missing are left.
        pass_fds: descriptors that are left; all others are closed.
        cwd: current folder, if it is not None.
        env: environment, if it is not None.
        start_new_session: whether the process leads a session.
    """
    code: object = 1
    try:
        if start_new_session:
            os.setsid()
        for descriptor, number in streams.items():
            if descriptor != -1:
                os.dup2(descriptor, number)
        for descriptor in map(int, os.listdir("/dev/fd")):  # noqa: PTH208
            if descriptor > 2 and descriptor not in pass_fds:
                with suppress(OSError):  # that of the folder which was listed
                    os.close(descriptor)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        if cwd is not None:
            os.chdir(cwd)
        _interpret(words)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  # whatever it is, the process ends with it
        traceback.print_exc()
    finally:
        if isinstance(code, str):
            print(code, file=sys.stderr)  # noqa: T201  # as the interpreter does
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else code is not None)


def _interpret(words: list[str]) -> None:
    """Do what the interpreter does with the words of a command: `-m MODULE`, `-c CODE` or a script, with options."""
    for path in reversed(os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        if path and path not in sys.path:
            sys.path.insert(0, path)
    while words[0] not in ("-m", "-c") and words[0].startswith("-"):
        option = words.pop(0)
        assert option in ("-P", "-u", "-W"), option
        if option == "-W":
            warnings.simplefilter(words.pop(0))  # type: ignore[arg-type]  # an action
    sys.argv = words[1:] if words[0] in ("-m", "-c") else [*words]
    if words[0] == "-m":
        if not hasattr(sys.modules.get(words[1]), "__path__"):
            sys.modules.pop(words[1], None)  # a new interpreter has not imported it
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv[0] = "-c"
        exec(words[1], {"__name__": "__main__"})  # noqa: S102  # of a test
    else:
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
