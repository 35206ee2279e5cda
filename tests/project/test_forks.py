"""Forks that stand for commands and interpreters: they have all imported, and are processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.forked import PythonFork, captured, command, fork_pythons
from helpers.processes import exit_code, in_a_process, until


def show(*names: str) -> None:
    """Print what a process is, and of which modules it has."""
    print(os.getpid(), Path.cwd(), os.environ.get("OF_THE_TEST"), *(name in sys.modules for name in names))  # noqa: T201
    print("said", file=sys.stderr)  # noqa: T201
    sys.exit(3)


def test_a_fork_has_all_modules_and_its_own_folder_environment_and_output(tmp_path: Path) -> None:
    modules = ["helpers.preloaded", "torch", "kdcache.train.sweep", "kdcache.evaluation.report.collect"]
    done = captured(show, *modules, cwd=tmp_path, environment={"OF_THE_TEST": "set"})
    pid, *rest = done.stdout.split()
    assert int(pid) != os.getpid()
    assert rest == [str(tmp_path), "set", *["True"] * len(modules)]
    assert (done.returncode, done.stderr) == (3, "said\n")


def fail(number: str) -> None:
    int(number)


def test_a_command_ends_as_it_does_in_an_interpreter() -> None:
    done = captured(command, "info", "nowhere.kdcache")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere.kdcache" in done.stderr
    raised = captured(fail, "three")
    assert raised.returncode == 1
    assert "ValueError: invalid literal" in raised.stderr


def interpret(folder: Path) -> None:
    """Compare forks with interpreters that run the same."""
    (folder / "mine.py").write_text("import sys\nprint(__name__, *sys.argv[1:])\nsys.exit('last words')\n")
    commands = [
        ["-c", "import os, sys; print(sys.argv, os.getcwd(), os.environ['OF_THE_TEST']); sys.exit(7)", "a", "b"],
        ["-u", "-W", "error", "-c", "import warnings; warnings.warn('no')"],
        ["mine.py", "one"],
        ["-m", "mine", "two"],
        ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"],
    ]
    given = {"cwd": folder, "env": {**os.environ, "OF_THE_TEST": "set", "PYTHONPATH": str(folder)}, "text": True}
    interpreter = subprocess.Popen
    for words in commands:
        ends = []
        for kind in (interpreter, PythonFork):
            with kind([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **given) as process:  # type: ignore[call-overload]
                out, said = process.communicate()
                ends.append((process.returncode, out, said.splitlines()[-1:]))
        assert ends[0] == ends[1], words
    fork_pythons()
    assert subprocess.run([sys.executable, "-c", "raise SystemExit(4)"], check=False).returncode == 4
    waits = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
    waits.send_signal(signal.SIGKILL)
    assert waits.wait() == -signal.SIGKILL


def test_what_would_be_an_interpreter_does_the_same(tmp_path: Path) -> None:
    done = captured(interpret, tmp_path)
    assert done.returncode == 0, done.stderr


def wait(ready: Path) -> None:
    ready.touch()
    while True:
        signal.pause()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_fork_can_be_interrupted_and_killed(number: signal.Signals, tmp_path: Path) -> None:
    process = in_a_process(wait, tmp_path / "waits")
    assert process.pid is not None
    until((tmp_path / "waits").exists)
    os.kill(process.pid, number)
    assert exit_code(process) == (1 if number == signal.SIGINT else -number)
