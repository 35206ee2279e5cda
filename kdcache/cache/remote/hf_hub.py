"""Data sets on the Hugging Face Hub as stores of objects. The only module that knows huggingface_hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

from kdcache.errors import KdcacheError, UsageError

_COMMIT = 100
"""Files of a commit: the Hub allows many in one, and only so many commits an hour."""

_NAMED = re.compile(r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<inside>.+))?")


class Hub:
    """A data set on the Hub, or a folder in it. Its files are read over plain HTTP, which counts as one request each.

    Args:
        url: hf://datasets/ORG/NAME, with @REVISION and /FOLDER where they are wanted.

    Raises:
        ImportError: if huggingface_hub is not installed.
        UsageError: for another URL.
    """

    def __init__(self, url: str) -> None:
        import huggingface_hub  # noqa: PLC0415  # of the extra hf

        found = _NAMED.fullmatch(url)
        if found is None:
            raise UsageError(f"{url} names no data set of the Hub", "write it as hf://datasets/ORG/NAME")
        self._repository, self._revision = found["repository"], found["revision"] or "main"
        self._inside = f"{found['inside']}/" if found["inside"] else ""
        self._api = huggingface_hub.HfApi()
        self._add = huggingface_hub.CommitOperationAdd
        self._refused = huggingface_hub.errors.HfHubHTTPError
        self.headers: dict[str, str] = self._api._build_hf_headers()

    def url_of(self, name: str) -> str:
        """Where a file can be read."""
        revision, path = quote(self._revision, safe=""), quote(self._inside + name)
        return f"{self._api.endpoint}/datasets/{self._repository}/resolve/{revision}/{path}"

    def sizes(self) -> dict[str, int]:
        """The size of every file.

        Raises:
            UsageError: if there is no such data set, or it may not be seen.
        """
        try:
            tree = self._api.list_repo_tree(
                self._repository, recursive=True, revision=self._revision, repo_type="dataset"
            )
            found = {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
        except self._refused as error:
            raise self._refusal(error) from None
        skip = len(self._inside)
        return {path[skip:]: size for path, size in found.items() if path.startswith(self._inside)}

    def put(self, objects: Mapping[str, Path | bytes], on_each: Callable[[int], None]) -> None:
        """Put files there, some hundred in a commit, which appears whole or not at all."""
        items = [*objects.items()]
        for some in (items[start : start + _COMMIT] for start in range(0, len(items), _COMMIT)):
            added = [
                self._add(self._inside + name, content if isinstance(content, bytes) else str(content))
                for name, content in some
            ]
            try:
                self._api.create_commit(
                    self._repository,
                    added,
                    commit_message="kdcache push",
                    repo_type="dataset",
                    revision=self._revision,
                )
            except self._refused as error:
                raise self._refusal(error) from None
            on_each(len(added))

    def remove(self, name: str) -> None:
        """Delete a file."""
        try:
            self._api.delete_file(self._inside + name, self._repository, repo_type="dataset", revision=self._revision)
        except self._refused as error:
            raise self._refusal(error) from None

    def _refusal(self, error: Exception) -> KdcacheError:
        return UsageError(
            f"the Hub refuses {self._repository}: {str(error).splitlines()[0]}",
            f"make it with `hf repo create {self._repository} --repo-type dataset`, log in with `hf auth login`, or "
            "run the same command again",
        )
