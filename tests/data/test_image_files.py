"""Image files of every mode become 8-bit RGB by one rule, or are refused by name; orientations are a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.networks import linear_teacher
from PIL import Image

from kdcache import CachedDataset, dump_teacher, load_split, open_cache, wrap
from kdcache.cli import main
from kdcache.config.transform import Transform
from kdcache.data.check_images import check_images
from kdcache.data.image_files import decode_rgb
from kdcache.data.images import FileImages
from kdcache.data.samples import Samples
from kdcache.data.views import View
from kdcache.errors import CorruptError, UsageError
from kdcache.runtime.progress import Silent

TENSORS: Transform = [{"ToImage": {}}, {"ToDtype": {"dtype": "float32", "scale": True}}]
UPRIGHT: Transform = [{"ExifTranspose": {}}, *TENSORS]
RAMP = np.array([[0, 1000, 32768, 65535]], np.uint16)
COLORS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]]], np.uint8)


def rgb(path: Path) -> Any:
    return np.asarray(decode_rgb(str(path)))


@pytest.mark.parametrize(
    ("mode", "kind"), [("I;16", "png"), ("I;16", "tif"), ("I;16B", "tif"), ("I", "pgm"), ("I;16", "jp2")]
)
def test_16_bit_gray_keeps_its_high_byte(mode: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "pgm":
        path.write_bytes(b"P5\n4 1\n65535\n" + RAMP.astype(">u2").tobytes())
    else:
        order = ">u2" if mode == "I;16B" else "<u2"
        options: dict[str, Any] = {"irreversible": False} if kind == "jp2" else {}
        Image.frombytes(mode, (4, 1), RAMP.astype(order).tobytes()).save(path, **options)
    with Image.open(path) as image:
        assert image.mode == mode
    assert rgb(path)[0].tolist() == [[value >> 8] * 3 for value in RAMP[0].tolist()]


def test_16_bit_gray_of_which_0_is_white_is_inverted(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert rgb(tmp_path / "a.tif")[0, :, 0].tolist() == [255 - (value >> 8) for value in RAMP[0].tolist()]


def test_12_bit_gray_of_a_pgm_is_scaled_by_its_largest_value(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5\n3 1\n4095\n" + np.array([0, 2048, 4095], ">u2").tobytes())
    assert rgb(tmp_path / "a.pgm")[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("mode", "kind", "expected"),
    [
        ("RGB", "png", COLORS[0].tolist()),
        ("RGBA", "png", COLORS[0].tolist()),
        ("P", "png", COLORS[0].tolist()),
        ("CMYK", "tif", COLORS[0].tolist()),
        ("L", "png", [[76] * 3, [150] * 3, [29] * 3, [128] * 3]),
        ("LA", "png", [[76] * 3, [150] * 3, [29] * 3, [128] * 3]),
        ("1", "png", [[0] * 3, [255] * 3, [0] * 3, [255] * 3]),
    ],
)
def test_8_bit_images_are_those_of_pillow(mode: str, kind: str, expected: list[list[int]], tmp_path: Path) -> None:
    image = Image.fromarray(COLORS)
    if mode == "P":
        image = image.quantize(4)
    elif mode == "1":
        image = Image.fromarray(np.array([[0, 255, 0, 255]], np.uint8)).convert("1")
    else:
        image = image.convert("L").convert("LA") if mode == "LA" else image.convert(mode)
    image.save(tmp_path / f"a.{kind}")
    with Image.open(tmp_path / f"a.{kind}") as stored:
        assert stored.mode == mode
    assert rgb(tmp_path / f"a.{kind}")[0].tolist() == expected


@pytest.mark.parametrize("mode", ["LAB", "YCbCr"])
def test_other_color_spaces_keep_their_colors(mode: str, tmp_path: Path) -> None:
    from PIL import ImageCms

    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(Image.fromarray(COLORS), *profiles, outputMode="LAB")
    else:
        image = Image.fromarray(COLORS).convert(mode)
    assert image is not None
    image.save(tmp_path / "a.tif")
    assert np.abs(rgb(tmp_path / "a.tif").astype(int) - COLORS).max() < 25


UNKNOWN = {
    "floats from 0 to 1": (np.array([[0, 0.25, 1]], np.float32), "mode F", "values 0 to 1"),
    "floats to 255": (np.array([[3, 200, 255]], np.float32), "mode F", "values 3 to 255"),
    "32-bit integers": (np.array([[-5, 7, 100000]], np.int32), "mode I", "values -5 to 100000"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_range_is_refused_with_file_mode_range_and_remedy(case: str, tmp_path: Path) -> None:
    values, mode, extremes = UNKNOWN[case]
    path = str(tmp_path / "a.tif")
    Image.fromarray(values).save(path)
    samples = Samples("set", "train", FileImages([path]), np.zeros(1, np.int32), ("a",), TENSORS)
    for read in (lambda: samples.images.picture(0), lambda: check_images(samples, Silent())):
        with pytest.raises(UsageError) as caught:
            read()
        for words in (path, mode, extremes):
            assert words in caught.value.what
        assert "multiply by 65535" in caught.value.fix


def test_a_damaged_file_among_unknown_ranges_has_both_remedies(tmp_path: Path) -> None:
    Image.fromarray(UNKNOWN["32-bit integers"][0]).save(tmp_path / "a.tif")
    (tmp_path / "b.png").write_bytes(b"")
    paths = [str(tmp_path / name) for name in ("a.tif", "b.png")]
    samples = Samples("set", "train", FileImages(paths), np.zeros(2, np.int32), ("a",), TENSORS)
    with pytest.raises(CorruptError, match="2 of 2") as caught:
        check_images(samples, Silent())
    assert "replace these files" in caught.value.fix
    assert "multiply by 65535" in caught.value.fix


# EXIF orientation


def rotated(path: Path, kind: str, orientation: int, seed: int = 0) -> Any:
    """Write an image that is stored turned, and return its upright pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(pixels).save(path, kind, exif=exif, **options)
    with Image.open(path) as stored:
        stored_pixels = np.asarray(stored.convert("RGB"))
    return {3: np.rot90(stored_pixels, 2), 6: np.rot90(stored_pixels, 3), 8: np.rot90(stored_pixels, 1)}[orientation]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_an_orientation_is_applied_by_the_step_and_only_by_it(kind: str, orientation: int, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind.lower()}"
    upright = rotated(path, kind, orientation)
    samples = Samples("set", "train", FileImages([str(path)]), np.zeros(1, np.int32), ("a",), TENSORS)
    turned = View(samples, UPRIGHT)[0].images[0]
    assert torch.equal((turned * 255).round().byte(), torch.from_numpy(upright.copy()).permute(2, 0, 1))
    assert View(samples, TENSORS)[0].images.shape == (1, 3, 4, 6), "as torchvision's ImageFolder has it"
    (note,) = check_images(samples, Silent())
    assert note == (
        "1 image files have an EXIF orientation, which the transform does not apply: to turn them, begin it with "
        "- ExifTranspose: {}"
    )
    assert check_images(samples, Silent(), transform=UPRIGHT)[0].endswith("which the transform applies")


