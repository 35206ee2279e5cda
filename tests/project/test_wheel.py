"""The built wheel alone, in a fresh environment outside the checkout, runs the demo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.processes import PATIENCE


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(ROOT)], check=True, timeout=PATIENCE)
    return next(folder.glob("*.whl"))


def test_it_contains_data_recipes_types_and_license(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for wanted in (
        "py.typed",
        "evaluation/report/template.html.j2",
        "package_data/data/digits/digits.csv.gz",
        "package_data/data/digits/README.md",
    ):
        assert f"kdcache/{wanted}" in names
    assert {f"kdcache/package_data/pipelines/{path.name}" for path in (ROOT / "pipelines").glob("*.yaml")} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests/") for name in names)


def test_it_runs_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=PATIENCE)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = environment / "lib" / version / "site-packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--prefix", str(environment)]
    subprocess.run([*install, "--ignore-installed", str(wheel)], check=True, timeout=PATIENCE)
    # The dependencies are those of the current environment: a path in a .pth file adds their folder, and does not run
    # the .pth files in it, so that an editable install of kdcache is not found.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    python = str(environment / "bin" / "python")
    where = [python, "-c", "import kdcache; print(kdcache.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert Path(found.stdout.strip()).is_relative_to(environment)
    (recipe,) = environment.rglob("package_data/pipelines/digits.yaml")
    recipe.write_text(re.sub(r"epochs: \d+", "epochs: 2", recipe.read_text()))  # nothing is said of accuracies
    command = [python, "-W", "error", str(environment / "bin" / "kdcache"), "demo", "--seeds", "1"]
    done = subprocess.run(
        command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert "student, ka+dtd" in done.stdout
    assert (tmp_path / "kdcache-demo" / "digits.kdcache" / "manifest.json").is_file()
