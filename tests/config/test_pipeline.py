"""Pipeline files: what is right reads back unchanged, and all that is wrong is said at once, each with its place."""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.config.cache import CacheSpec
from kdcache.config.loader import load_pipeline
from kdcache.config.schema import (
    DatasetSpec,
    EnsembleSpec,
    MemberSpec,
    Pipeline,
    StudentSpec,
    TeacherSpec,
    TrainSpec,
)
from kdcache.errors import UsageError
from kdcache.runtime.package_data import package_data

NAMES = ["ce", "kd", "dtkd", "ka", "dtd", "ka+dtd", "dtkd+ka"]


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(folder: Path, text: str | bytes, *overrides: str) -> str:
    """The message about a pipeline, with the folder taken out of the paths."""
    with pytest.raises(UsageError) as caught:
        load_pipeline(written(folder, text), overrides)
    assert caught.value.exit_code == 2
    assert caught.value.fix
    return caught.value.what.replace(f"{folder}/", "")


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    """The problems that the message lists, one per line, with their number in its first line."""
    first, *rest = refusal(folder, text, *overrides).split("\n  ")
    assert first == ("1 problem in the pipeline:" if len(rest) == 1 else f"{len(rest)} problems in the pipeline:")
    return rest


# What is right


def test_the_recipe_says_what_its_yaml_says() -> None:
    path = package_data("pipelines/digits.yaml")
    said = yaml.safe_load(path.read_text())
    read = load_pipeline(path)
    assert read.dataset.name == said["dataset"]["name"] == "digits"
    for who in ("teacher", "student"):
        section = read.section(who)
        assert (section.model, section.args) == (said[who]["model"], said[who]["args"])
        for key, value in said[who]["train"].items():
            assert getattr(section.train, key) == value
    assert read.section("teacher").weights == said["teacher"]["weights"]
    assert read.cache.top_k == said["cache"]["top_k"]
    assert read.loss.name == said["loss"]["name"]


text = st.text(max_size=20) | st.sampled_from(
    ["1e-3", "1E5", "-2e+7", "yes", "null", "~", "0x1f", "2001-01-01", "1:30"]
)
word = st.text(string.ascii_lowercase, min_size=1, max_size=8)
value = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text
fraction = st.floats(0, 0.49)
trains = st.builds(
    TrainSpec,
    epochs=st.integers(1, 500),
    lr=st.floats(0, 10, exclude_min=True),
    momentum=st.floats(0, 1, exclude_max=True),
    schedule=st.sampled_from(["constant", "cosine"]),
    labels_per_class=st.none() | st.integers(0, 100),
    seed=st.integers(0, 2**32 - 1),
)
networks = {"model": text, "args": st.dictionaries(word, value, max_size=3), "weights": st.none() | text}
models = {**networks, "train": trains}
chosen = {
    "model": st.sampled_from(["timm:a@b", "torchvision:a@b"]),
    "classes": text | st.lists(st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=4),
}
members = st.builds(MemberSpec, **networks, weight=st.floats(0, 9, exclude_min=True)) | st.builds(MemberSpec, **chosen)
ensembles = st.builds(
    EnsembleSpec,
    ensemble=st.lists(members, min_size=1, max_size=3),
    combine=st.sampled_from(["logits", "probabilities"]),
)
pipelines = st.builds(
    Pipeline,
    dataset=st.builds(
        DatasetSpec, name=st.just("npz"), root=text, validation_fraction=fraction, test_fraction=fraction
    ),
    transform=st.none()
    | st.lists(st.dictionaries(word, st.dictionaries(word, value, max_size=2), max_size=2), max_size=2),
    teacher=st.none() | st.builds(TeacherSpec, **models) | st.builds(TeacherSpec, **chosen) | ensembles,
    cache=st.builds(CacheSpec, top_k=st.integers(1, 10**6) | st.just("all"), license=text, notes=text),
    student=st.none() | st.builds(StudentSpec, **models),
    loss=st.builds(dict, name=st.sampled_from(NAMES), ce_weight=st.floats(0.1, 9)),
)


@settings(deadline=None)
@given(pipeline=pipelines)
def test_the_resolved_file_reads_back_to_the_same_pipeline(
    pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.getbasetemp(), pipeline.to_yaml())
    assert load_pipeline(path) == pipeline


