"""The files of the user that a file imports, directly or through one another, and their digest.

Imports are read from the syntax of the files, wherever they are in them, so that the result does not depend on what has
run. Modules that are installed, such as torch, do not belong to the closure.
"""

from __future__ import annotations

import ast
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from kdcache.runtime.user_modules import Namespace, module_file, parsed


def digest_of_closure(space: Namespace) -> str:
    """Return the sha256 of a file; if it imports other files of the user, of the digests and names of all.

    Names are relative to the folder of the file.
    """
    own, *others = import_closure(space)
    digest = _sha256(own)
    if others:
        lines = sorted(f"{_sha256(file)} {Path(os.path.relpath(file, own.parent)).as_posix()}" for file in others)
        digest = hashlib.sha256("\n".join([digest, *lines]).encode(errors="surrogateescape")).hexdigest()
    return f"sha256:{digest}"


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def import_closure(space: Namespace) -> list[Path]:
    """Return the file of a namespace, and all files of the user that it imports directly or indirectly."""
    found = {space.file: None}
    waiting = [space.file, *_packages_of(space)]
    found.update(dict.fromkeys(waiting))
    while waiting:
        new = dict.fromkeys(file for file in _imported(waiting.pop(), space) if file not in found)
        found.update(new)
        waiting.extend(new)
    return list(found)


def _packages_of(space: Namespace) -> Iterator[Path]:
    """Yield the `__init__.py` of the packages that are imported before the file itself."""
    folder = space.file.parent
    while space.root is not None and folder != space.root:
        if (folder / "__init__.py").is_file():
            yield folder / "__init__.py"
        folder = folder.parent


def _imported(file: Path, space: Namespace) -> Iterator[Path]:
    """Yield the files of the user that a file imports itself."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _absolute(alias.name, file, space)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield from _from(node, alias.name, file, space)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            yield from _by_name(node.args[0], file, space)


def _from(node: ast.ImportFrom, name: str, file: Path, space: Namespace) -> Iterator[Path]:
    """Yield the files of `from MODULE import NAME`; NAME may be a module."""
    module = node.module or ""
    dotted = f"{module}.{name}".strip(".") if name != "*" else module
    paths = [*(_relative(dotted, node.level, file) if node.level else _absolute(dotted, file, space))]
    yield from paths
    if name == "*" and paths and paths[-1].name == "__init__.py" and b"__all__" in paths[-1].read_bytes():
        yield from _all_in(paths[-1].parent)


def _absolute(dotted: str, file: Path, space: Namespace) -> list[Path]:
    folder = space.folder_of(dotted.partition(".")[0], file)
    return [] if folder is None else _walk(folder, dotted)


def _relative(dotted: str, level: int, file: Path) -> list[Path]:
    folder = [file.parent, *file.parent.parents][min(level - 1, len(file.parents) - 1)]
    package = folder / "__init__.py"
    return [*([package] if package.is_file() else []), *_walk(folder, dotted)]


def _walk(folder: Path, dotted: str) -> list[Path]:
    """Return the files of a module in a folder, and of the packages that it is in."""
    files: list[Path] = []
    for name in filter(None, dotted.split(".")):
        found = module_file(folder, name)
        if found is not None:
            files.append(found)
        folder /= name
        if not folder.is_dir():
            break
    return files


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _by_name(argument: ast.expr, file: Path, space: Namespace) -> Iterator[Path]:
    """Yield the files that `import_module(argument)` may import.

    If the name is computed, these are all modules of the package that it begins with, or else of the file's folder.
    """
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        name = argument.value.lstrip(".")
        level = len(argument.value) - len(name)
        yield from _relative(name, level, file) if level else _absolute(name, file, space)
        return
    first: ast.expr = argument
    while isinstance(first, ast.JoinedStr | ast.BinOp):
        first = first.values[0] if isinstance(first, ast.JoinedStr) else first.left
    begins = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
    package = begins.rpartition(".")[0].strip(".")
    files = _absolute(package, file, space) if package and not begins.startswith(".") else []
    yield from files
    folder = space.folder_of(package.partition(".")[0], file) if package else file.parent
    if folder is not None:
        yield from _all_in(folder.joinpath(*package.split(".")) if package else folder)


def _all_in(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.py"))
