"""`kdcache report`: its figures against loops over what the runs left, and the page in a real browser."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.cli import ok, refused
from helpers.networks import CLEAN, TURN, network, rearranged, reference, softmax
from helpers.pages import Page
from helpers.processes import PATIENCE
from PIL import Image
from safetensors.torch import load_file

import kdcache
from kdcache.config.cache import CacheSpec
from kdcache.config.schema import Pipeline
from kdcache.data.datasets import load_split
from kdcache.data.images import Picture
from kdcache.data.views import View
from kdcache.evaluation.metrics import reliability
from kdcache.evaluation.report.charts import Chart, Line, as_svg, draw_lines, draw_where_wrong, save_png
from kdcache.evaluation.report.collect import collect
from kdcache.evaluation.report.html import Sample, SampleGrid, render
from kdcache.evaluation.runs import Mean, Row, find_runs, group_runs, read_run, without_copies
from kdcache.models.small import SmallMLP

Values = npt.NDArray[Any]

NAMES = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(2)>",
    "_hidden & $\\frac{",
    "&lt;b&gt;",
    "漢字 ü",
    "fill: #000000",
    ' id="figure_1"',
    "a name that is far too long for a legend, " * 3 + "or a table",
)
LOSSES = ("kd", "dtkd")
EPOCHS = 12


class Work(NamedTuple):
    """Runs of two losses and two seeds, the cache that they learned from, and the page about them."""

    folder: Path
    pipeline: Pipeline
    cache: kdcache.Cache
    told: Any
    html: str

    @property
    def page(self) -> Page:
        return Page(self.html)

    def runs(self, loss: str) -> list[Path]:
        return [self.folder / "sweep" / f"loss={loss}" / f"seed{seed}" for seed in (0, 1)]

    def says(self, run: Path, split: Any) -> tuple[Values, Values]:
        """A run's logits of every image of a split, as the sweep showed them, and the labels."""
        student = SmallMLP(len(NAMES), 1, 4, 4, 24)
        student.load_state_dict(load_file(run / "model.safetensors"))
        samples = load_split(self.pipeline.dataset, split)
        view = View(samples, TURN if split == "train" else CLEAN)
        images = torch.cat([view[place].images for place in range(len(samples))])
        return student(images).detach().numpy(), samples.labels

    def tested(self, run: Path) -> tuple[Values, Values]:
        logits, labels = self.says(run, "test")
        return logits[labels >= 0], labels[labels >= 0]

    def teacher(self) -> Values:
        """Its logits in view 0."""
        return self.cache.teacher()(torch.arange(len(self.cache))).numpy()