def test_the_resolved_file_keeps_line_breaks_that_yaml_has_and_others_have_not(tmp_path: Path) -> None:
    notes = "a\x85b\u2028c äöü"
    pipeline = Pipeline.model_validate({"dataset": {"name": "digits"}, "cache": {"notes": notes}})
    assert load_pipeline(written(tmp_path, pipeline.to_yaml())).cache.notes == notes


def test_the_resolved_file_spells_out_every_default(tmp_path: Path) -> None:
    short = load_pipeline(written(tmp_path, "dataset: {name: digits}\nstudent: {model: small:cnn}\n"))
    resolved = yaml.safe_load(short.to_yaml())
    assert set(resolved) == set(Pipeline.model_fields)
    assert set(resolved["student"]["train"]) == set(TrainSpec.model_fields)
    assert set(resolved["cache"]) == set(CacheSpec.model_fields)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.0e-3", "0.001", "+1e-3", "10e-4"])
def test_a_learning_rate_may_be_written_as_everybody_writes_it(number: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"dataset: {{name: digits}}\nteacher: {{model: small:cnn, train: {{lr: {number}}}}}\n")
    assert load_pipeline(path).section("teacher").train.lr == pytest.approx(0.001, rel=1e-15)
    read = load_pipeline(path, [f"teacher.train.lr={number}"])
    assert read.section("teacher").train.lr == pytest.approx(0.001, rel=1e-15)


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "dataset: {name: digits}\n"
        "teacher: {model: small:cnn, train: &train {epochs: 7, lr: 0.2}}\n"
        "student: {model: small:mlp, train: {<<: *train, lr: 0.1}}\n",
    )
    train = load_pipeline(path).section("student").train
    assert (train.epochs, train.lr) == (7, 0.1)


def test_a_section_that_is_needed_and_missing_is_named(tmp_path: Path) -> None:
    pipeline = load_pipeline(written(tmp_path, "dataset: {name: digits}"))
    with pytest.raises(UsageError, match="no 'student' section\nfix: add one, such as student:"):
        pipeline.section("student")
    with pytest.raises(UsageError, match="no 'teacher' section\nfix: add one, such as teacher:"):
        _ = pipeline.members


@pytest.mark.parametrize(
    ("teacher", "models", "weights", "combine"),
    [
        ("[a.py:f, timm:b@c]", ["a.py:f", "timm:b@c"], [1, 1], "logits"),
        ("[{model: a, weight: 2}, b]", ["a", "b"], [2, 1], "logits"),
        ("{ensemble: [a, {model: b, weight: 0.5}]}", ["a", "b"], [1, 0.5], "logits"),
        ("{ensemble: [a], combine: probabilities}", ["a"], [1], "probabilities"),
    ],
)
def test_several_teachers_are_a_list_or_an_ensemble(
    teacher: str, models: list[str], weights: list[float], combine: str, tmp_path: Path
) -> None:
    pipeline = load_pipeline(written(tmp_path, f"dataset: {{name: digits}}\nteacher: {teacher}\n"))
    assert isinstance(pipeline.teacher, EnsembleSpec)
    assert [member.model for member in pipeline.members] == models
    assert [member.weight for member in pipeline.teacher.ensemble] == weights
    assert pipeline.teacher.combine == combine


def test_one_teacher_is_its_own_member(tmp_path: Path) -> None:
    pipeline = load_pipeline(written(tmp_path, "dataset: {name: digits}\nteacher: {model: a}\n"))
    assert pipeline.members == [pipeline.teacher] == [pipeline.section("teacher")]


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("[a, b]", "the teacher is an ensemble of 2, and one network is trained at a time\nfix: train each"),
        ("{model: timm:a@b, classes: [1]}", "teacher.classes selects .* already trained\nfix: .* remove `classes`"),
    ],
)
def test_a_teacher_that_cannot_be_trained_is_no_section_for_it(teacher: str, words: str, tmp_path: Path) -> None:
    pipeline = load_pipeline(written(tmp_path, f"dataset: {{name: digits}}\nteacher: {teacher}\n"))
    with pytest.raises(UsageError, match=words):
        pipeline.section("teacher")


# What is wrong


