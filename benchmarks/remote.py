"""Measure how fast a cache is pulled and verified.

python benchmarks/remote.py            a cache of about 300 MB
python benchmarks/remote.py --quick    a small one; the results do not compare with the bounds

Pull over loopback HTTP, with 30 ms latency per response, compared with a plain parallel download of the same files
without checks; the server is a separate process. Verify: sizes and sha256 of all files, as every use of a cache does,
on one thread. Medians, after a warm-up round. The bounds: a pull reaches half the speed of the plain download,
verification 300 MB/s.
"""

from __future__ import annotations

import argparse
import http.client
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from common import encoded, planned, write_cache
from helpers.remote_servers import FileServer

from kdcache.cache.format.read_records import read_manifest
from kdcache.cache.format.verified_files import damaged_files
from kdcache.cache.push_pull import pull
from kdcache.cache.remote.object_store import THREADS
from kdcache.cli import output

LATENCY = 0.03


def serve(folder: Path, address: multiprocessing.Queue[str]) -> None:
    """Serve a folder until the process is killed, and put its URL into the queue."""
    address.put(FileServer(folder, LATENCY).url)
    time.sleep(10**6)


def plain_download(url: str, names: list[str], to: Path) -> None:
    """Download every file with http.client, with as many connections as kdcache uses."""

    def some(mine: list[str]) -> None:
        at = urlsplit(url)
        connection = http.client.HTTPConnection(at.hostname or "", at.port)
        for name in mine:
            connection.request("GET", f"{at.path}/{name}")
            with (to / name.replace("/", "-")).open("wb") as opened:
                shutil.copyfileobj(connection.getresponse(), opened, 2**20)
        connection.close()

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(some, [names[start::THREADS] for start in range(THREADS)]))


def seconds(work: Callable[[Path], object], rounds: int, room: Path) -> float:
    """Return the median seconds of several rounds after a warm-up, each into an empty folder."""
    taken = []
    for number in range(rounds + 1):
        to = room / str(number)
        to.mkdir()
        began = time.perf_counter()
        work(to)
        taken.append(time.perf_counter() - began)
        shutil.rmtree(to)
    return statistics.median(taken[1:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small cache and one round")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as temporary:
        room = Path(temporary)
        (room / "www").mkdir()
        pool = encoded(planned(300), 2_000 if quick else 40_000)
        path = write_cache(room / "www" / "c.kdcache", pool, 200_000 if quick else 4_000_000).path
        files = read_manifest(path / "manifest.json").files
        size = sum(record.size for record in files.values()) / 1e6
        context = multiprocessing.get_context("spawn")
        address = context.Queue()
        server = context.Process(target=serve, args=(room / "www", address), daemon=True)
        server.start()
        url = f"{address.get()}/c.kdcache"
        rounds = 1 if quick else 3
        pulled = seconds(lambda to: pull(url, to / "c"), rounds, room)
        plain = seconds(lambda to: plain_download(url, [*files], to), rounds, room)
        with patch("kdcache.cache.format.integrity.ThreadPoolExecutor", lambda: ThreadPoolExecutor(1)):
            verified = seconds(lambda _: damaged_files(path, files), 3, room)
        server.kill()
    works = {"pull, checked": pulled, f"plain download, {THREADS} connections": plain, "verify, one thread": verified}
    output.table(
        f"a cache of {size:,.1f} MB in {len(files)} files, latency {LATENCY * 1000:.0f} ms per response",
        ["work", "s", "MB/s", "bound, MB/s"],
        [
            [what, f"{took:.2f}", f"{size / took:,.1f}", bound]
            for (what, took), bound in zip(works.items(), (f"{size / plain / 2:,.1f}", "", "300"), strict=True)
        ],
    )


if __name__ == "__main__":
    main()
