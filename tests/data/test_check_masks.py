"""Masks are checked before they are used: all that are wrong are named in one message, with one fix per cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cli import kdcache, ok, refused
from helpers.scenes import PIPELINE
from PIL import Image

from kdcache import KdcacheError, load_split
from kdcache.config.transform import Transform
from kdcache.data.check_images import check_images
from kdcache.data.samples import Split
from kdcache.errors import CorruptError, MismatchError, UsageError
from kdcache.runtime.progress import Silent

COUNT, HEIGHT, WIDTH = 30, 24, 32


def values(index: int) -> Any:
    return np.random.default_rng(index).integers(0, 3, (HEIGHT, WIDTH), dtype=np.uint8)


def mask(root: Path, index: int) -> Path:
    return root / "train" / "masks" / f"{index:02d}.png"


def image(root: Path, index: int) -> Path:
    return root / "train" / "images" / f"{index:02d}.png"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of images and masks."""
    for index in range(COUNT):
        for path in (image(tmp_path, index), mask(tmp_path, index)):
            path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.repeat(values(index)[:, :, None] * 80, 3, axis=2)
        Image.fromarray(pixels).save(image(tmp_path, index))
        Image.fromarray(values(index)).save(mask(tmp_path, index))
    return tmp_path


def spec(root: Path, **given: Any) -> dict[str, Any]:
    whole = {"validation_fraction": 0.0, "test_fraction": 0.0}
    return {"name": "segmentation-folder", "root": str(root), "classes": ["a", "b", "c"], **whole, **given}


def palette(path: Path) -> None:
    with Image.open(path) as opened:
        found = Image.frombytes("P", opened.size, opened.tobytes())
    found.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    found.save(path)


def color(path: Path) -> None:
    Image.open(path).convert("RGB").save(path)


def other_size(path: Path) -> None:
    Image.open(path).resize((WIDTH + 1, HEIGHT)).save(path)


def damaged(path: Path) -> None:
    path.write_text("404: not found")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def other_value(path: Path) -> None:
    changed = np.array(Image.open(path))
    changed[2, 3] = 9
    Image.fromarray(changed).save(path)


CAUSES: dict[str, tuple[Callable[[Path], None], str, str, type[KdcacheError], bool]] = {
    "palette": (palette, "is a palette image", "dataset.palettes=true", UsageError, True),
    "color": (color, "is a picture of mode RGB", "convert colors to the index", UsageError, True),
    "size": (other_size, "24 x 32 pixels (height x width), and its mask 24 x 33", "the size of", MismatchError, True),
    "damaged": (damaged, "not an image file", "replace or remove it", CorruptError, True),
    "truncated": (truncated, "truncated", "replace or remove it", CorruptError, False),
    "value": (other_value, "has the value 9 at row 2, column 3", "dataset.first_class", MismatchError, False),
}
"""Name -> change of a mask, what is said, the fix, the kind of the error, and whether the header shows it."""


@pytest.mark.parametrize("cause", CAUSES)
def test_every_cause_has_its_message_and_its_fix(cause: str, root: Path) -> None:
    change, said, fix, kind, in_header = CAUSES[cause]
    for index in (4, 21):
        change(mask(root, index))
    samples = load_split(spec(root), "train")
    if not in_header:
        assert check_images(samples, Silent()) == []
    with pytest.raises(kind) as raised:
        check_images(samples, Silent(), decode=not in_header)
    error = raised.value
    assert type(error) is kind
    assert error.what.startswith(f"2 of {COUNT} masks cannot be used:")
    lines = error.what.splitlines()[1:]
    assert [name in line for name, line in zip(("04.png", "21.png"), lines, strict=True)] == [True, True]
    assert all(said in line for line in lines)
    assert fix in error.fix and error.fix.count(fix) == 1


