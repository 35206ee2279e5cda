"""The page of a report, parsed."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """What a browser would see: tables below each heading, text, tags, labels of charts, and what is loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.labels: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._heading = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            assert not name.startswith("on"), name
            self.ids += [value or ""] * (name == "id")
            self.sources += [value or ""] * (name in ("src", "href"))
            self.labels += [value or ""] * (name == "aria-label")
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)
        if tag == "h2":
            self._heading = ""
        if tag == "table":
            self.tables.setdefault(self._heading, []).append([])
        if tag == "tr":
            self.tables[self._heading][-1].append([])
        if tag in ("th", "td"):
            self.tables[self._heading][-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data
        if "h2" in self._open:
            self._heading += data
        if "table" in self._open and {"th", "td"} & set(self._open):
            self.tables[self._heading][-1][-1][-1] += data
