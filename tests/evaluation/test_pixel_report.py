"""`kdcache report` of networks that say a class of every pixel: figures against loops, and the page itself."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli import ok, refused
from helpers.pages import Page
from helpers.scenes import scenes_folder
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from kdcache import load_pipeline, load_split, open_cache
from kdcache.data.views import View
from kdcache.evaluation.report.charts import as_svg
from kdcache.evaluation.report.map_charts import (
    MapPicture,
    SaidMap,
    class_color,
    colored,
    difference,
    draw_maps,
    share_of_difference,
)
from kdcache.models.build import build_model
from kdcache.models.checkpoints import load_weights

SEEDS = (0, 1)


class Work:
    """A teacher, its cache, and a sweep of two losses over two seeds."""

    def __init__(self, folder: Path) -> None:
        self.folder = scenes_folder(folder)
        self.path, self.cache, self.sweep = folder / "p.yaml", folder / "t.kdcache", folder / "sweep"
        short = ["--set", "teacher.train.epochs=5", "--set", "student.train.epochs=5", "--device", "cpu"]
        ok("train-teacher", self.path, *short, "-o", folder / "teacher")
        ok("dump-teacher", self.path, "-o", self.cache, "--device", "cpu")
        over = ["--over", "loss=ce,kd", "--seeds", len(SEEDS)]
        ok("sweep", self.path, "--cache", self.cache, *over, *short, "-o", self.sweep)
        self.page = folder / "report.html"
        runs = [self.sweep, folder / "teacher"]
        said = ok("report", *runs, "--cache", self.cache, "-o", self.page, "--png", "--json", "--device", "cpu")
        self.said = json.loads(said)

    def run(self, loss: str, seed: int) -> Path:
        return self.sweep / f"loss={loss}" / f"seed{seed}"

    def metrics(self, loss: str) -> list[Any]:
        return [json.loads((self.run(loss, seed) / "metrics.json").read_text()) for seed in SEEDS]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def page(work: Work) -> Page:
    return Page(work.page.read_text())


def written(values: list[float], form: str, factor: float = 1) -> str:
    return f"{factor * statistics.mean(values):{form}} ± {factor * statistics.stdev(values):{form}}"


# Figures


def test_the_table_is_that_of_the_runs_own_metrics(work: Work, page: Page) -> None:
    (table,) = page.tables["Over seeds"]
    assert [row[0] for row in table[1:]] == ["ce", "kd", "teacher, small:fcn"]
    for row, group in zip(table[1:3], work.said["groups"], strict=False):
        said = work.metrics(row[0])
        assert row[1:] == [
            "2",
            written([one["test"]["mean_iou"] for one in said], ".2f", 100),
            written([one["best"]["validation_mean_iou"] for one in said], ".2f", 100),
            written([one["test"]["accuracy"] for one in said], ".2f", 100),
            written([one["test"]["loss"] for one in said], ".4f"),
            written([one["seconds"] for one in said], ".1f"),
        ]
        assert group["mean_iou"]["mean"] == pytest.approx(np.mean([one["test"]["mean_iou"] for one in said]))
        assert (group["loss"], group["seeds"]) == (row[0], [*SEEDS])


def test_the_intersection_over_union_of_a_class_is_the_mean_over_the_seeds(work: Work, page: Page) -> None:
    (table,) = page.tables["Intersection over union by class"]
    assert table[0] == ["class", "ce", "kd", "teacher, small:fcn"]
    assert [row[0] for row in table[1:]] == ["ground", "box", "disc"]
    for label, row in enumerate(table[1:]):
        for loss, cell in zip(("ce", "kd"), row[1:], strict=False):
            known = [one["test"]["iou"][label] for one in work.metrics(loss)]
            assert cell == f"{np.mean([each for each in known if each is not None]):.1%}"


def maps_of(work: Work, run: Path, view: View, ids: list[int]) -> torch.Tensor:
    """Logits of a network at the teacher's places, [n, 3, 6, 8]."""
    network = build_model(load_pipeline(run / "resolved.yaml").section("student"), 3, (3, 24, 32))
    load_weights(network, str(run / "model.safetensors"))
    network.eval()
    with torch.no_grad():
        logits: torch.Tensor = network(view.batch(ids, 0).images)
    return logits


def seen(work: Work) -> View:
    pipeline, cache = load_pipeline(work.path), open_cache(work.cache)
    return View(load_split(pipeline.dataset, "train"), pipeline.transform or [], cache.manifest.plan.views.seed)