def test_all_causes_are_in_one_message(root: Path) -> None:
    for index, (change, *_) in enumerate(CAUSES.values()):
        change(mask(root, 3 * index))
    image(root, 20).write_bytes(b"")
    with pytest.raises(CorruptError) as raised:
        check_images(load_split(spec(root), "train"), Silent(), decode=True)
    assert f"1 of {COUNT} image files cannot be read" in raised.value.what
    assert f"{len(CAUSES)} of {COUNT} masks cannot be used" in raised.value.what
    for _, said, fix, *_ in CAUSES.values():
        assert said in raised.value.what and fix in raised.value.fix


def test_of_a_cause_that_all_masks_have_only_some_are_named(root: Path) -> None:
    for index in range(COUNT):
        palette(mask(root, index))
    with pytest.raises(UsageError) as raised:
        check_images(load_split(spec(root), "train"), Silent())
    assert len(raised.value.what.splitlines()) == 12
    assert raised.value.what.endswith(f"and {COUNT - 10} more of this kind")
    assert check_images(load_split(spec(root, palettes=True), "train"), Silent()) == []


def test_images_that_would_be_turned_without_their_masks_are_named(root: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.open(image(root, 7)).save(image(root, 7), exif=exif)
    turning: Transform = [{"ExifTranspose": {}}, {"ToImage": {}}]
    samples = load_split(spec(root), "train")
    (note,) = check_images(samples, Silent())
    assert "EXIF orientation" in note
    with pytest.raises(UsageError, match=r"(?s)1 of 30 masks.*07\.png has an EXIF orientation"):
        check_images(samples, Silent(), transform=turning)


def test_headers_are_read_without_decoding(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(*_: Any) -> None:
        raise AssertionError("a file was decoded")

    samples = load_split(spec(root), "train")
    monkeypatch.setattr(Image.Image, "convert", decoded)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    assert check_images(samples, Silent()) == []


def test_a_part_of_a_data_set_has_its_own_masks_checked(root: Path) -> None:
    split = spec(root, validation_fraction=0.4)
    color(mask(root, 11))
    said = []
    names: tuple[Split, ...] = ("train", "validation")
    for name in names:
        samples = load_split(split, name)
        try:
            check_images(samples, Silent())
        except UsageError as error:
            said.append(error.what)
    (what,) = said
    assert what.count("11.png") == 1


def options_of(root: Path) -> list[str]:
    """Write a pipeline, and return the options with the folder as its data set."""
    (root / "p.yaml").write_text(PIPELINE.format(folder=root))
    steps: Transform = [{"ToImage": {}}, {"ToDtype": {"dtype": "float32", "scale": True}}]
    sets = [f"dataset={{name: segmentation-folder, root: {root}, classes: [a, b, c]}}"]
    sets += [f"transform={steps}", f"eval_transform={steps}", "teacher.train.epochs=1"]
    return [*(part for each in sets for part in ("--set", each)), "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [("train-teacher",), ("dump-teacher",), ("dump-teacher", "--dry-run")])
def test_commands_name_all_masks_before_any_work(command: tuple[str, ...], root: Path) -> None:
    options = options_of(root)
    if command[0] == "dump-teacher":
        ok("train-teacher", root / "p.yaml", *options, "-o", root / "teacher")
    for index in range(0, COUNT, 3):
        other_size(mask(root, index))
    said = refused(4, *command, root / "p.yaml", *options, "-o", root / "out")
    samples = load_split(spec(root, validation_fraction=0.1, test_fraction=0.1), "train")
    assert samples.maps is not None
    trained = samples.maps.files()
    wrong = [path for path in trained if int(Path(path).stem) % 3 == 0]
    assert f"{len(wrong)} of {len(trained)} masks cannot be used" in said
    assert all(Path(path).name in said for path in wrong)
    assert not (root / "out").exists()


@pytest.mark.slow
def test_doctor_checks_the_masks_of_all_splits(root: Path) -> None:
    options = options_of(root)
    other_size(mask(root, 0))
    for index in range(1, COUNT):
        palette(mask(root, index))
    done = kdcache("doctor", root / "p.yaml", *options, "-o", root)
    assert done.exit_code == 4
    assert done.stdout.count("masks cannot be used") >= 3
    assert "dataset.palettes=true" in done.output and "in the size of its image" in done.output
