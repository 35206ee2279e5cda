"""Import a file of the user together with the modules beside it, as Python does for a script.

The modules beside a file are found by the imports of that file and of those modules only: neither `sys.path` nor the
names of other modules change. Two files from different folders may thus both have a `layers.py`.

A file `/nets/resnet.py` is the module `kdcache.runtime.user_modules._2fnets_2fresnet_2epy.resnet`, and `layers.py`
beside it is `kdcache.runtime.user_modules._2fnets_2fresnet_2epy.layers`. The name contains the path, so that any
process in which kdcache is installed can import it, for instance to unpickle an instance of a class in it.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader, all_suffixes
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch

__path__: list[str] = []  # so that Python takes this module for a package

_OWN = __name__.partition(".")[0]
_INSTALLED = ("site-packages", "dist-packages")
_SUFFIXES = all_suffixes()


@dataclass(frozen=True)
class Namespace:
    """The names under which a file and the modules beside it are imported.

    A file without relative imports is like a script: modules in its folder precede installed ones. A file with
    relative imports is like a module of a package, `python -m package.file`. In both cases modules that are not
    installed are also looked for in the folder of the package, and in the current folder if the file is in it.

    Attributes:
        file: resolved path.
        above: number of folders from the file's folder up to the current folder; None if the file is not in it.
    """

    file: Path
    above: int | None

    @property
    def name(self) -> str:
        """The name of the package that holds all modules."""
        path = os.fsencode(self.file) + (b"" if self.above is None else b"\0%d" % self.above)
        return f"{__name__}.{''.join(chr(c) if chr(c).isalnum() and c < 128 else f'_{c:02x}' for c in path)}"

    @cached_property
    def root(self) -> Path | None:
        """The folder of the outermost package that the file is in; None for a file without relative imports."""
        levels = max(_levels(self.file), default=0)
        if not levels:
            return None
        root = self.file.parent
        while levels > 0 or (root / "__init__.py").is_file():
            root, levels = root.parent, levels - 1
        return root

    @property
    def module_name(self) -> str:
        """The name of the module of the file."""
        stem = re.sub(r"\W", "_", self.file.stem)
        folders = self.file.parent.relative_to(self.root).parts if self.root is not None else ()
        return ".".join([self.name, *folders, stem])

    @cached_property
    def folders(self) -> list[Path]:
        """The folders in which modules are looked for, in their order."""
        folder = self.file.parent
        package = folder
        while (package / "__init__.py").is_file():
            package = package.parent
        current = [] if self.above is None else [([folder, *folder.parents])[self.above]]
        return list(dict.fromkeys([*([self.root] if self.root else []), folder, package, *current]))

    def folder_of(self, top: str, importer: Path | None) -> Path | None:
        """Return the folder that holds a top-level module or package of the user; None if it is another one.

        Args:
            top: its name.
            importer: the file that imports it. A file does not import itself: `timm.py` may import the library timm.
        """
        if top == _OWN:
            return None
        own_package = self.root is not None and self.file.parent.relative_to(self.root).parts[0] == top
        for number, folder in enumerate(self.folders):
            if folder.name in _INSTALLED and not own_package:
                continue
            found = module_file(folder, top)
            if found is None and not (folder / top).is_dir():
                continue
            if found is not None and found == importer:
                continue
            precedes = number == 0 and (own_package if self.root is not None else found is not None)
            if precedes or not _is_elsewhere(top, found):
                return folder
        return None


def namespace(path: Path) -> Namespace:
    """Return the namespace of a file."""
    file, current = path.resolve(), Path.cwd().resolve()
    ancestors = [file.parent, *file.parent.parents]
    return Namespace(file, ancestors.index(current) if current in ancestors else None)


def _decoded(name: str) -> Namespace:
    """Return the namespace of which `Namespace.name` ends with a name."""
    encoded = re.sub(rb"_([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), name.encode())
    path, _, above = encoded.partition(b"\0")
    return Namespace(Path(os.fsdecode(path)), int(above) if above else None)


def _levels(file: Path) -> Iterator[int]:
    """Yield the number of dots of each relative import of a file."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.level