def test_every_problem_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "dataset:\n"
        "  name: digits\n"
        "  root: elsewhere\n"
        "  validation_fraction: 0.6\n"
        "  test_fraction: 0.5\n"
        "  color: blue\n"
        "transform: [{ToImage: {}}, {Resize: 3}]\n"
        "teacher:\n"
        "  train:\n"
        "    milestones: [3]\n"
        "    epochs: ten\n"
        "cache:\n"
        "  top_k: some\n"
        "  topk: 1\n"
        "  seed: -1\n"
        "student: small:cnn\n"
        "loss:\n"
        "  name: dtkd+dtd\n"
        "extra: 1\n",
    )
    assert sorted(found) == sorted(
        [
            "mine.yaml:3: dataset.root: digits comes with kdcache and has no root",
            "mine.yaml:4: dataset.validation_fraction: 0.6 and test_fraction 0.5 leave nothing to train on",
            "mine.yaml:6: dataset.color: unknown key",
            "mine.yaml:7: transform.1.Resize: Input should be a valid dictionary",
            "mine.yaml:8: teacher.model: is required",
            "mine.yaml:10: teacher.train.milestones: belong to schedule: multistep, which needs at least one",
            "mine.yaml:11: teacher.train.epochs: Input should be a valid integer",
            "mine.yaml:13: cache.top_k: Input should be a valid integer or Input should be 'all' or 'auto'",
            "mine.yaml:14: cache.topk: unknown key, did you mean top_k?",
            "mine.yaml:15: cache.seed: Input should be greater than or equal to 0",
            "mine.yaml:16: student: must have keys of its own",
            "mine.yaml:18: loss.name: loss 'dtkd+dtd' chooses the same thing twice: take one of dtkd and dtd",
            "mine.yaml:19: extra: unknown key",
        ]
    )


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("dataset: {name: mnist}", "dataset.name: Input should be 'digits'"),
        ("dataset: {root: x}", "dataset.name: is required"),
        ("dataset: {name: npz}", "dataset.root: is needed for npz"),
        ("dataset: {name: image-folder}", "dataset.root: is needed for image-folder"),
        ("dataset: {name: npz, root: 3}", "dataset.root: Input should be a valid string"),
        (
            "dataset: {name: imagenet, validation_fraction: 1.0}",
            "dataset.validation_fraction: Input should be less than 1",
        ),
        (
            "dataset: {name: imagenet, test_fraction: -0.1}",
            "dataset.test_fraction: Input should be greater than or equal to 0",
        ),
        ("dataset: {name: imagenet, test_fraction: .nan}", "dataset.test_fraction: Input should be"),
        ("dataset: null", "dataset: must have keys of its own"),
        ("teacher: {model: x, train: {schedule: multistep}}", "teacher.train.milestones: belong to schedule"),
        ("teacher: {model: x, train: {lr: 0}}", "teacher.train.lr: Input should be greater than 0"),
        ("teacher: {model: x, train: {lr: .inf}}", "teacher.train.lr: Input should be a finite number"),
        ("teacher: {model: x, train: {lr: '0.1'}}", "teacher.train.lr: Input should be a valid number"),
        ("teacher: {model: x, train: {epochs: 0}}", "teacher.train.epochs: Input should be greater than or equal to 1"),
        ("teacher: {model: x, train: {epochs: true}}", "teacher.train.epochs: Input should be a valid integer"),
        ("teacher: {model: x, train: {epochs: 1.5}}", "teacher.train.epochs: Input should be a valid integer"),
        ("teacher: {model: x, train: {seed: 4294967296}}", "teacher.train.seed: Input should be less than 4294967296"),
        ("teacher: {model: x, args: [1]}", "teacher.args: Input should be a valid dictionary"),
        ("teacher: small:cnn", "teacher: must have keys of its own"),
        ("teacher: []", "teacher: List should have at least 1 item"),
        ("teacher: [small:cnn, 3]", "teacher.1: must have keys of its own"),
        ("teacher: [{weight: 2}]", "teacher.0.model: is required"),
        ("teacher: [{model: x, weight: 0}]", "teacher.0.weight: Input should be greater than 0"),
        ("teacher: [{model: x, wieght: 2}]", "teacher.0.wieght: unknown key, did you mean weight?"),
        ("teacher: [{model: x, train: {}}]", "teacher.0.train: unknown key"),
        ("teacher: {model: x, weight: 2}", "teacher.weight: unknown key"),
        ("teacher: {ensemble: small:cnn}", "teacher.ensemble: Input should be a valid list"),
        ("teacher: {ensemble: [x], combine: mean}", "teacher.combine: Input should be 'logits' or 'probabilities'"),
        ("teacher: {combine: logits}", "teacher.ensemble: is required"),
        ("teacher: {model: x, outputs: 3}", "teacher.outputs: belongs to classes"),
        ("teacher: {model: small:cnn, classes: [1]}", "teacher.outputs: is needed with classes"),
        ("teacher: [{model: small:cnn, classes: x.txt}]", "teacher.0.outputs: is needed with classes"),
        ("teacher: {model: timm:a@b, classes: [1], outputs: 3}", "teacher.outputs: cannot be set: timm:a@b has"),
        (
            "teacher: {model: timm:a@b, classes: 3}",
            "classes: Input should be a valid list or Input should be a valid s",
        ),
        ("teacher: {model: timm:a@b, classes: [1, -1]}", "teacher.classes.1: Input should be greater than or equal to"),
        ("teacher: {model: timm:a@b, classes: [1, [2, x]]}", "teacher.classes.1.1: Input should be a valid integer"),
        ("teacher: {model: timm:a@b, classes: [1, []]}", "teacher.classes.1: Input should be a valid integer or List"),
        ("student: {model: x, classes: [1]}", "student.classes: unknown key"),
        ("student: [x]", "student: must have keys of its own"),
        ("transform: Resize", "transform: Input should be a valid list"),
        ("cache: {dtype: int8}", "cache.dtype: Input should be 'uint8', 'float16' or 'float32'"),
        ("cache: {tail: fitted}", "cache.tail: Input should be 'lowrank' or 'uniform'"),
        ("cache: {views: 0}", "cache.views: Input should be greater than or equal to 1"),
        ("loss: {name: kd, tau: 4}", "loss.tau: unknown key"),
        ("loss: {name: kdd}", "loss.name: unknown loss 'kdd', did you mean kd?"),
        ("loss: {temperature: {kind: dtkd, tao: 4}}", "loss.temperature.tao: unknown key"),
        ("loss: {temperature: {kind: hot}}", "loss.temperature: "),
        ("loss: {temperature: {kind: constant, low: 1}}", "loss.temperature.low: unknown key: low belongs to another"),
        ("loss: {controller: {kind: tgeo, low: 1}}", "loss.controller.low: unknown key: low belongs to another kind"),
        (
            "loss: {features: {name: mse, angle_weight: 2}}",
            "unknown key: angle_weight belongs to another kind",
        ),
        ("loss: {features: {name: rkd, angle_wight: 2}}", "angle_wight: unknown key, did you mean angle_weight?"),
        ("loss: {controller: tgeo}", "loss.controller: 'tgeo' is not a mapping, did you mean {kind: tgeo}?"),
        ("loss: {controller: 3}", "loss.controller: 3 is not a mapping, did you mean {kind: tgeo}?"),
        ("loss: {gate: true}", "loss.gate: True is not a mapping, did you mean {}?"),
        ("student: {model: x, train: {model: y}}", "student.train.model: unknown key, did you mean student.model?"),
        ("loss: {name: ce, temperature: {kind: dtkd}}", "loss: the kd weights are 0"),
        ("1: 2", "Keys should be strings"),
    ],
)
def test_what_cannot_be_is_refused_at_its_line(section: str, words: str, tmp_path: Path) -> None:
    before = "" if section.startswith("dataset") else "dataset: {name: digits}\n"
    (found,) = problems(tmp_path, before + section)
    assert words in found
    assert found.startswith(f"mine.yaml:{1 + before.count(chr(10))}: " if "Keys" not in words else "mine.yaml:1: ")


