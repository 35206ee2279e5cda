"""The documentation is complete, current, linked and in plain words; the site builds from it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import click
import pytest

import kdcache
from kdcache.cli import main

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
GUIDES = sorted(DOCS.glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *GUIDES]
IN_NAV = {"index.md", "CHANGELOG.md", "CONTRIBUTING.md"}

# The terms of the field in place of metaphors and archaisms, and American spelling.
FORBIDDEN = [
    r"\b(go|goes|going|gone) on\b",  # resume, continue
    r"\b(?:bytes|images?|rows?|seeds?|students?|labels?|markers?|samples?|names?|steps?|files?) a "
    r"(?:row|step|second|loss|class|view|shard|sample|image|epoch|seed|batch|combination|machine|chunk|line)\b",  # per
    r"(?<!there )\b(?:is|are) no(?:ne)?\b(?! (?:longer|closer|larger|smaller|slower))",  # is not a
    r"\bbut for\b",  # up to, except
    r"\bnothing but\b",
    r"\bmend(?:s|ed|ing)?\b",  # fix
    r"\bhears?\b|\bheard\b",
    r"\bwhoever\b|\bunasked\b|\bbeforehand\b|\bstands? in the place\b|\bcome to lie\b",
    r"\bhow (?:good|near|dear)\b",
    r"\bpieces?\b",  # micro-batches
    r"\bof one's own\b|\bits own affair\b",
    r"\bbrought along\b|\bgiven back\b|\bvouched\b",
    r"\b\w*(?:alis|mmaris|gnis|ardis|ptimis|inimis|aximis|uantis|itialis)(?:e|ed|es|er|ing|ation)\b",
    r"\bcentre[ds]?\b|\bcolours?\b|\bgrey\b|\bbehaviour\b|\bneighbour\w*\b|\blabell\w+\b|\bmodell\w+\b",
    r"\blicences?\b",
]


def load(path: Path) -> ModuleType:
    """Import a script that is not in a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def commands(group: click.Group, path: str = "kdcache") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield f"{path} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")


def prose(path: Path) -> str:
    """A page without code, on one line per paragraph, so that a phrase may wrap."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "``", text)
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def test_generated_documents_are_current() -> None:
    for path, text in load(DOCS / "generate.py").documents().items():
        assert path.read_text(encoding="utf-8") == text, f"run `python docs/generate.py` to write {path.name} again"


@pytest.mark.parametrize(("path", "command"), [pytest.param(*each, id=each[0]) for each in commands(main)])
def test_the_cli_reference_has_every_command_and_option(path: str, command: click.Command) -> None:
    text = (DOCS / "CLI.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {path}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    for option in command.params:
        if isinstance(option, click.Option):
            for flag in option.opts:
                assert re.search(rf"^\| `(?:\S+, )*{re.escape(flag)}\b", section, flags=re.MULTILINE), flag


def test_the_api_reference_has_every_public_name() -> None:
    names = re.findall(r"^::: kdcache\.(\w+)$", (DOCS / "API.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(names) == sorted(kdcache.__all__)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_use_plain_words(path: Path) -> None:
    text = prose(path)
    found = [hit[0] for phrase in FORBIDDEN for hit in re.finditer(phrase, text, flags=re.IGNORECASE)]
    assert not found


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_relative_links_resolve(path: Path) -> None:
    links = re.findall(r"\]\((?![a-z]+:)([^)\s]*)\)", path.read_text(encoding="utf-8"))
    for link in links:
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_navigation() -> None:
    entries = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2])
    assert len(entries) == len(set(entries))
    assert set(entries) == IN_NAV | {path.name for path in GUIDES}


def test_pages_name_files_that_exist() -> None:
    for path in PAGES:
        for name in re.findall(r"`((?:kdcache|tests|docs|examples|benchmarks|pipelines)/[\w/.-]+)`", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name}: {name}"
    table = (DOCS / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("## Map of the code")[2]
    rows = re.findall(r"^\| `([\w/]+/)` \| (.*) \|$", table, flags=re.MULTILINE)
    assert rows
    for folder, content in rows:
        named = set(re.findall(r"`([\w/.]+)`", content))
        there = {path.name for path in (ROOT / "kdcache" / folder).glob("*.py")} - {"__init__.py"}
        assert named == there, f"{folder}: not there {named - there}, not named {there - named}"


def test_the_picture_has_both_color_schemes() -> None:
    text = (DOCS / "images" / "two-stages.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314  # our own file
    assert "prefers-color-scheme: dark" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="needs the extra docs")
def test_the_site_builds_with_every_public_method_in_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    offline = {"NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "API.html").read_text(encoding="utf-8")
    for name in kdcache.__all__:
        assert f'id="kdcache.{name}"' in page, name
        value = getattr(kdcache, name)
        methods = [key for key in vars(value) if callable(getattr(value, key, None))] if isinstance(value, type) else []
        own = [key for key in methods if not key.startswith(("_", "model_"))]
        for method in [*own, *(["__call__"] if "__call__" in methods else [])]:
            assert f'id="kdcache.{name}.{method}"' in page, f"{name}.{method}"
    # Scripts, styles and pictures come from the site itself.
    assert not re.search(r"<(?:script|img|link)[^>]+(?:src|href)=\"https?://", page)
