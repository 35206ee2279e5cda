"""`kdcache push`, `kdcache pull` and `kdcache sign`: publish caches, fetch them, sign them."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.cli import output
from kdcache.cli.options import PathType, digest_option, json_option

_MAX_VIEWS = 1_000_000


@click.command("push")
@click.argument("cache", type=PathType())
@click.argument("url")
@json_option
def push(cache: Path, url: str, as_json: bool) -> None:
    """Upload a CACHE to a URL: s3://, gs://, az://, hf://datasets/ORG/NAME or file://.

    The manifest is uploaded last, so that a reader never sees a partial cache. If the command is interrupted or killed,
    the same command resumes. A URL that holds another cache is not overwritten.

    \b
    Example: kdcache push runs/digits.kdcache file:///tmp/shared/digits.kdcache
    Example: kdcache push runs/digits.kdcache s3://bucket/digits.kdcache
    """
    from kdcache.cache.push_pull import push as push_to

    done = push_to(cache, url, output.Terminal())
    pinned = f"{url.rstrip('/')}#{done.digest}"
    if as_json:
        output.as_json({"url": url, **done._asdict(), "pinned": pinned})
        return
    present = f"; {done.kept:,} were already there" if done.kept else ""
    output.facts(
        {
            "digest": done.digest,
            "files": f"{done.files:,} uploaded, {done.bytes:,} bytes{present}",
            "pinned URL": pinned,
        }
    )


@click.command("pull")
@click.argument("url")
@click.argument("folder", type=PathType(), required=False)
@click.option("--views", help="Views to download, such as 0,2 or 0-9.  [default: all]")
@digest_option
@json_option
def pull(url: str, folder: Path | None, views: str | None, digest: str | None, as_json: bool) -> None:
    """Download the cache at a URL to a FOLDER: s3://, gs://, az://, https://, hf://datasets/ORG/NAME or file://.

    Every file is checked against the manifest. Files that are complete are not downloaded again: to resume, or to add
    views, run the command again. Without FOLDER, the cache is stored in the local cache folder of kdcache, where other
    commands find it by its URL. URL#sha256:... is the same as --digest.

    \b
    Example: kdcache pull file:///tmp/shared/digits.kdcache runs/shared.kdcache
    Example: kdcache pull s3://bucket/digits.kdcache runs/shared.kdcache --views 0-9
    """
    from kdcache.cache.push_pull import pull as pull_from
    from kdcache.cache.reader import open_cache
    from kdcache.errors import UsageError

    if "://" not in url:
        raise UsageError(f"{url} is not a URL", "use a folder on this machine directly, without pull, or as file://")
    selected, progress = None if views is None else _parse_views(views), output.Terminal()
    if folder is None:
        cache = open_cache(url, selected, digest, progress)
    else:
        cache = pull_from(url, folder, selected, digest, progress)
    facts = {"cache": str(cache.path), "digest": cache.manifest.digest}
    if as_json:
        output.as_json({**facts, "views": list(cache.views)})
    else:
        output.facts({**facts, "views": f"{len(cache.views)} of {cache.manifest.plan.views.count}"})


def _parse_views(text: str) -> list[int]:
    """Return the views of a list such as `0,2-4`.

    Raises:
        UsageError: if it is something else.
    """
    from kdcache.errors import UsageError
    from kdcache.runtime.ranges import parse_range

    views: list[int] = []
    for part in text.split(","):
        views_of_part = parse_range(part, "--views")
        if views_of_part.stop > _MAX_VIEWS:
            raise UsageError(f"--views {text!r} is out of range", "see `kdcache info URL` for the number of views")
        views += views_of_part
    return views


@click.command("sign")
@click.argument("cache", type=PathType())
@click.option("--key", required=True, type=PathType(), help="Private SSH key, such as ~/.ssh/id_ed25519.")
@json_option
def sign(cache: Path, key: Path, as_json: bool) -> None:
    """Sign a CACHE with an SSH key; others check the signature with `kdcache verify --signed-by`.

    Runs ssh-keygen, and writes manifest.json.sig into the CACHE. The signature covers every file through the root
    digest. push and pull include it.

    \b
    Example: kdcache sign runs/digits.kdcache --key ~/.ssh/id_ed25519
    """
    from kdcache.cache.reader import open_cache
    from kdcache.cache.remote.signatures import sign as sign_with

    opened = open_cache(cache, progress=output.Terminal())
    opened.check_files(output.Terminal())
    facts = {"signature": str(sign_with(cache, key.expanduser())), "digest": opened.manifest.digest}
    if as_json:
        output.as_json(facts)
    else:
        output.facts(facts)