def test_an_empty_file_lacks_its_data_set(tmp_path: Path) -> None:
    for nothing in ("", "# only a remark\n", "---\n", "null"):
        (found,) = problems(tmp_path, nothing)
        assert found.endswith("dataset: is required")


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ("dataset: [digits\n", "not valid YAML: while parsing a flow sequence"),
        ("dataset:\n\tname: digits\n", "not valid YAML: .* '\\\\t' .* line 2"),
        ("dataset: {name: digits}\ncache: {seed: 1}\ncache: {seed: 2}\n", "the key 'cache' is given twice .* line 3"),
        ("dataset: {name: digits, name: npz}\n", "the key 'name' is given twice .* line 1"),
        ("dataset: {? [1, 2] : digits}\n", "a key is not a word .* line 1"),
        ("dataset: {name: digits}\n---\ndataset: {name: npz}\n", "expected a single document"),
        ("- dataset\n", "holds a list, not sections"),
        ("digits\n", "holds a str, not sections"),
        ("dataset: !!python/object/apply:os.system ['true']\n", "could not determine a constructor .*python/object"),
        ("dataset: !!python/name:os.system\n", "could not determine a constructor"),
        ("dataset: {name: 2001-13-45}\n", "not valid YAML: month must be in 1..12"),
        ("dataset: {name: !!int many}\n", "not valid YAML: invalid literal"),
        ("dataset: {name: !!bool perhaps}\n", "not valid YAML: 'perhaps'"),
        ("dataset: &a {name: *a}\n", "not valid YAML: .*recursion"),
        pytest.param("dataset: " + "[" * 9_000, "not valid YAML: .*recursion", id="a list in a list in a list ..."),
        pytest.param("dataset: " + "{a: " * 9_000, "not valid YAML: .*recursion", id="a key in a key in a key ..."),
        (b"dataset: {name: \xff}\n", "not UTF-8 text"),
        (b"dataset: {name: \x00}\n", "not valid YAML: unacceptable character"),
    ],
)
def test_what_is_no_pipeline_file_is_refused(held: str | bytes, words: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, held)
    assert "mine.yaml" in message
    assert re.search(words, message), message
    assert "\n" not in message


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    for tag in ("python/object/apply:os.system", "python/object/new:os.system"):
        refusal(tmp_path, f"dataset: !!{tag} ['touch {touched}']\n")
        refusal(tmp_path, "dataset: {name: digits}", f"cache.notes=!!{tag} ['touch {touched}']")
    assert not touched.exists()


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the pipeline .*nowhere.yaml: No such file"):
        load_pipeline(tmp_path / "nowhere.yaml")
    with pytest.raises(UsageError, match=r"cannot read the pipeline .*: Is a directory"):
        load_pipeline(tmp_path)


