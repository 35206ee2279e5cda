"""`kdcache push`, `pull` and `sign`: caches that are shared, and vouched for."""

from __future__ import annotations

from pathlib import Path

import click

from kdcache.cli import output
from kdcache.cli.options import digest_option, json_option

_DIGITS = 8


@click.command("push")
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("url")
@json_option
def push(cache: Path, url: str, as_json: bool) -> None:
    """Publish a CACHE at a URL: s3://, gs://, az://, hf://datasets/ORG/NAME or file://.

    The manifest comes last: nobody ever sees half a cache. Interrupted or killed, the same command goes on. A URL is
    for one cache; another one is never written over it.

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
    kept = f", {done.kept:,} were there" if done.kept else ""
    output.facts(
        {"digest": done.digest, "files": f"{done.files:,} put there, {done.bytes:,} bytes{kept}", "use": pinned}
    )


@click.command("pull")
@click.argument("url")
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--views", help="Numbers, such as 0,2 or 0-9: only these views are fetched.")
@digest_option
@json_option
def pull(url: str, folder: Path | None, views: str | None, digest: str | None, as_json: bool) -> None:
    """Fetch the cache at a URL to a FOLDER: of s3://, gs://, az://, https://, hf://datasets/ORG/NAME or file://.

    Every byte is checked against the manifest, and what is whole is not fetched again: interrupted, or asked for more
    views, the same command does the rest. Without FOLDER it is kept in kdcache's own, where commands find it that are
    given the URL. URL#sha256:... is the same as --digest.

    \b
    Example: kdcache pull file:///tmp/shared/digits.kdcache runs/shared.kdcache
    Example: kdcache pull s3://bucket/digits.kdcache runs/shared.kdcache --views 0-9
    """
    from kdcache.cache.push_pull import pull as pull_from
    from kdcache.cache.reader import open_cache
    from kdcache.errors import UsageError

    if "://" not in url:
        raise UsageError(f"{url} is no URL", "a folder on this machine needs no pull: give it as it is, or as file://")
    numbers, progress = None if views is None else _numbers(views), output.Terminal()
    if folder is None:
        cache = open_cache(url, numbers, digest, progress)
    else:
        cache = pull_from(url, folder, numbers, digest, progress)
    facts = {"cache": str(cache.path), "digest": cache.manifest.digest}
    if as_json:
        output.as_json({**facts, "views": list(cache.views)})
    else:
        output.facts({**facts, "views": f"{len(cache.views)} of {cache.manifest.plan.views.count}"})


def _numbers(given: str) -> list[int]:
    """The views that `0,2-4` names.

    Raises:
        UsageError: for anything else.
    """
    from kdcache.errors import UsageError

    found: list[int] = []
    for part in given.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash) and max(len(first), len(last)) < _DIGITS):
            raise UsageError(f"--views {given!r} names no views", "write numbers, and runs of them: 0,2-4")
        found += range(int(first), int(last or first) + 1)
    return found


@click.command("sign")
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--key", required=True, type=click.Path(path_type=Path), help="An SSH key, such as ~/.ssh/id_ed25519.")
@json_option
def sign(cache: Path, key: Path, as_json: bool) -> None:
    """Sign a CACHE with an SSH key, through ssh-keygen; others check it with `kdcache verify --signed-by`.

    The signature lies beside the manifest and covers, through the root digest, every byte. Push and pull carry it.

    \b
    Example: kdcache sign runs/digits.kdcache --key ~/.ssh/id_ed25519
    """
    from kdcache.cache.reader import open_cache
    from kdcache.cache.remote.signatures import sign as sign_with

    opened = open_cache(cache)
    facts = {"signature": str(sign_with(cache, key.expanduser())), "digest": opened.manifest.digest}
    if as_json:
        output.as_json(facts)
    else:
        output.facts(facts)