def test_agreement_by_class_is_that_of_a_plain_loop(work: Work, page: Page) -> None:
    of_all, by_class = page.tables["Agreement with the teacher"]
    theirs = open_cache(work.cache).teacher("pixels")(torch.arange(64), 0).argmax(1)
    for column, loss in enumerate(("ce", "kd"), 1):
        ours = [maps_of(work, work.run(loss, seed), seen(work), [*range(64)]).argmax(1) for seed in SEEDS]
        same = [float((each == theirs).double().mean()) for each in ours]
        assert of_all[column][1] == written(same, ".2f", 100)
        for label, row in enumerate(by_class[1:]):
            shares = [float((each == label)[theirs == label].double().mean()) for each in ours]
            assert row[column] == f"{np.mean(shares):.1%}"


def test_the_pictures_say_how_much_of_an_image_differs(work: Work, page: Page) -> None:
    pictures = [label for label in page.labels if "its label map" in label]
    ids = [int(number) for label in pictures for number in re.findall(r"sample (\d+)", label)]
    assert len(ids) == 4 and len({*ids}) == 4
    logits = open_cache(work.cache).teacher("pixels")(torch.tensor(ids), 0)
    theirs = F.interpolate(logits, (24, 32), mode="bilinear").argmax(1)
    labels = seen(work).batch(ids, 0).maps
    assert labels is not None
    for place, said in enumerate(pictures):
        known = labels[place] >= 0
        wrong = float((theirs[place] != labels[place])[known].double().mean())
        assert f"teacher: other than labels, {wrong:.1%} of the pixels" in said
        for loss in ("ce", "kd"):
            logits = maps_of(work, work.run(loss, 0), seen(work), [ids[place]])
            ours = F.interpolate(logits, (24, 32), mode="bilinear").argmax(1)[0]
            assert f"{loss}: other than teacher, {float((ours != theirs[place]).double().mean()):.1%}" in said


# The page


def test_the_page_loads_nothing_and_every_picture_has_a_text(work: Work, page: Page) -> None:
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert len(page.labels) == 9 and all(page.labels)
    assert "Calibration" not in page.tables
    assert "Digest of the cache" in page.text
    pictures = {path.stem for path in (work.folder / "report-pictures").glob("*.png")}
    assert pictures == {
        "loss", "validation-mean-iou", "validation-accuracy", "validation-loss", "classes",
        *(f"picture-{number:02d}" for number in range(4)),
    }  # fmt: skip


def test_the_same_runs_make_the_same_page(work: Work, tmp_path: Path) -> None:
    pages = [tmp_path / "one.html", tmp_path / "other.html"]
    for each in pages:
        ok("report", work.run("kd", 0), "--cache", work.cache, "--rows", 8, "-o", each, "--device", "cpu")
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_without_a_cache_test_images_are_compared_with_their_labels(work: Work, tmp_path: Path) -> None:
    said = ok("report", work.run("kd", 0), work.run("kd", 1), "-o", tmp_path / "r.html", "--device", "cpu")
    assert "runs    2 in 1 group" in said
    page = Page((tmp_path / "r.html").read_text())
    assert "Agreement with the teacher" not in page.tables
    assert "need its cache" in page.text and "images of the test split" in page.text
    samples = load_split(load_pipeline(work.path).dataset, "test")
    view = View(samples, load_pipeline(work.path).eval_transform or [])
    pictures = [label for label in page.labels if "its label map" in label]
    for said in pictures:
        (index,) = (int(number) for number in re.findall(r"/test, image (\d+)", said))
        labels = view.batch([index], 0).maps
        assert labels is not None
        ours = F.interpolate(maps_of(work, work.run("kd", 0), view, [index]), (24, 32), mode="bilinear").argmax(1)
        wrong = float((ours != labels)[labels >= 0].double().mean())
        assert f"other than labels, {wrong:.1%} of the pixels" in said


def test_a_data_set_that_is_gone_leaves_the_figures_of_training(work: Work, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(work.run("kd", 0), run)
    resolved = run / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace("/scenes.py", "/gone.py"))
    ok("report", run, "-o", tmp_path / "r.html", "--device", "cpu")
    page = Page((tmp_path / "r.html").read_text())
    assert "The test split is not available" in page.text
    assert len(page.tables["Over seeds"][0]) == 2
    assert [row[0] for row in page.tables["Intersection over union by class"][0][1:]] == ["ground", "box", "disc"]
    assert not [label for label in page.labels if "its label map" in label]


# Pictures