@settings(deadline=None)
@given(held=st.text(max_size=60) | st.text("{}[]:,-!&*?|> \n'\"%@`#ab1.", max_size=60) | st.binary(max_size=60))
def test_whatever_a_file_holds_a_bad_one_is_one_message(held: str | bytes, tmp_path_factory: Any) -> None:
    refusal(tmp_path_factory.getbasetemp(), held)


# --set

GOOD = "dataset: {name: digits}\nteacher: {model: small:cnn, args: {width: 8}}\n"


def test_set_replaces_and_adds_values_of_every_type(tmp_path: Path) -> None:
    pipeline = load_pipeline(
        written(tmp_path, GOOD),
        [
            "cache.top_k=5",
            "cache.notes=two words = one note",
            "teacher.train.nesterov=false",
            "teacher.train.labels_per_class=null",
            "teacher.args.width=16",
            "teacher.args.deep.inside=[1, {a: 2.5}]",
            "student={model: small:mlp, train: {epochs: 3}}",
            "student.train.lr=0.5",
            "loss.name=ka+dtd",
            "cache.top_k=7",
        ],
    )
    assert pipeline.cache.top_k == 7
    assert pipeline.cache.notes == "two words = one note"
    teacher, student = pipeline.section("teacher"), pipeline.section("student")
    assert teacher.train.nesterov is False
    assert teacher.train.labels_per_class is None
    assert teacher.args == {"width": 16, "deep": {"inside": [1, {"a": 2.5}]}}
    assert (student.model, student.train.epochs, student.train.lr) == ("small:mlp", 3, 0.5)
    assert pipeline.loss.adjustment.kind == "probability_shift"