def dataset(folder: Path, names: tuple[str, ...], count: int = 160, seed: int = 0) -> dict[str, Any]:
    """An npz of images that tell their class a little; every tenth has no label."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(names)
    images = rng.integers(0, 60, (count, 4, 4), np.uint8)
    images[np.arange(count), labels // 4 % 4, labels % 4] += 190
    path = folder / f"mine{seed}.npz"
    np.savez(path, images=images, labels=np.where(np.arange(count) % 10, labels, -1), class_names=np.array(names))
    return {"name": "npz", "root": str(path), "validation_fraction": 0.2, "test_fraction": 0.3}


def recipe(folder: Path, names: tuple[str, ...], **changed: Any) -> tuple[Path, Pipeline]:
    given = {
        "dataset": dataset(folder, names, **changed),
        "transform": TURN,
        "eval_transform": CLEAN,
        "student": {
            "model": "small:mlp",
            "args": {"width": 24},
            "train": {"epochs": EPOCHS, "batch_size": 8, "lr": 0.02},
        },
    }
    pipeline = Pipeline.model_validate(given)
    (folder / "mine.yaml").write_text(pipeline.to_yaml())
    return folder / "mine.yaml", pipeline


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("work")
    path, pipeline = recipe(folder, NAMES)
    samples = load_split(pipeline.dataset, "train")
    spec = CacheSpec(views=2, dtype="float32", top_k="all")
    cache = kdcache.dump_teacher(network(2, 24), samples, folder / "t.kdcache", transform=TURN, spec=spec)
    over = ["--over", f"loss={','.join(LOSSES)}", "--seeds", 2, "--set", "loss.ce_weight=2"]
    ok("sweep", path, "--cache", cache.path, *over, "-o", folder / "sweep", "--device", "cpu")
    page = folder / "report.html"
    told = ok("report", folder / "sweep", "--cache", cache.path, "-o", page, "--png", "--json", "--device", "cpu")
    return Work(folder, pipeline, cache, json.loads(told), page.read_text())


def metrics(run: Path) -> Any:
    return json.loads((run / "metrics.json").read_text())


def written(values: list[float], form: str, factor: float = 1) -> str:
    return f"{factor * statistics.mean(values):{form}} ± {factor * statistics.stdev(values):{form}}"


# Figures.


def test_the_table_is_that_of_the_runs_own_metrics(work: Work) -> None:
    (table,) = work.page.tables["Over seeds"]
    assert [row[0] for row in table[1:]] == ["dtkd", "kd"]
    for row, group in zip(table[1:], work.told["groups"], strict=True):
        runs = work.runs(row[0])
        said = [metrics(run) for run in runs]
        errors = [reference(*work.tested(run))["calibration_error"] for run in runs]
        assert row[1:] == [
            "2",
            written([one["test"]["accuracy"] for one in said], ".2f", 100),
            written([one["best"]["validation_accuracy"] for one in said], ".2f", 100),
            written([one["test"]["loss"] for one in said], ".4f"),
            written(errors, ".4f"),
            written([one["seconds"] for one in said], ".1f"),
        ]
        assert group["test"]["mean"] == pytest.approx(np.mean([one["test"]["accuracy"] for one in said]))
        assert group["calibration_error"]["mean"] == pytest.approx(np.mean(errors), abs=1e-6)
        assert (group["loss"], group["seeds"], group["runs"]) == (row[0], [0, 1], [str(run) for run in runs])


def test_bins_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    logits, labels = 2 * rng.normal(size=(400, 4)), rng.integers(0, 4, 400)
    found = reliability(torch.from_numpy(logits), torch.from_numpy(labels))
    probabilities = softmax(logits)
    for place in range(15):
        here = [i for i, row in enumerate(probabilities) if place / 15 < row.max() <= (place + 1) / 15]
        assert found.rows[place] == len(here)
        assert found.correct[place] == sum(probabilities[i].argmax() == labels[i] for i in here)
        assert found.confidence[place].item() == pytest.approx(sum(probabilities[i].max() for i in here))


def test_accuracy_by_class_is_that_of_a_loop(work: Work) -> None:
    (table,) = work.page.tables["Accuracy by class"]
    assert table[0] == ["class", "dtkd", "kd", "teacher, cached"]
    assert [row[0] for row in table[1:]] == list(NAMES)
    teacher, labels = work.teacher().argmax(axis=1), load_split(work.pipeline.dataset, "train").labels
    for place, row in enumerate(table[1:]):
        for loss, cell in zip(("dtkd", "kd"), row[1:], strict=False):
            right = [
                logits.argmax() == place
                for run in work.runs(loss)
                for logits, label in zip(*work.tested(run), strict=True)
                if label == place
            ]
            assert cell == f"{np.mean(right):.1%}"
        assert row[3] == f"{np.mean(teacher[labels == place] == place):.1%}"


def test_what_ka_changes_is_what_a_loop_finds(work: Work) -> None:
    of_students, by_class = work.page.tables["Where KA changes the teacher"]
    labels, teacher = load_split(work.pipeline.dataset, "train").labels, work.teacher().argmax(axis=1)
    wrong = [i for i, label in enumerate(labels) if label >= 0 and teacher[i] != label]
    assert 0 < len(wrong) < (labels >= 0).sum() < len(labels)
    assert work.told["changed_by_ka"] == len(wrong)
    assert f"in {len(wrong)} of {(labels >= 0).sum()} labeled rows of view 0" in work.page.text
    kinds = np.zeros(3)
    for row in of_students[1:]:
        counts = [0, 0, 0]
        for run in work.runs(row[0]):
            logits = work.says(run, "train")[0]
            for i in wrong:
                counts[0 if logits[i].argmax() == labels[i] else 1 if logits[i].argmax() == teacher[i] else 2] += 1
        kinds += counts
        assert row[1:] == [f"{count} ({count / sum(counts):.0%})" for count in counts]
    assert kinds.all()
    for name, rows, changed, share, instead in by_class[1:]:
        here = [i for i in wrong if NAMES[labels[i]] == name]
        said = [NAMES[teacher[i]] for i in here]
        assert (int(changed), int(rows)) == (len(here), (labels == NAMES.index(name)).sum())
        assert share == f"{len(here) / int(rows):.1%}"
        assert said.count(instead) == max(map(said.count, said))
    assert sum(int(row[2]) for row in by_class[1:]) == len(wrong)


def test_sharpness_is_of_the_rows_that_the_students_were_shown(work: Work) -> None:
    (table,) = work.page.tables["Sharpness"]
    of_students = {loss: np.stack([work.says(run, "train")[0] for run in work.runs(loss)]) for loss in LOSSES}
    for name, *cells in table[1:]:
        logits = work.teacher()[None] if name == "teacher" else of_students[name]
        largest = logits.max(axis=2).mean(axis=0)
        logsumexp = np.log(np.exp(logits.astype(np.float64)).sum(axis=2)).mean(axis=0)
        expected = [largest.mean(), largest.std(), logsumexp.mean(), logsumexp.std()]
        assert [float(cell) for cell in cells] == pytest.approx(expected, abs=6e-4)


def test_disagreement_is_that_of_a_loop(work: Work) -> None:
    found = collect([work.folder / "sweep"], work.cache)
    assert found.teacher is not None
    teacher = work.teacher().argmax(axis=1)
    for group in found.students:
        expected = np.zeros((len(NAMES), len(NAMES)))
        for run in work.runs(group.loss):
            for of_teacher, logits in zip(teacher, work.says(run, "train")[0], strict=True):
                expected[of_teacher, logits.argmax()] += 1
        assert found.teacher.disagreement(group, len(NAMES)).tolist() == expected.tolist()


def test_the_cost_is_counted_by_hand(work: Work) -> None:
    count = len(load_split(work.pipeline.dataset, "train"))
    size = sum(path.stat().st_size for path in work.cache.path.rglob("*") if path.name not in ("README.md", "card.png"))
    size -= sum(path.stat().st_size for path in work.cache.path.rglob("*") if path.is_dir())
    assert work.told["cost"] == {
        "teacher_passes": 2 * count,
        "live_teacher_passes": 4 * EPOCHS * count,
        "students": 4,
        "cache_bytes": size,
    }
    seconds = work.page.tables["Cost"][0][1][3]
    assert seconds == f"{sum(metrics(run)['seconds'] for run in work.runs('dtkd')):.1f}"


def test_the_hardest_samples_are_shown_as_they_were_before_the_transform(work: Work) -> None:
    samples = load_split(work.pipeline.dataset, "train")
    log_probs = np.log(softmax(work.teacher()))[np.arange(len(samples)), samples.labels]
    worst = sorted(np.flatnonzero(samples.labels >= 0).tolist(), key=lambda place: log_probs[place])[:16]
    assert re.findall(r"<br>sample (\d+)", work.html) == [str(place) for place in worst]
    said = [float(value) for value in re.findall(r"log p\(label\) (-[\d.]+)", work.html)]
    assert said == pytest.approx(log_probs[worst], abs=6e-3)
    pictures = [source for source in work.page.sources if source.startswith("data:image/png;base64,")]
    for place, source in zip(worst, pictures, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
            assert np.array_equal(np.asarray(image), torch.as_tensor(samples.images.picture(place))[0].numpy())


def test_rows_that_the_students_are_shown_may_be_fewer(work: Work, tmp_path: Path) -> None:
    ok("report", work.runs("kd")[0], "--cache", work.cache.path, "--rows", 9, "-o", tmp_path / "r.html", "--json")
    text = Page((tmp_path / "r.html").read_text()).text
    assert f"On 9 of the {len(work.cache)} cached images" in text
    assert f"in {work.told['changed_by_ka']} of" in text  # the teacher is asked about all
    assert "of them that the students were run on" in text


def test_a_data_set_in_another_order_makes_the_same_page(work: Work, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(work.runs("kd")[0], run)
    moved = rearranged(read_run(run).pipeline, tmp_path / "mine0.npz", [*reversed(range(len(work.cache)))])
    (run / "resolved.yaml").write_text(moved.to_yaml())
    pages = []
    for number, each in enumerate((work.runs("kd")[0], run)):
        ok("report", each, "--cache", work.cache.path, "--rows", 31, "-o", tmp_path / f"{number}.html")
        pages.append(Page((tmp_path / f"{number}.html").read_text()))
    assert pages[1].tables == pages[0].tables
    assert pages[1].sources == pages[0].sources
    assert pages[1].text == pages[0].text


def test_a_student_of_a_part_is_compared_on_that_part(work: Work, tmp_path: Path) -> None:
    count = len(work.cache)
    part = sorted(np.random.default_rng(4).permutation(count)[: count // 2].tolist())
    moved = rearranged(work.pipeline, tmp_path / "mine0.npz", part[::-1], more=3)
    (tmp_path / "mine.yaml").write_text(moved.to_yaml())
    short = ("--set", "student.train.epochs=2", "--device", "cpu")
    train = ("train-student", tmp_path / "mine.yaml", "--cache", work.cache.path, "-o", tmp_path / "run")
    ok(*train, "--loss", "kd", "--allow-missing", *short)
    found = collect([tmp_path / "run"], work.cache)
    assert found.teacher is not None
    assert found.teacher.cost.live_teacher_passes == 2 * len(part)
    assert found.teacher.ids.tolist() == part
    (note,) = found.notes
    assert f"{len(part)} samples of the cache are in mine0/train, {count - len(part)} are missing" in note
    assert "3 of its own are left out" in note

    logits, labels = work.says(tmp_path / "run", "train")
    teacher = work.teacher()
    (group,) = found.students
    expected = np.zeros((len(NAMES), len(NAMES)))
    for id_ in part:
        expected[teacher[id_].argmax(), logits[id_].argmax()] += 1
    assert found.teacher.disagreement(group, len(NAMES)).tolist() == expected.tolist()
    expected_counts = [0, 0, 0]
    for id_ in part:
        if labels[id_] >= 0 and teacher[id_].argmax() != labels[id_]:
            said = logits[id_].argmax()
            expected_counts[0 if said == labels[id_] else 1 if said == teacher[id_].argmax() else 2] += 1
    assert found.teacher.predictions_where_wrong(group) == tuple(expected_counts)
    assert found.teacher.sharpness(group)["largest"].numpy() == pytest.approx(logits[part].max(axis=1), abs=1e-5)
    assert int(found.teacher.wrong.sum()) == work.told["changed_by_ka"], "the teacher is asked about all"

    images = load_split(work.pipeline.dataset, "train").images
    assert {one.id in part for one in found.teacher.hardest} == {True, False}
    for one in found.teacher.hardest:
        assert (one.picture is not None) is (one.id in part)
        if one.picture is not None:
            assert torch.equal(torch.as_tensor(one.picture), torch.as_tensor(images.picture(one.id)))


# Groups.


def test_runs_that_differ_in_the_seed_alone_are_one_group(work: Work, tmp_path: Path) -> None:
    copy = tmp_path / "other"
    shutil.copytree(work.runs("kd")[0], copy)
    said = (copy / "resolved.yaml").read_text()
    (copy / "resolved.yaml").write_text(said.replace("workers: 0", "workers: 2").replace("lr: 0.02", "lr: 0.01"))
    folders, unfinished = find_runs([copy, work.folder / "sweep", *work.runs("kd")])
    assert folders == [copy, *work.runs("dtkd"), *work.runs("kd")]
    assert not unfinished
    groups = group_runs([read_run(folder) for folder in folders])
    assert [(group.label, group.members) for group in groups] == [
        ("kd, lr 0.01", (0,)),
        ("dtkd, lr 0.02", (1, 2)),
        ("kd, lr 0.02", (3, 4)),
    ]
    (alone,) = group_runs([read_run(copy)])
    assert alone.label == "student, small:mlp, kd"


def test_students_that_saw_one_order_together_are_seeds_of_one_group(work: Work, tmp_path: Path) -> None:
    folders = []
    for run, order in zip(work.runs("kd"), ("null", "0"), strict=True):  # as `sweep --together` writes them
        folders.append(tmp_path / run.name)
        shutil.copytree(run, folders[-1])
        path = folders[-1] / "resolved.yaml"
        path.write_text(path.read_text().replace("data_seed: null", f"data_seed: {order}"))
    (group,) = group_runs([read_run(folder) for folder in folders])
    assert group.members == (0, 1)


def test_a_copied_run_is_not_a_second_seed(work: Work, tmp_path: Path) -> None:
    first, second = work.runs("kd")
    copy, longer, other_teacher = (tmp_path / name for name in ("renamed", "longer", "other teacher"))
    for folder in (copy, longer, other_teacher):
        shutil.copytree(first, folder)
    settings = (longer / "resolved.yaml").read_text()
    epochs = next(line for line in settings.splitlines() if "epochs: " in line)
    (longer / "resolved.yaml").write_text(settings.replace(epochs, epochs + "0"))
    metrics = json.loads((other_teacher / "metrics.json").read_text())
    (other_teacher / "metrics.json").write_text(json.dumps({**metrics, "caches": ["sha256:" + "0" * 64]}))
    runs, copies = without_copies([read_run(path) for path in (first, copy, second, longer, other_teacher)])
    assert [run.network_ref.name for run in runs] == [str(path) for path in (first, second, longer, other_teacher)]
    assert [(run.network_ref.name, of.network_ref.name) for run, of in copies] == [(str(copy), str(first))]
    assert [group.members for group in group_runs(runs)] == [(0, 1), (2,), (3,)]
    found = collect([first, copy])
    assert found.notes == [f"{copy} is a copy of {first} and is left out."]
    (group,) = found.students
    assert found.means(group)["test"] == (read_run(first).accuracy, None)


def test_options_of_a_loss_tell_its_groups_apart_and_its_name_others(work: Work, tmp_path: Path) -> None:
    for name, value in (("hot", "tau: 8.0"), ("warm", "tau: 4.0")):
        shutil.copytree(work.runs("kd")[0], tmp_path / name)
        path = tmp_path / name / "resolved.yaml"
        path.write_text(path.read_text().replace("tau: 4.0", value))
    given = [tmp_path / "hot", tmp_path / "warm", work.runs("dtkd")[0]]
    assert [group.label for group in group_runs([read_run(run) for run in given])] == [
        "kd, tau 8.0",
        "kd, tau 4.0",
        "dtkd",
    ]


def test_means_by_hand() -> None:
    assert Mean.of([0.5, None, 0.7]) == pytest.approx((0.6, 0.02**0.5))
    assert Mean.of([0.5]) == (0.5, None)
    assert Mean.of([None]) is None


# The page.


def test_names_are_text_wherever_they_stand(work: Work) -> None:
    page = work.page
    assert page.tags.isdisjoint({"script", "b", "iframe", "link", "object", "image"})
    for name in NAMES:
        assert name in page.text
    # In a picture, cut off: neither a formula nor left out nor turned into a color.
    texts = [element for svg in re.findall(r"<svg.*?</svg>", work.html, re.DOTALL) for element in _texts(svg)]
    for name in NAMES:
        assert {name.strip(), name.strip()[:11] + "…"} & {text.strip() for text in texts}, name


def _texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]  # noqa: S314  # our own


def test_the_page_stands_alone(work: Work) -> None:
    page = work.page
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert len(page.ids) == len(set(page.ids))
    assert {source[1:] for source in page.sources if source.startswith("#")} <= set(page.ids)
    assert {*re.findall(r"url\(([^)]*)\)", work.html)} <= {f"#{name}" for name in page.ids}
    # The one address in it is the name of a form of XML, which nobody looks up.
    assert "http" not in re.sub(r'<meta http-equiv="Content-Security-Policy"', "", work.html).replace("xmlns", "")
    assert all("#000" not in tag for tag in re.findall(r"<[^<>]+>", work.html) if not tag.startswith("<text"))


def test_the_same_runs_make_the_same_page(work: Work, tmp_path: Path) -> None:
    ok("report", work.folder / "sweep", "--cache", work.cache.path, "-o", tmp_path / "again.html", "--png")
    assert (tmp_path / "again.html").read_text() == work.html
    first = sorted((work.folder / "report-pictures").iterdir())
    assert len(first) == work.html.count("<svg")
    for path in first:
        assert (tmp_path / "again-pictures" / path.name).read_bytes() == path.read_bytes()
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(2**20) or ()) > 20


def test_curves_are_the_lines_of_metrics(work: Work) -> None:
    rows = read_run(work.runs("dtkd")[0]).rows
    lines = [Line(0, "dtkd", rows)]
    chart = draw_lines(lines, {"validation_accuracy": "-"}, "a", "accuracy, %", 100)
    assert chart is not None
    (line,) = chart.figure.axes[0].lines
    with (work.runs("dtkd")[0] / "metrics.csv").open() as opened:
        header, *given = (text.strip().split(",") for text in opened)
    column = [float(row[header.index("validation_accuracy")]) for row in given]
    assert np.asarray(line.get_ydata()) == pytest.approx([100 * value for value in column])
    assert line.get_xdata().tolist() == [*range(1, EPOCHS + 1)]  # type: ignore[union-attr]  # an array
    assert draw_lines(lines, {"what no run has": "-"}, "a", "b") is None


def test_temperatures_are_shown_where_they_move(work: Work, tmp_path: Path) -> None:
    assert "Temperatures over training" in work.page.text
    out = tmp_path / "kd.html"
    ok("report", *work.runs("kd"), "-o", out)
    assert "Temperatures" not in Page(out.read_text()).text


def test_without_the_cache_what_needs_it_is_left_out_and_how_to_get_it_is_said(work: Work, tmp_path: Path) -> None:
    ok("report", work.folder / "sweep", "-o", tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert set(page.tables) == {"Over seeds", "Accuracy by class", "Cost"}
    assert "--cache NAME.kdcache" in page.text
    assert page.tables["Over seeds"] == work.page.tables["Over seeds"]
    assert [row[:3] for row in page.tables["Accuracy by class"][0]] == [
        row[:3] for row in work.page.tables["Accuracy by class"][0]
    ]


def test_without_the_images_what_the_runs_and_the_cache_say_is_shown(work: Work, tmp_path: Path) -> None:
    path = Path(work.pipeline.dataset.root or "")
    path.rename(path.with_suffix(".away"))
    try:
        ok("report", work.folder / "sweep", "--cache", work.cache.path, "-o", tmp_path / "r.html")
    finally:
        path.with_suffix(".away").rename(path)
    page = Page((tmp_path / "r.html").read_text())
    assert "The test split is not available" in page.text
    assert [row[2] for row in page.tables["Over seeds"][0]] == [row[2] for row in work.page.tables["Over seeds"][0]]
    assert [row[5] for row in page.tables["Over seeds"][0]] == ["ECE", "", ""]
    assert page.tables["Where KA changes the teacher"] == work.page.tables["Where KA changes the teacher"][1:]
    assert page.text.count("log p(label)") == 16
    assert "img" not in page.tags


def test_a_teacher_stands_beside_its_students(work: Work, tmp_path: Path) -> None:
    path, _ = recipe(tmp_path, NAMES)
    teacher = [
        "--set",
        "teacher={model: 'small:mlp', train: {epochs: 1}}",
        "--set",
        f"dataset.root={work.pipeline.dataset.root}",
    ]
    ok("train-teacher", path, *teacher, "-o", tmp_path / "t")
    ok("report", tmp_path / "t", *work.runs("kd"), "--cache", work.cache.path, "-o", tmp_path / "r.html")
    tables = Page((tmp_path / "r.html").read_text()).tables
    assert [row[0] for row in tables["Over seeds"][0]] == ["", "teacher, small:mlp", "student, small:mlp, kd"]
    assert [row[0] for row in tables["Sharpness"][0]] == ["", "teacher", "student, small:mlp, kd"]


def test_a_network_that_is_no_longer_what_it_was_is_told_of(work: Work, tmp_path: Path) -> None:
    shutil.copytree(work.runs("kd")[0], tmp_path / "run")
    said = metrics(tmp_path / "run")
    said["test"]["accuracy"] += 0.25
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(said))
    (note,) = collect([tmp_path / "run"]).notes
    assert f"had a test accuracy of {said['test']['accuracy']:.2%}" in note
    assert f"has {said['test']['accuracy'] - 0.25:.2%} now" in note


@pytest.mark.parametrize("classes", [2, 1000])
def test_few_and_many_classes(classes: int, tmp_path: Path) -> None:
    names = tuple(f"class {place}" for place in range(classes))
    path, pipeline = recipe(tmp_path, names, count=3 * classes + 60)
    samples = load_split(pipeline.dataset, "train")
    torch.manual_seed(0)
    spec = CacheSpec(top_k=min(classes, 4), pilot_rows=64, rank=4 if classes > 2 else None)
    cache = kdcache.dump_teacher(
        SmallMLP(classes, 1, 4, 4), samples, tmp_path / "t.kdcache", transform=CLEAN, spec=spec
    )
    given = ["--loss", "dtkd", "--set", "student.train.epochs=1", "--set", "transform=null"]
    ok("train-student", path, "--cache", cache.path, *given, "-o", tmp_path / "run", "--device", "cpu")
    ok("report", tmp_path / "run", "--cache", cache.path, "-o", tmp_path / "r.html", "--device", "cpu")
    text = (tmp_path / "r.html").read_text()
    tables = Page(text).tables
    assert len(tables["Accuracy by class"][0]) == 1 + min(classes, 20)
    assert len(tables["Where KA changes the teacher"][1]) <= 21
    assert len(text) < 1_000_000
    if classes == 1000:
        shares = [float(row[1].rstrip("%")) for row in tables["Accuracy by class"][0][1:]]
        assert shares == sorted(shares)
        assert "The 12 most confused of 1,000 classes." in Page(text).text


@pytest.mark.parametrize("kind", ["float", "many channels", "PIL", "palette"])
def test_pictures_of_every_kind_are_shown(kind: str) -> None:
    pixels = torch.arange(5 * 6 * 8, dtype=torch.float32).view(5, 6, 8)
    kinds: dict[str, Picture] = {
        "float": pixels[:1] / 100 - 1,
        "many channels": pixels,
        "PIL": Image.new("CMYK", (900, 300)),
        "palette": Image.new("P", (8, 6)),
    }
    picture = kinds[kind]
    (source,) = Page(render("", [SampleGrid([Sample(picture, ["one"])])])).sources
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        assert image.size == ((192, 64) if kind == "PIL" else (8, 6))
        if isinstance(picture, torch.Tensor):
            assert np.asarray(image).ravel()[[0, -1]].tolist() == [0, 255]


def test_a_picture_of_dozens_of_groups_has_room_for_their_names(tmp_path: Path) -> None:
    rows: list[Row] = [{"loss": 1.0}, {"loss": 0.5}]
    chart = draw_lines([Line(place, f"group {place}", rows) for place in range(36)], {"loss": "-"}, "loss", "loss")
    assert isinstance(chart, Chart)
    texts = _texts(as_svg(chart))
    assert all(f"group {place}" in texts for place in range(36))
    axes = chart.figure.axes[0].get_position()
    assert axes.height * chart.figure.get_figheight() > 1.5
    strokes = {(line.get_color(), str(line.get_linestyle())) for line in chart.figure.axes[0].lines}
    assert len(strokes) == 36
    assert save_png(draw_where_wrong([("none", (0, 0, 0))], "ka"), tmp_path).stat().st_size > 0


# Mistakes.


def test_runs_of_different_data_sets_are_refused(work: Work, tmp_path: Path) -> None:
    path, _ = recipe(tmp_path, NAMES, seed=1)
    ok("train-student", path, "--loss", "ce", "--set", "student.train.epochs=1", "-o", tmp_path / "run")
    out = tmp_path / "r.html"
    assert "different data sets" in refused(4, "report", tmp_path / "run", work.runs("kd")[0], "-o", out)
    assert "no sample of mine1/train is in" in refused(
        4, "report", tmp_path / "run", "--cache", work.cache.path, "-o", out
    )
    (tmp_path / "mine1.npz").unlink()
    assert "name different data sets" in refused(4, "report", tmp_path / "run", work.runs("kd")[0], "-o", out)
    assert "none of the runs was trained from" in refused(
        4, "report", tmp_path / "run", "--cache", work.cache.path, "-o", out
    )
    assert not out.exists()


def test_what_is_no_run_is_refused(work: Work, tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    assert "run folder not found" in refused(2, "report", tmp_path / "none", "-o", out)
    (tmp_path / "sweep" / "loss=kd" / "seed0.partial").mkdir(parents=True)
    (tmp_path / "sweep" / "loss=kd" / "point.json").write_text("{}")
    assert "is finished" in refused(2, "report", tmp_path / "sweep", "-o", out)
    shutil.copytree(work.runs("kd")[0], tmp_path / "sweep" / "loss=kd" / "seed1")
    ok("report", tmp_path / "sweep", "-o", tmp_path / "half.html")
    assert "seed0.partial is not finished" in (tmp_path / "half.html").read_text()
    (tmp_path / "sweep" / "loss=kd" / "seed1" / "metrics.csv").write_text("epoch,loss\n1,x\n")
    assert "cannot read the metrics" in refused(5, "report", tmp_path / "sweep", "-o", out)
    assert "exists" in refused(2, "report", work.runs("kd")[0], "-o", tmp_path / "half.html")
    assert "does not exist" in refused(2, "report", work.runs("kd")[0], "-o", tmp_path / "no" / "r.html")
    assert not out.exists()


# In a browser.


def browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        reason = f"no browser is here: none of {', '.join(names)}"
        if os.environ.get("KDCACHE_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


WIDTHS = (390, 1280)
# A window cannot be as narrow as a phone; a frame in it can, and its page takes it for the screen.
ROOM = """<!doctype html><title>room</title>
{frames}
<pre></pre>
<script>
addEventListener("load", () => {{
  const told = [...document.querySelectorAll("iframe")].map(frame => {{
    const inner = frame.contentWindow, page = inner.document.documentElement;
    const colors = selector => [...inner.document.querySelectorAll(selector)].map(
      found => {{ const it = inner.getComputedStyle(found); return [it.color, it.backgroundColor, it.fill]; }}
    );
    const widest = [...inner.document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().right);
    return {{width: inner.innerWidth, scroll: page.scrollWidth, body: colors("body")[0], texts: colors("svg text"),
             widest: Math.max(...widest), images: [...inner.document.images].map(image => image.naturalWidth)}};
  }});
  document.querySelector("pre").textContent = JSON.stringify(told);
}});
</script>"""


def look(room: Path, *options: str) -> tuple[str, str]:
    """(the document as it is in the end, what the browser logged)."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    folder = f"--user-data-dir={room.parent / 'profile'}"
    command = [browser(), *flags, folder, "--virtual-time-budget=5000", *options, "--dump-dom", room.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    return done.stdout, done.stderr


def luminance(color: str) -> float:
    """Of `rgb(r, g, b)`, by WCAG."""
    parts = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser_it_is_legible_and_says_nothing_to_the_console(dark: bool, work: Work, tmp_path: Path) -> None:
    frames = "\n".join(f'<iframe width="{width}" srcdoc="{html.escape(work.html)}"></iframe>' for width in WIDTHS)
    (tmp_path / "room.html").write_text(ROOM.format(frames=f"<style>iframe {{border: 0}}</style>{frames}"))
    document, log = look(tmp_path / "room.html", "--window-size=1400,900", *(["--force-dark-mode"] if dark else []))
    assert "CONSOLE" not in log, log
    told = json.loads(html.unescape(document.partition("<pre>")[2].partition("</pre>")[0]))
    for width, page in zip(WIDTHS, told, strict=True):
        assert page["width"] == width
        assert page["scroll"] <= width
        assert page["widest"] <= width
        assert page["images"] == [4] * 16
        text, back, _ = page["body"]
        assert (luminance(text) > luminance(back)) is dark
        assert contrast(text, back) > 7
        assert len(page["texts"]) > 100
        assert all(contrast(fill, back) > 3 for _, _, fill in page["texts"])


def test_the_look_in_a_browser_would_notice(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        ROOM.format(
            frames='<iframe width="390" srcdoc="<p style=\'width: 900px\'>x</p>"></iframe><script>no()</script>'
        )
    )
    document, log = look(bad)
    assert "CONSOLE" in log
    assert json.loads(document.partition("<pre>")[2].partition("</pre>")[0])[0]["scroll"] > 390
