"""Dataset repositories of the Hugging Face Hub as object stores. The only module that imports huggingface_hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdcache.errors import KdcacheError, UsageError

_COMMIT = 100
"""Files per commit: the Hub limits commits per hour, not files per commit."""

_NAMED = re.compile(r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<inside>.+))?")


class Hub:
    """A dataset repository on the Hub, or a folder in it. Files are read over plain HTTP with one request each.

    Attributes:
        headers: HTTP headers, with the user's token, for such a request.

    Args:
        url: hf://datasets/ORG/NAME, optionally with @REVISION and /FOLDER.

    Raises:
        ImportError: if huggingface_hub is not installed.
        UsageError: if the URL has another form.
    """

    def __init__(self, url: str) -> None:
        import huggingface_hub  # noqa: PLC0415  # of the extra hf

        match = _NAMED.fullmatch(url)
        if match is None:
            raise UsageError(f"{url} is not a dataset repository of the Hub", "use hf://datasets/ORG/NAME")
        self._repository, self._revision = match["repository"], match["revision"] or "main"
        self._inside = f"{match['inside']}/" if match["inside"] else ""
        self._api = huggingface_hub.HfApi()
        self._add = huggingface_hub.CommitOperationAdd
        self._url = huggingface_hub.hf_hub_url
        self._http_error = huggingface_hub.errors.HfHubHTTPError
        utils: Any = huggingface_hub.utils  # which loads its names when they are used, unseen by mypy
        self.headers: dict[str, str] = utils.build_hf_headers()

    def url_of(self, name: str) -> str:
        """Return the HTTP URL of a file."""
        return self._url(
            self._repository,
            self._inside + name,
            repo_type="dataset",
            revision=self._revision,
            endpoint=self._api.endpoint,
        )

    def sizes(self) -> dict[str, int]:
        """Return the size of every file in bytes, by name.

        Raises:
            UsageError: if the repository does not exist, or access is denied.
        """
        try:
            tree = self._api.list_repo_tree(
                self._repository, recursive=True, revision=self._revision, repo_type="dataset"
            )
            sizes = {entry.path: entry.size for entry in tree if hasattr(entry, "size")}
        except self._http_error as error:
            raise self._as_usage_error(error) from None
        skip = len(self._inside)
        return {path[skip:]: size for path, size in sizes.items() if path.startswith(self._inside)}

    def put(self, objects: Mapping[str, Path | bytes], on_each: Callable[[int], None]) -> None:
        """Upload files, a hundred per commit; a commit is atomic."""
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
            except self._http_error as error:
                raise self._as_usage_error(error) from None
            on_each(len(added))

    def remove(self, name: str) -> None:
        """Delete a file."""
        try:
            self._api.delete_file(self._inside + name, self._repository, repo_type="dataset", revision=self._revision)
        except self._http_error as error:
            raise self._as_usage_error(error) from None

    def _as_usage_error(self, error: Exception) -> KdcacheError:
        return UsageError(
            f"the Hub rejected the request for {self._repository}: {str(error).splitlines()[0]}",
            f"create it with `hf repo create {self._repository} --repo-type dataset`, log in with `hf auth login`, or "
            "run the same command again",
        )