def test_set_reaches_into_lists(tmp_path: Path) -> None:
    text = "dataset: {name: digits}\ntransform: [{Resize: {size: 32}}]\nteacher: [small:cnn, {model: small:mlp}]\n"
    overrides = ["teacher.1.weights=x", "teacher.1.args.width=4", "teacher.0={model: a, weight: 2}"]
    pipeline = load_pipeline(written(tmp_path, text), [*overrides, "transform.0.Resize.size=64"])
    assert pipeline.members == [
        MemberSpec(model="a", weight=2),
        MemberSpec(model="small:mlp", args={"width": 4}, weights="x"),
    ]
    assert pipeline.transform == [{"Resize": {"size": 64}}]
    (found,) = problems(tmp_path, text, "teacher.1.weight=much")
    assert found == "--set teacher.1.weight=much: teacher.1.weight: Input should be a valid number"


def test_set_changes_one_of_the_places_of_an_anchor(tmp_path: Path) -> None:
    text = (
        "dataset: {name: digits}\nteacher: {model: a, train: &train {epochs: 7}}\nstudent: {model: b, train: *train}\n"
    )
    pipeline = load_pipeline(written(tmp_path, text), ["student.train.epochs=9"])
    assert (pipeline.section("teacher").train.epochs, pipeline.section("student").train.epochs) == (7, 9)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cache.top_k", "--set 'cache.top_k' is not KEY=VALUE"),
        ("=5", "--set '=5' is not KEY=VALUE"),
        ("cache..top_k=5", "--set 'cache..top_k=5' is not KEY=VALUE"),
        (".cache=5", "is not KEY=VALUE"),
        ("dataset.name.first=5", "--set dataset.name.first=5: 'name' is a value and has no keys"),
        ("eval_transform.1.Resize=5", "--set eval_transform.1.Resize=5: 'eval_transform' is a list of 1, without '1'"),
        ("eval_transform.Resize=5", "'eval_transform' is a list of 1, without 'Resize'"),
        ("eval_transform.-1=5", "'eval_transform' is a list of 1, without '-1'"),
        ("eval_transform.²=5", "'eval_transform' is a list of 1, without '²'"),
        ("transform.0=5", "'transform' is a list of 0, without '0'"),
        ("cache.notes=[", "--set cache.notes=[ is not valid YAML: while parsing"),
        ("cache.notes=2001-99-99", "--set cache.notes=2001-99-99 is not valid YAML: month"),
        pytest.param("cache.notes=" + "[" * 9_000, "is not valid YAML: maximum recursion", id="nested lists"),
        ("cache={seed: 1, seed: 2}", "the key 'seed' is given twice"),
    ],
)
def test_a_set_that_cannot_be_read_is_refused(override: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path, GOOD + "transform: []\neval_transform: [{RGB: {}}]\n", override)


def test_a_problem_that_set_made_is_told_as_its_own(tmp_path: Path) -> None:
    overrides = (
        "cache.dtype=f",
        "a.b=3",
        "teacher={model: x, foo: 1, train: {schedule: multistep}}",
        "student.train.lr=high",
        "cache.license=",
    )
    assert sorted(problems(tmp_path, GOOD + "cache: {views: -5}\n", *overrides)) == sorted(
        [
            "--set cache.dtype=f: cache.dtype: Input should be 'uint8', 'float16' or 'float32'",
            "--set a.b=3: a: unknown key",
            "--set teacher={model: x, foo: 1, train: {schedule: multistep}}: teacher.foo: unknown key",
            "--set teacher={model: x, foo: 1, train: {schedule: multistep}}: teacher.train.milestones: "
            "belong to schedule: multistep, which needs at least one",
            "--set student.train.lr=high: student.model: is required",
            "--set student.train.lr=high: student.train.lr: Input should be a valid number",
            "--set cache.license=: cache.license: Input should be a valid string",
            "mine.yaml:3: cache.views: Input should be greater than or equal to 1",
        ]
    )


def test_a_place_in_the_file_is_forgotten_when_set_replaces_what_stood_there(tmp_path: Path) -> None:
    text = GOOD + "student:\n  model: small:cnn\n  train:\n    milestones: [3]\n    schedule: multistep\n"
    (found,) = problems(tmp_path, text, "student.train={schedule: multistep}")
    assert found.startswith("--set student.train={schedule: multistep}: student.train.milestones: belong to")


def test_what_set_mends_is_no_problem(tmp_path: Path) -> None:
    pipeline = load_pipeline(written(tmp_path, "dataset: {name: npz, root: null}"), ["dataset.root=x.npz"])
    assert pipeline.dataset.root == "x.npz"
