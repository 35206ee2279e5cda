"""The walls of the house: what may import what, who prints, who knows zarr and dask, how large a room is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kdcache

PACKAGE = Path(kdcache.__file__).parent

# From the ground up: a module imports only from modules that stand before it.
FLOORS = [
    "errors",
    "lost_process",
    "shipped",
    "progress",
    "machine",
    "provenance",
    "mixing",
    "limits",
    "losses.names",
    "losses.spec",
    "losses.batch",
    "losses.normalisations",
    "losses.adjustments",
    "losses.temperatures",
    "losses.divergences",
    "losses.distillation",
    "losses",
    "placed_yaml",
    "section",
    "pipeline",
    "crops",
    "transforms",
    "keys",
    "samples",
    "datasets",
    "views",
    "fingerprints",
    "evaluate",
    "measures",
    "costs",
    "models.checkpoints",
    "models.small",
    "models.construct",
    "models.from_torchvision",
    "models.from_timm",
    "models.cifar_blocks",
    "models.cifar_light",
    "models.cifar",
    "models.build",
    "models.outputs",
    "models.ensemble",
    "models",
    "cache.schema",
    "cache.shape",
    "cache.basis",
    "cache.codec",
    "cache.packed",
    "cache.arrays",
    "cache.layout",
    "cache.fidelity",
    "cache.planner",
    "cache.verify",
    "cache.signatures",
    "cache.address",
    "cache.hub",
    "cache.stores",
    "cache.mirror",
    "cache.lock",
    "cache.writer",
    "cache.places",
    "cache.records",
    "cache.stream",
    "cache.placement",
    "cache.reader",
    "cache.remote",
    "cache.joined",
    "cache.operations",
    "cache.card",
    "cache.census",
    "cache.agreement",
    "cache.derivation",
    "cache.audit",
    "cache",
    "running",
    "ranks",
    "extend",
    "pilot",
    "teachers",
    "passes",
    "dump",
    "recheck",
    "derive",
    "select",
    "merge",
    "convert",
    "align",
    "foreign.said",
    "foreign.fkd",
    "foreign.ml_dr",
    "foreign.tinyvit",
    "foreign.incoming",
    "foreign.outgoing",
    "foreign",
    "cached_dataset",
    "report",
    "schedule",
    "learner",
    "fit",
    "runs",
    "trained",
    "scorecard",
    "groups",
    "results",
    "taught",
    "findings",
    "charts",
    "page",
    "taught_chapters",
    "chapters",
    "decoded",
    "lessons",
    "train",
    "mapped_images",
    "sweep",
    "doctor",
    "demo",
    "",  # kdcache/__init__.py
    "cli.output",
    "cli.options",
    "cli.doctor",
    "cli.pipelines",
    "cli.info",
    "cli.plan",
    "cli.verify",
    "cli.census",
    "cli.derive",
    "cli.convert",
    "cli.evaluate",
    "cli.report",
    "cli.demo",
    "cli.stage_one",
    "cli.stage_two",
    "cli.remote",
    "cli.sweep",
    "cli",
    "__main__",
]
SOURCES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from kdcache.cache import layout` names a module, `from kdcache.cache import Cache` what is in one.
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in whole if name.removeprefix("kdcache.") in FLOORS}
            found |= modules or {node.module}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_point_downward(path: Path) -> None:
    here = FLOORS.index(name_of(path))
    inner = {name.removeprefix("kdcache").lstrip(".") for name in imports(path) if name.split(".")[0] == "kdcache"}
    above = {name for name in inner if FLOORS.index(name) >= here}
    assert not above, f"{name_of(path)} imports from above: {above}"


@pytest.mark.parametrize(
    ("library", "only"),
    [
        ("zarr", "cache.layout"),
        ("numcodecs", "cache.layout"),
        ("dask", "cache.operations"),
        ("fsspec", "cache.stores"),
        ("huggingface_hub", "cache.hub"),
        ("distributed", "cache.operations"),
    ],
)
def test_one_module_knows_the_library(library: str, only: str) -> None:
    knowing = {name_of(path) for path in SOURCES if any(name.split(".")[0] == library for name in imports(path))}
    assert knowing <= {only}


def test_only_output_prints() -> None:
    printing = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "click.echo", "sys.stdout.write"):
                printing.add(name_of(path))
        if any(name.split(".")[0] == "rich" for name in imports(path)):
            printing.add(name_of(path))
    assert printing == {"cli.output"}


def test_rooms_are_small() -> None:
    large = {name_of(path): lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > 350}
    assert not large


def test_nothing_is_unpickled_or_evaluated() -> None:
    for path in SOURCES:
        text = path.read_text()
        for word in ("pickle.load", "weights_only=False", "allow_pickle=True", "yaml.load(", " eval(", "exec("):
            assert word not in text, f"{word} in {path}"


def test_the_public_api_is_all_there() -> None:
    for name in kdcache.__all__:
        assert getattr(kdcache, name) is not None
    assert set(kdcache.__all__) == set(kdcache._HOME)
