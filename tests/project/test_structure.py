"""The structure of the package: imports, printing, module sizes, unsafe calls, docstrings, terms, the public API."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
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


def test_only_output_and_progress_print() -> None:
    printing = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and re.search(
                r"^print$|\.print$|^click\.s?echo$|^sys\.std", ast.unparse(node.func)
            ):
                printing.add(name_of(path))
    assert printing == {"cli.output", "runtime.terminal"}


def test_modules_are_small() -> None:
    large = {name_of(path): lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > 350}
    assert not large


def test_nothing_is_unpickled_or_evaluated() -> None:
    for path in SOURCES:
        text = path.read_text()
        for word in ("pickle.load", "weights_only=False", "allow_pickle=True", "yaml.load(", " eval(", "exec("):
            assert word not in text, f"{word} in {path}"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_long_private_functions_have_a_docstring() -> None:
    """Those of more than 15 lines; ruff requires the docstrings of public ones."""
    undocumented = [
        f"{name_of(path)}.{function.name}"
        for path in SOURCES
        for function in functions(path)
        if function.end_lineno is not None
        and function.end_lineno - function.lineno + 1 > 15
        and re.match("_(?!_)", function.name)
        and ast.get_docstring(function) is None
    ]
    assert not undocumented


COUNTED = "bytes|images|rows|samples|seeds|views|labels|passes|epochs|shards|files|lines|points|steps|seconds|dots?"
PER = "row|image|step|loss|shard|sample|view|epoch|batch|class|second|core|file|cache|line|network|teacher|machine"

UNIDIOMATIC = {
    "resume": r"\b(go(es|ing)?|gone|went) on\b",
    "is not a": r"(?<!there )\b(is|are) (no|(?-i:none))\b(?! (longer|more))",
    "per": rf"\b({COUNTED}) an? ({PER})\b(?! (holds|has|stores))",
    "does not have": r"\b(has|have) not got\b",
    "plain verbs": r"\b(hears?|told|tells? of|mends?|mended|stumbl\w+|brought along|given back|lies? (there|here))\b",
    "plain nouns": r"\b(whoever|nobody|beforehand|thereof|somebody)\b|\b(how|as|so|too) (dear|near)\b",
}
"""By the word to write instead: phrases that are not the usual terms, in documentation, messages and names."""


def test_texts_use_the_usual_terms() -> None:
    """Docstrings, comments, help texts and messages, also those that are split over several lines."""
    found = []
    for path in SOURCES:
        text = path.read_text()
        comments = [
            token.string
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT
        ]
        strings = [
            node.value
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        for instead, phrase in UNIDIOMATIC.items():
            found += [
                f"{name_of(path)}: {match[0]!r}, write: {instead}"
                for part in (" ".join(comments), *strings)
                if (match := re.search(phrase, " ".join(part.split()), re.IGNORECASE))
            ]
    assert not found


def test_the_public_api_is_all_there() -> None:
    for name in kdcache.__all__:
        assert getattr(kdcache, name) is not None
    assert set(kdcache.__all__) == set(kdcache._HOME)


def test_files_and_tests_with_markers_exist() -> None:
    files = {path.stem: path.read_text() for path in TESTS.rglob("test_*.py")}
    assert {*EMULATOR, *PROCESS, *SLOW_FILES, *SLOW_TESTS} <= set(files)
    renamed = [name for file, names in SLOW_TESTS.items() for name in names if f"def {name}(" not in files[file]]
    assert not renamed
