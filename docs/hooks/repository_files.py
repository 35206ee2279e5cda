"""Let the site show files that lie beside docs/, and keep the links that GitHub follows valid on the site.

README.md becomes the site's index. Every other file outside docs/ that a page links to is copied to the same relative
path. So a link from docs/ loses its leading `../`, and a link from the top of the repository loses its leading `docs/`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, InclusionLevel

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the index, and every linked file outside docs/."""
    waiting, known = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"], set()
    for file in files.documentation_pages():
        waiting += _outside(f"docs/{file.src_uri}", Path(str(file.abs_src_path)).read_text(encoding="utf-8"))
    while waiting:
        name = waiting.pop()
        if name not in known:
            known.add(name)
            path = str(ROOT / name)
            files.append(File.generated(config, _on_site(name), abs_src_path=path, inclusion=InclusionLevel.NOT_IN_NAV))
            if name.endswith(".md"):
                waiting += _outside(name, (ROOT / name).read_text(encoding="utf-8"))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Rewrite links between files of the repository to those between files of the site."""
    source = _in_repository(page.file)

    def target(found: re.Match[str]) -> str:
        return posixpath.relpath(_on_site(_resolved(source, found[1])), posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(target, markdown)


def _in_repository(file: File) -> str:
    return Path(str(file.abs_src_path)).relative_to(ROOT).as_posix()


def _outside(source: str, markdown: str) -> list[str]:
    targets = (_resolved(source, link) for link in _LINK.findall(markdown))
    return [name for name in targets if not name.startswith("docs/") and (ROOT / name).is_file()]


def _resolved(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _on_site(name: str) -> str:
    """Return the path on the site of a file of the repository."""
    return "index.md" if name == "README.md" else name.removeprefix("docs/")