def parsed(file: Path) -> ast.Module:
    """Return the syntax tree of a Python file; an empty one for a file that cannot be parsed."""
    try:
        return _parsed(file.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return ast.Module([], [])


@lru_cache(maxsize=256)
def _parsed(content: bytes) -> ast.Module:
    return ast.parse(content)


def module_file(folder: Path, name: str) -> Path | None:
    """Return the file of a module or package in a folder; None for none, or a folder without `__init__.py`."""
    candidates = [folder / name / "__init__.py", *(folder / f"{name}{suffix}" for suffix in _SUFFIXES)]
    return next((file for file in candidates if file.is_file()), None)


def _is_elsewhere(top: str, found: Path | None) -> bool:
    """Whether Python itself finds a top-level module, in another file."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return top in sys.modules
    if spec is None or spec.origin is None:
        return False
    return found is None or Path(spec.origin).resolve() != found


class _Finder(MetaPathFinder):
    """Finds the modules of all namespaces."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        first, *below = fullname.removeprefix(f"{__name__}.").split(".")
        space = _decoded(first)
        if not below:
            spec: ModuleSpec | None = ModuleSpec(fullname, _Empty(), is_package=True)
            assert spec is not None  # noqa: S101  # for the types
            spec.submodule_search_locations = [str(folder) for folder in space.folders]
            return spec
        if fullname == space.module_name:
            return importlib.util.spec_from_file_location(
                fullname, space.file, loader=_Source(fullname, str(space.file), space)
            )
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Source(fullname, str(spec.loader.path), space)
        return spec


class _Empty(Loader):
    """Makes the package of a namespace, which is not a file."""

    def exec_module(self, module: ModuleType) -> None: ...


class _Source(SourceFileLoader):
    """Runs a file whose imports look into its namespace first."""

    def __init__(self, fullname: str, path: str, space: Namespace) -> None:
        super().__init__(fullname, path)
        self.space = space

    def get_code(self, fullname: str) -> CodeType:
        # Not from __pycache__, where a file that changes within a second is not noticed.
        return self.source_to_code(self.get_data(self.path), self.path)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _importer(self.space)}
        super().exec_module(module)


def _importer(space: Namespace) -> Callable[..., Any]:
    """Return the `__import__` of the modules of a namespace."""

    def has(name: str, importer: str | None) -> bool:
        full = f"{space.name}.{name}"
        if full in sys.modules and full != space.module_name:
            return True  # an import inside a function is repeated at each call
        return space.folder_of(name.partition(".")[0], Path(importer) if importer else None) is not None

    def import_(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        importer = (globals or {}).get("__file__")
        if level or not has(name, importer):
            found = builtins.__import__(name, globals, locals, fromlist or (), level)
            return adapted_importlib() if found is importlib else found
        with _short_names(space):
            found = builtins.__import__(f"{space.name}.{name}", globals, locals, fromlist or (), 0)
        return found if fromlist else sys.modules[f"{space.name}.{name.partition('.')[0]}"]

    def import_module(name: str, package: str | None = None) -> ModuleType:
        full = importlib.util.resolve_name(name, package)
        if not has(full, None):
            return importlib.import_module(full)
        with _short_names(space):
            return importlib.import_module(f"{space.name}.{full}")

    def adapted_importlib() -> ModuleType:
        copy = ModuleType("importlib")
        vars(copy).update(vars(importlib), import_module=import_module)
        return copy

    # So that an import inside `forward` is not compiled.
    return torch.compiler.disable(import_)  # type: ignore[no-any-return, no-untyped-call]  # torch's is not typed


class _short_names:  # noqa: N801  # a context manager
    """A context in which a module that is not found is reported by the name that the user gave it."""

    def __init__(self, space: Namespace) -> None:
        self.prefix = f"{space.name}."

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(self.prefix):
            name = str(error.name).removeprefix(self.prefix)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name, path=error.path) from None


def forget(space: Namespace) -> None:
    """Remove the modules of a namespace, so that the next import runs their files again."""
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{space.name}.")]:
        del sys.modules[name]
    importlib.invalidate_caches()


sys.meta_path.insert(0, _Finder())
