"""Code of the user, named `path/file.py:function`: a model, a loss, a data set or a step of a transform.

A file is run once per content, which includes the modules beside it that it imports (`user_modules.py`). What is wrong
with it, or with what it returns, is the user's mistake and not a crash: every error names the file, the line and the
signature that is expected.
"""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kdcache.errors import KdcacheError, UsageError
from kdcache.runtime.import_closure import digest_of_closure
from kdcache.runtime.paths import expand
from kdcache.runtime.user_modules import Namespace, forget, namespace

_modules: dict[Namespace, tuple[str, ModuleType]] = {}
_trusted: set[str] = set()


@dataclass(frozen=True)
class UserCode:
    """A function or class from a file of the user.

    Attributes:
        reference: `path/file.py:function`.
        target: the function or class.
        signature: how it is called, for error messages.
        digest: sha256 of the file, and of the user's modules that it imports.
    """

    reference: str
    target: Callable[..., Any]
    signature: str
    digest: str

    @property
    def where(self) -> str:
        """Return the file, and the line of the definition where it is in that file."""
        path, name = split(self.reference)
        try:
            source, (_, line) = inspect.getsourcefile(self.target), inspect.getsourcelines(self.target)
        except (OSError, TypeError):
            return f"{path}: {name}"
        return f"{source}:{line}: {name}"

    def __call__(self, *positional: Any, **arguments: Any) -> Any:
        """Call the function.

        Raises:
            UsageError: if it does not take these arguments, or raises anything.
        """
        self.check_arguments(*positional, **arguments)
        try:
            return self.target(*positional, **arguments)
        except (KdcacheError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            path, _ = split(self.reference)
            raise UsageError(
                f"{self.reference} raised {type(error).__name__}: {error} ({place_of(error, path)})",
                f"correct it there; it is called as {self.signature}",
            ) from error

    def check_arguments(self, *positional: Any, **arguments: Any) -> None:
        """Check that the function takes some arguments, without calling it.

        Raises:
            UsageError: if it does not.
        """
        try:
            signature = inspect.signature(self.target)
        except (TypeError, ValueError):  # some callables of compiled libraries do not have one
            return
        try:
            signature.bind(*positional, **arguments)
        except TypeError as error:
            raise UsageError(
                f"{self.where}{signature} cannot be called: {error}", f"it is called as {self.signature}"
            ) from None

    def mistake(self, problem: str) -> UsageError:
        """Return the error for a result that is not what is expected."""
        return UsageError(f"{self.where} {problem}", f"its signature is {self.signature}")


def is_user_code(name: object) -> bool:
    """Whether a name is `path/file.py:function`."""
    return isinstance(name, str) and name.partition(":")[0].endswith(".py")


def split(reference: str) -> tuple[Path, str]:
    """Return the file and the function of a reference."""
    path, _, name = reference.partition(":")
    return expand(path), name


def load(reference: str, role: str, signature: str) -> UserCode:
    """Run a file and return a function or class of it.

    Args:
        reference: `path/file.py:function`, relative to the current folder.
        role: what it is used as, for error messages, such as "loss".
        signature: how it is called, for error messages.

    Raises:
        UsageError: if the file does not exist, cannot be run, or does not have the function.
    """
    path, name = split(reference)
    if not path.is_file():
        raise UsageError(
            f"file not found: {path}, of the {role} {reference!r}", "give its path from the current folder"
        )
    digest, module = _run(path)
    target = getattr(module, name, None)
    if not callable(target):
        names = [key for key in vars(module) if callable(getattr(module, key)) and not key.startswith("_")]
        raise UsageError(
            f"{path} has no function {name!r}", f"it has: {', '.join(names) or 'none'}; expected is {signature}"
        )
    return UserCode(reference, target, signature, digest)


def digest_of(reference: str) -> str:
    """Return the sha256 of the file of a reference; with that of the user's modules that it imports, if there are any.

    Raises:
        UsageError: if the file does not exist.
    """
    path, _ = split(reference)
    if not path.is_file():
        raise UsageError(f"file not found: {path}, of {reference!r}", "give its path from the current folder")
    return digest_of_closure(namespace(path))


def digests_of(names: Iterable[str]) -> dict[str, str]:
    """Return the digests of the code among some names, by name; other names are ignored."""
    return {name: digest_of(name) for name in sorted({*names}) if is_user_code(name)}


def _run(path: Path) -> tuple[str, ModuleType]:
    """Return the digest of a file and the module that running it makes; files that have not changed are run once."""
    space = namespace(path)
    digest = digest_of_closure(space)
    if space in _modules and _modules[space][0] == digest:
        return _modules[space]
    forget(space)
    try:
        module = importlib.import_module(space.module_name)
    except (Exception, SystemExit) as error:
        forget(space)
        reason = f"{type(error).__name__}: {error}".replace(f"{space.name}.", "")
        fix = "correct that file"
        if isinstance(error, SystemExit):
            fix = 'it is imported, not run as a script: put what ends it below `if __name__ == "__main__":`'
        raise UsageError(f"{path} cannot be run: {reason} ({place_of(error, path)})", fix) from error
    _modules[space] = digest, module
    return digest, module


def place_of(error: BaseException, path: Path | None = None) -> str:
    """Return the line that raised an error: the last one in a file or in the folder of it, or where it was raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    folder = path.resolve().parent if path is not None else None
    own = [frame for frame in frames if folder is not None and _is_in(Path(frame.filename), folder)]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"


def _is_in(file: Path, folder: Path) -> bool:
    """Whether a file is in a folder, and not a module of this package, which runs the user's."""
    return file.resolve().is_relative_to(folder) and file.parent != Path(__file__).parent


def trust(names: Iterable[str]) -> None:
    """Allow the code that the user's own pipeline or call names; other names are ignored.

    A cache names the steps of its transform too, and must not decide what is run on the machine of its reader.
    """
    _trusted.update(name for name in names if is_user_code(name))


def is_trusted(reference: str) -> bool:
    """Whether the user has named this code in this process."""
    return reference in _trusted
