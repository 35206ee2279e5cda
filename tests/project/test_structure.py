"""The structure of the package: imports, where output is printed, sizes of modules, unsafe calls, the public API."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from helpers.markers import EMULATOR, PROCESS, SLOW_FILES, SLOW_TESTS
from helpers.paths import TESTS
from importlinter.application import use_cases
from importlinter.configuration import configure

import kdcache

configure()

PACKAGE = Path(kdcache.__file__).parent

SOURCES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def test_imports_keep_the_contracts() -> None:
    """The layers, and one module per foreign library, as pyproject.toml has them for import-linter."""
    assert use_cases.lint_imports(config_filename=str(PACKAGE.parent / "pyproject.toml"), cache_dir=None)


def test_only_output_prints() -> None:
    printing = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.search(
                r"^print$|\.print$|^click\.s?echo$|^sys\.std", ast.unparse(node.func)
            ):
                printing.add(name_of(path))
    assert printing == {"cli.output"}


def test_modules_are_small() -> None:
    large = {name_of(path): lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > 350}
    assert not large


def test_nothing_is_unpickled_or_evaluated() -> None:
    for path in SOURCES:
        text = path.read_text()
        for word in ("pickle.load", "weights_only=False", "allow_pickle=True", "yaml.load(", " eval(", "exec("):
            assert word not in text, f"{word} in {path}"


def test_the_public_api_is_all_there() -> None:
    for name in kdcache.__all__:
        assert getattr(kdcache, name) is not None
    assert set(kdcache.__all__) == set(kdcache._HOME)


def test_files_and_tests_with_markers_exist() -> None:
    files = {path.stem: path.read_text() for path in TESTS.rglob("test_*.py")}
    assert {*EMULATOR, *PROCESS, *SLOW_FILES, *SLOW_TESTS} <= set(files)
    renamed = [name for file, names in SLOW_TESTS.items() for name in names if f"def {name}(" not in files[file]]
    assert not renamed