def picture(height: int = 20, width: int = 30, students: int = 2, classes: int = 8) -> MapPicture:
    rng = np.random.default_rng(0)
    maps = [torch.from_numpy(rng.integers(0, classes, (height, width))) for _ in range(2 + students)]
    labels = maps[0].clone()
    labels[:4] = -1
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), np.uint8))
    return MapPicture("one", image, labels, maps[1], [SaidMap(f"student {n}", each) for n, each in enumerate(maps[2:])])


def test_colors_of_classes_differ_from_one_another_and_from_gray() -> None:
    colors = [class_color(label) for label in range(150)]
    assert len({*colors}) == 150
    assert all(max(color) - min(color) > 60 for color in colors)
    first = np.array(colors[:20], float)
    assert min(np.linalg.norm(one - other) for one, other in combinations(first, 2)) > 40


@given(st.data())
def test_difference_shows_exactly_the_pixels_that_differ(data: st.DataObject) -> None:
    values = st.lists(st.integers(-1, 5), min_size=12, max_size=12)
    one = torch.tensor(data.draw(values)).clamp_min(0).view(3, 4)
    other = torch.tensor(data.draw(values)).view(3, 4)
    shown = difference(one, other)
    wrong = 0
    for row in range(3):
        for column in range(4):
            said, truth = int(one[row, column]), int(other[row, column])
            pixel = tuple(shown[row, column].tolist())
            if truth < 0:
                assert len({*pixel}) == 1 and pixel[0] < 200
            elif said == truth:
                assert pixel == (232, 232, 232)
            else:
                wrong += 1
                assert pixel == class_color(said)
    known = int((other >= 0).sum())
    assert share_of_difference(one, other) == (pytest.approx(wrong / known) if known else None)


def test_ignored_pixels_are_striped() -> None:
    shown = colored(torch.full((12, 12), -1))
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 2
    assert len({tuple(row) for row in shown[0].tolist()}) == 2


def test_an_svg_has_the_maps_pixel_for_pixel_and_a_legend() -> None:
    given = picture()
    svg = as_svg(draw_maps(given, [f"class {n}" for n in range(8)], "picture"))
    assert 'aria-label="one, its label map and the map of each network. teacher: other than labels' in svg
    shown = []
    for source in re.findall(r'href="data:image/png;base64,([^"]+)"', svg):
        with Image.open(io.BytesIO(base64.b64decode(source.replace("\n", "")))) as image:
            shown.append(np.asarray(image)[..., :3])
    assert len(shown) == 8
    for expected in (colored(given.labels), colored(given.students[1].classes)):
        assert any(np.array_equal(each, expected) or np.array_equal(each[::-1], expected) for each in shown)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {f"class {n}" for n in range(8)} | {"ignored", "student 1", "label map"} <= {*texts}
    assert not re.search(r"<text[^>]*#000000", svg)


def test_large_images_are_reduced_and_shares_are_of_all_their_pixels() -> None:
    given = picture(300, 700, students=1, classes=40)
    svg = as_svg(draw_maps(given, [f"class {n}" for n in range(40)], "picture"))
    assert len(svg) < 1_000_000
    assert f"student 0: other than teacher, {share_of_difference(given.students[0].classes, given.teacher):.1%}" in svg  # type: ignore[arg-type]
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert len([text for text in texts if text.startswith("class ")]) == 21


# Mistakes


def test_options_of_whole_images_are_refused(work: Work, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    (tmp_path / "RESULTS.md").write_text("| recipe | kdcache |\n|---|---|\n")
    canaries = ("--canaries", "1-2", "--references", "3-9")
    for options in (canaries, ("--results", tmp_path / "RESULTS.md")):
        said = refused(2, "report", work.run("kd", 0), *options, "-o", out)
        assert f"{options[0]} is for networks with a class per image, and these have one per pixel" in said
    assert not out.exists()


def test_runs_of_other_kinds_and_other_data_are_refused(work: Work, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    quick = ["--set", "teacher.train.epochs=1", "--device", "cpu"]
    ok("train-teacher", "smoke", *quick, "-o", tmp_path / "digits")
    assert "one kind at a time" in refused(2, "report", work.run("kd", 0), tmp_path / "digits", "-o", out)
    ok("dump-teacher", "smoke", "--set", f"teacher.weights={tmp_path}/digits/model.safetensors", "-o", tmp_path / "d")
    said = refused(4, "report", work.run("kd", 0), "--cache", tmp_path / "d", "-o", out)
    assert "is in" in said
    (work.run("ce", 1) / "metrics.csv").rename(tmp_path / "kept.csv")
    assert "cannot read the metrics" in refused(5, "report", work.run("ce", 1), "-o", out)
    (tmp_path / "kept.csv").rename(work.run("ce", 1) / "metrics.csv")
    assert not out.exists()
