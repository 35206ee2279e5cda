"""Code of the user, named `path/file.py:function`: a model, a loss, a data set or a step of a transform.

A file is run once per content. What is wrong with it, or with what it returns, is the user's mistake and not a crash:
every error names the file, the line and the signature that is expected.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kdcache.errors import KdcacheError, UsageError
from kdcache.runtime.paths import expand

_modules: dict[Path, tuple[str, ModuleType]] = {}
_trusted: set[str] = set()


@dataclass(frozen=True)
class UserCode:
    """A function or class from a file of the user.

    Attributes:
        reference: `path/file.py:function`.
        target: the function or class.
        signature: how it is called, for error messages.
        digest: sha256 of the file.
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
            inspect.signature(self.target).bind(*positional, **arguments)
        except TypeError as error:
            raise UsageError(
                f"{self.where}{inspect.signature(self.target)} cannot be called: {error}",
                f"it is called as {self.signature}",
            ) from None
        except ValueError:  # a built-in without a signature
            pass

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
    """Return the sha256 of the file of a reference."""
    path, _ = split(reference)
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def _run(path: Path) -> tuple[str, ModuleType]:
    """Return the digest of a file and the module that running it makes; a file that has not changed is run once."""
    path = path.resolve()
    digest = digest_of(str(path))
    if path in _modules and _modules[path][0] == digest:
        return _modules[path]
    name = f"kdcache_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "the name ends in .py"  # noqa: S101  # for the types
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(
            f"{path} cannot be run: {type(error).__name__}: {error} ({place_of(error, path)})", "correct that file"
        ) from error
    _modules[path] = digest, module
    return digest, module


def place_of(error: BaseException, path: Path | None = None) -> str:
    """Return the line that raised an error: the last one in a file, or where it was raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if path is not None and Path(frame.filename).resolve() == path.resolve()]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"


def trust(names: Iterable[str]) -> None:
    """Allow the code that the user's own pipeline or call names; other names are ignored.

    A cache names the steps of its transform too, and must not decide what is run on the machine of its reader.
    """
    _trusted.update(name for name in names if is_user_code(name))


def is_trusted(reference: str) -> bool:
    """Whether the user has named this code in this process."""
    return reference in _trusted
