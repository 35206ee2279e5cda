"""Everything that the processes of tests import: the fork server imports this, and each fork of it has it at once.

No module here starts a thread or draws a random number, and nothing here calls kdcache: a fork is as a new process.
"""

from __future__ import annotations

import gc
import importlib
import pkgutil

from PIL import Image

import kdcache

THIRD_PARTY = [
    "accelerate",
    "aiohttp",
    "click.testing",
    "distributed.cli.dask_scheduler",
    "distributed.cli.dask_worker",
    "encodings.cp437",
    "numpy.ctypeslib",
    "rich._emoji_codes",
    "setuptools",
    "torch.distributed.run",
    "torch.utils.benchmark",
    "torch.utils.cpp_extension",
    "torch.utils.flop_counter",
    "torch.utils.serialization.config",
    "zarr",
    "zarrs.pipeline",
]
OF_TESTS = ["helpers.dask_processes", "helpers.forked", "helpers.pictures", "helpers.ranks", "helpers.trainers"]
OF_KDCACHE = [
    module.name for module in pkgutil.walk_packages(kdcache.__path__, "kdcache.") if module.name != "kdcache.__main__"
]

for name in [*THIRD_PARTY, *OF_KDCACHE, *OF_TESTS]:
    importlib.import_module(name)
Image.preinit()
gc.collect()
gc.freeze()  # a fork would copy all of it when it collects garbage