def test_the_step_is_the_first_and_leaves_tensors_alone() -> None:
    samples = wrap([(torch.ones(1, 2, 3), 0)], 1)  # type: ignore[arg-type]  # a list is a map-style data set
    assert View(samples, [{"ExifTranspose": {}}])[0].images.shape == (1, 1, 2, 3)
    with pytest.raises(UsageError, match="can only be the first step"):
        View(samples, [{"ToImage": {}}, {"ExifTranspose": {}}])


@pytest.fixture
def turned_set(tmp_path: Path) -> Path:
    for index in range(8):
        path = tmp_path / "set" / "train" / "ab"[index % 2] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        rotated(path, "JPEG", (6, 8)[index % 2], index)
    return tmp_path


@pytest.mark.parametrize("transform", [UPRIGHT, TENSORS])
def test_the_student_sees_a_turned_picture_as_the_teacher_did(transform: Transform, turned_set: Path) -> None:
    spec = {"name": "image-folder", "root": str(turned_set / "set"), "validation_fraction": 0, "test_fraction": 0}
    samples = load_split(spec, "train")
    seen = []

    class Teacher(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if len(images) == len(samples):
                seen.append(images)
            return images.mean((2, 3))[:, :2]

    cache = dump_teacher(Teacher(), samples, turned_set / "c.kdcache", transform=transform, batch_size=8)
    assert cache.manifest.plan.views.transform == transform
    data = CachedDataset(load_split(spec, "train"), open_cache(turned_set / "c.kdcache"))
    images = torch.stack([data[index][0] for index in range(8)])
    assert torch.equal(images, seen[-1])
    assert images.shape[2:] == ((6, 4) if transform is UPRIGHT else (4, 6))


def test_doctor_and_dry_run_report_what_is_done_with_files(turned_set: Path) -> None:
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(turned_set / "set/train/a/gray.png")
    Image.new("RGBA", (6, 4)).save(turned_set / "set/train/a/clear.png")
    (turned_set / "teacher.py").write_text(linear_teacher(72))
    (turned_set / "p.yaml").write_text(
        f"dataset: {{name: image-folder, root: {turned_set}/set, validation_fraction: 0, test_fraction: 0}}\n"
        "transform: [ToImage: {}, ToDtype: {dtype: float32, scale: true}]\n"
        f"teacher: {{model: '{turned_set}/teacher.py:make'}}\n"
    )
    lines = ("1 image files are 16-bit gray and are scaled", "8 image files have an EXIF", "1 image files have transp")
    doctor = CliRunner().invoke(main, ["doctor", f"{turned_set}/p.yaml", "-o", str(turned_set), "--device", "cpu"])
    dry = ["dump-teacher", f"{turned_set}/p.yaml", "-o", f"{turned_set}/c.kdcache", "--dry-run", "--device", "cpu"]
    dumped = CliRunner().invoke(main, dry)
    assert (doctor.exit_code, dumped.exit_code) == (0, 0), doctor.output + dumped.output
    for line in lines:
        assert line in doctor.stdout
        assert line in dumped.stderr
    Image.fromarray(UNKNOWN["floats from 0 to 1"][0]).save(turned_set / "set/train/b/float.tif")
    for arguments in (["doctor", f"{turned_set}/p.yaml", "-o", str(turned_set), "--device", "cpu"], dry):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 2
        assert "float.tif: mode F (32-bit floats), values 0 to 1" in done.stderr


# Gray among color


@pytest.mark.parametrize("first", ["L", "RGB", "RGBA"])
def test_gray_among_color_names_the_step_that_makes_them_alike(first: str) -> None:
    others = [mode for mode in ("L", "RGB", "RGBA") if mode != first]
    for other in others:
        items = [(Image.new(first, (3, 2)), 0), (Image.new(other, (3, 2)), 1)]
        samples = wrap(items, 2)  # type: ignore[arg-type]  # a list is a map-style data set
        with pytest.raises(UsageError, match="different numbers of channels") as caught:
            View(samples, TENSORS).batch([0, 1], 0)
        assert "- RGB: {}" in caught.value.fix
        assert "Grayscale" in caught.value.fix
        assert View(samples, [{"RGB": {}}, *TENSORS]).batch([0, 1], 0).images.shape == (2, 3, 2, 3)
        gray: Transform = [{"Grayscale": {"num_output_channels": 1}}, *TENSORS]
        if "RGBA" not in (first, other):
            assert View(samples, gray).batch([0, 1], 0).images.shape == (2, 1, 2, 3)


def test_a_step_that_a_transparent_image_does_not_pass_names_the_remedy() -> None:
    items = [(Image.new("RGB", (3, 2)), 0), (Image.new("RGBA", (3, 2)), 1)]
    samples = wrap(items, 2)  # type: ignore[arg-type]  # a list is a map-style data set
    with pytest.raises(UsageError, match="sample 1") as caught:
        View(samples, [*TENSORS, {"Normalize": {"mean": [0.5] * 3, "std": [0.5] * 3}}]).batch([0, 1], 0)
    assert "this image has 4 channels, the first 3: begin the transform with - RGB: {}" in caught.value.fix
