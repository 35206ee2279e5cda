"""Class folders as people have them: hidden files, loops, missing classes, other extensions, names of other codes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers.forked import captured, command
from helpers.networks import linear_teacher
from PIL import Image
from torchvision import datasets as tv

from kdcache import load_split
from kdcache.data.images import FileImages
from kdcache.data.samples import Samples, Split
from kdcache.errors import MismatchError, UsageError


def draw(path: Path, seed: int = 0, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)).save(path, kind)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee", "cat")):
            for index in range(3):
                draw(tmp_path / split / name / f"{index}.png", 10 * label + index)
    return tmp_path


def load(root: Path, split: Split = "train") -> Samples:
    return load_split("image-folder", split, root=root, validation_fraction=0, test_fraction=0)


def paths(samples: Samples) -> list[str]:
    assert isinstance(samples.images, FileImages)
    return list(samples.images.paths)


def test_nested_folders_are_in_the_order_of_torchvision(root: Path) -> None:
    for name in (
        "ant/z/0.png",
        "ant/a b/1.PNG",
        "ant/a/0.jpg",
        "ant/a.png",
        "bee/-/x.webp",
        "bee/A/0.bmp",
        "ant/a!/2.png",
    ):
        draw(root / "train" / name, 0, {"jpg": "JPEG", "webp": "WEBP", "bmp": "BMP"}.get(name[-3:].strip("."), "PNG"))
    (root / "train" / "cat" / "more").symlink_to(root / "val" / "cat")
    expected = tv.ImageFolder(str(root / "train"))
    samples = load(root)
    assert paths(samples) == [path for path, _ in expected.samples]
    assert samples.labels.tolist() == expected.targets


@pytest.mark.parametrize(
    "stray",
    [".ipynb_checkpoints/0.png", "ant/.ipynb_checkpoints/0-checkpoint.png", "ant/._0.png", "ant/Thumbs.db",
     "ant/.DS_Store", "bee/desktop.ini", "__MACOSX/ant/0.png", "@eaDir/0.png", ".git/config"],
)  # fmt: skip
def test_hidden_and_system_files_are_left_out_with_a_note(stray: str, root: Path) -> None:
    before = {split: paths(load(root, split)) for split in ("train", "validation")}
    for split in ("train", "val"):
        path = root / split / stray
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert {split: paths(load(root, split)) for split in before} == before  # type: ignore[arg-type]
    samples = load(root)
    assert samples.class_names == ("ant", "bee", "cat")
    assert samples.notes == (f"1 hidden or system files and folders in {root}/train are left out",)


def test_a_split_may_lack_classes_and_has_the_labels_of_train(root: Path) -> None:
    for index in range(3):
        (root / "val" / "ant" / f"{index}.png").unlink()
    (root / "val" / "ant").rmdir()
    for index in range(3):
        (root / "val" / "bee" / f"{index}.png").unlink()
    samples = load(root, "validation")
    assert samples.class_names == ("ant", "bee", "cat")
    assert samples.labels.tolist() == [2, 2, 2]
    assert samples.notes == (f"{root}/val has no images of 2 of 3 classes: ant, bee",)


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_with_more_classes_is_refused(split: str, root: Path) -> None:
    draw(root / split / "dog" / "0.png")
    draw(root / split / "ant" / "0.png")
    name: Split = "validation" if split == "val" else "test"
    with pytest.raises(MismatchError, match=f"{root}/{split} has other class folders than {root}/train: dog") as caught:
        load(root, name)
    assert "its folders are the classes" in caught.value.fix


@pytest.mark.parametrize("target", ["..", "../..", ".", "../ant"])
def test_a_link_that_loops_is_left_out_with_a_note(target: str, root: Path) -> None:
    before = paths(load(root))
    (root / "train" / "ant" / "loop").symlink_to(target)
    samples = load(root)
    assert paths(samples) == before
    assert samples.notes == (f"links to a folder that they are in are left out: {root}/train/ant/loop",)


def test_links_to_each_other_and_to_themselves_end(root: Path) -> None:
    (root / "train" / "ant" / "b").symlink_to("../bee")
    (root / "train" / "bee" / "a").symlink_to("../ant")
    (root / "train" / "cat" / "itself").symlink_to("itself")
    (root / "train" / "again").symlink_to(".")
    samples = load(root)
    assert samples.class_names == ("ant", "bee", "cat")
    assert samples.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 3


def test_files_that_other_libraries_write_are_read(root: Path) -> None:
    kinds = {"a.gif": "GIF", "a.jfif": "JPEG", "a.JPE": "JPEG", "a.avif": "AVIF", "a.JPEG": "JPEG", "a.Tga": "TGA"}
    for name, kind in kinds.items():
        draw(root / "train" / "ant" / name, 0, kind)
    samples = load(root)
    names = [Path(path).name for path in paths(samples)]
    assert set(kinds) <= set(names)
    assert samples.notes == ()
    for name in kinds:
        picture = samples.images.picture(names.index(name))
        assert picture.size == (5, 6)


def test_what_cannot_be_read_is_counted_by_extension(root: Path) -> None:
    for name in ("a.svg", "b.svg", "a.CR2", "labels.csv", "README", "a.npy"):
        (root / "train" / "bee" / name).write_bytes(b"x")
    assert load(root).notes == (
        f"images in {root}/train that Pillow cannot read are left out: 1 .cr2, 2 .svg",
        f"files in {root}/train that are not images are left out: 1 .csv, 1 .npy, 1 without extension",
    )


def test_heic_files_name_their_plug_in_where_it_is_missing(root: Path) -> None:
    pytest.importorskip("PIL")
    (root / "train" / "bee" / "a.heic").write_bytes(b"x")
    try:
        import pillow_heif  # type: ignore[import-not-found]  # noqa: F401  # not a dependency
    except ImportError:
        assert "1 .heic (to read them: pip install pillow-heif)" in load(root).notes[0]
    else:
        assert load(root).notes == ()


@pytest.mark.parametrize("content", [(), ("a.heic", "b.svg"), ("notes.txt",)])
def test_a_class_without_images_is_named_with_what_it_has(content: tuple[str, ...], root: Path) -> None:
    for name in ("dog", "eel"):
        (root / "train" / name).mkdir()
        for file in content:
            (root / "train" / name / file).write_bytes(b"x")
    with pytest.raises(UsageError, match="no image was found for the classes dog") as caught:
        load(root)
    assert "eel" in caught.value.what
    assert all(Path(name).suffix in caught.value.what + caught.value.fix for name in content)


def test_names_that_are_not_utf_8_are_dumped_verified_trained_and_evaluated(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9j\xe0"))
    for label, name in enumerate((b"caf\xe9", b"zo\xff")):
        for index in range(6):
            draw(folder / "train" / os.fsdecode(name) / os.fsdecode(b"\xe9%d.JPG" % index), 10 * label + index, "JPEG")
    (tmp_path / "t.py").write_text(linear_teacher(90))
    (tmp_path / "p.yaml").write_text(
        "dataset: {name: image-folder, root: $FLOWERS, validation_fraction: 0.2, test_fraction: 0.2}\n"
        "transform: [ToImage: {}, ToDtype: {dtype: float32, scale: true}]\n"
        f"teacher: {{model: '{tmp_path}/t.py:make'}}\n"
        "student: {model: 'small:mlp', train: {epochs: 1}}\n"
    )
    out = os.fsencode(folder)

    def run(*words: bytes) -> str:
        environment = {"FLOWERS": os.fsdecode(out)}
        done = captured(command, *map(os.fsdecode, words), cwd=tmp_path, environment=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    cpu = (b"--device", b"cpu")
    run(b"dump-teacher", b"p.yaml", b"-o", out + b"/c.kdcache", *cpu)
    assert "all 8" in run(b"verify", out + b"/c.kdcache", b"p.yaml", b"--replay").replace("8 images are those", "all 8")
    run(b"train-student", b"p.yaml", b"--cache", out + b"/c.kdcache", b"-o", out + b"/run", *cpu)
    assert r"d\xe9j\xe0" in run(b"train-teacher", b"p.yaml", b"-o", out + b"/teacher", *cpu)
    run(b"evaluate", out + b"/run", *cpu)
    assert r"caf\\xe9" in run(b"info", out + b"/c.kdcache", b"--json")
