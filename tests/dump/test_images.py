"""Image files that cannot be read: all are named before the pass, and what an earlier run finished is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from kdcache import open_cache
from kdcache.cli import main
from kdcache.data.check_images import check_images
from kdcache.data.images import FileImages
from kdcache.data.samples import Samples
from kdcache.errors import CorruptError
from kdcache.runtime.progress import Silent

COUNT = 24
"""Images of two classes; with shards of 8 the first class has the ids 0 to 11."""


def draw(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(path, quality=95)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of JPEG files in class folders, a teacher for it, and a pipeline of both."""
    for index in range(COUNT):
        path = tmp_path / "set" / "train" / f"class{index // 12}" / f"{index:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(path, index)
    (tmp_path / "teacher.py").write_text(
        "import torch\n"
        "def make(num_classes):\n"
        "    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), Two())\n"
        "class Two(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x[:, :2] * 7\n"
    )
    (tmp_path / "p.yaml").write_text(
        f"dataset: {{name: image-folder, root: {tmp_path / 'set'}, validation_fraction: 0, test_fraction: 0}}\n"
        "transform: [ToImage: {}, ToDtype: {dtype: float32, scale: true}]\n"
        f"teacher: {{model: '{tmp_path / 'teacher.py'}:make'}}\n"
        "cache: {shard_rows: 8, batch_size: 4}\n"
    )
    return tmp_path


def image(folder: Path, index: int) -> Path:
    return folder / "set" / "train" / f"class{index // 12}" / f"{index:02}.jpg"


def kdcache(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu"])


def zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("404: not found\n")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def lost_header(path: Path) -> None:
    path.write_bytes(b"\0" * 20 + path.read_bytes()[20:])


DAMAGES: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "zero bytes": (zero_bytes, "not an image file", True),
    "text": (text, "not an image file", True),
    "no header": (lost_header, "not an image file", True),
    "truncated": (cut_short, "truncated", False),
}
"""Name -> damage, reason, and whether the header shows it."""


@pytest.mark.parametrize("command", ["dump-teacher", "--dry-run", "doctor"])
def test_all_unreadable_files_are_named_at_once(command: str, folder: Path) -> None:
    for index, (damage, _, _) in zip((2, 7, 15, 22), DAMAGES.values(), strict=True):
        damage(image(folder, index))
    out = folder / "c.kdcache"
    for options, broken in (((), (2, 7, 15)), (("--decode-images",), (2, 7, 15, 22))):
        if command == "doctor":
            done = kdcache("doctor", folder / "p.yaml", "-o", folder, *options)
        else:
            dry = [command] if command == "--dry-run" else []
            done = kdcache("dump-teacher", folder / "p.yaml", "-o", out, *dry, *options)
        assert done.exit_code == 5, done.output
        assert f"{len(broken)} of {COUNT} image files cannot be read" in done.stderr
        named = {index for index in range(COUNT) if f"{image(folder, index)}: " in done.stderr}
        assert named == set(broken)
        for index, (_, reason, _) in zip((2, 7, 15, 22), DAMAGES.values(), strict=True):
            lines = [line for line in done.stderr.splitlines() if f"{image(folder, index)}: " in line]
            assert all(reason in line for line in lines)
        assert not out.exists()


def test_a_folder_with_the_name_of_an_image_is_named(folder: Path) -> None:
    paths = [str(image(folder, index)) for index in range(3)]
    (folder / "folder.png").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    paths += [str(folder / "folder.png"), str(folder / "gone.png")]
    samples = Samples("set", "train", FileImages(paths), np.zeros(5, np.int32), ("a", "b"), [])
    for decode in (False, True):
        with pytest.raises(CorruptError, match=r"2 of 5 image files") as caught:
            check_images(samples, Silent(), decode)
        assert f"{folder / 'folder.png'}: Is a directory" in caught.value.what
        assert f"{folder / 'gone.png'}: No such file or directory" in caught.value.what


def test_doctor_says_that_images_are_well(folder: Path) -> None:
    for options, words in (((), "the headers of all 24 files"), (("--decode-images",), "all 24 files were decoded")):
        done = kdcache("doctor", folder / "p.yaml", "-o", folder, *options)
        assert done.exit_code == 0, done.output
        assert words in done.stdout


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_image_that_breaks_during_the_pass_costs_one_shard(damage: str, folder: Path) -> None:
    out, late = folder / "c.kdcache", image(folder, 18)
    if damage == "truncated":
        DAMAGES[damage][0](late)
        done = kdcache("dump-teacher", folder / "p.yaml", "-o", out)
    else:
        done = dump_while_it_breaks(folder, out, DAMAGES[damage][0])
    assert done.exit_code == 5, done.output
    assert str(late) in done.stderr
    assert "keeps its finished shards, and the same command resumes" in done.stderr
    kept = {name: (out / name).stat().st_mtime_ns for name in ("commits/0/0.json", "commits/0/1.json")}
    draw(late, 100)  # another picture than before
    again = kdcache("dump-teacher", folder / "p.yaml", "-o", out)
    assert again.exit_code == 0, again.output
    assert "1 of 3 shards remain" in again.stderr
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert kdcache("dump-teacher", folder / "p.yaml", "-o", folder / "once.kdcache").exit_code == 0
    assert open_cache(out).manifest.digest == open_cache(folder / "once.kdcache").manifest.digest


def dump_while_it_breaks(folder: Path, out: Path, damage: Callable[[Path], None]) -> Result:
    """Dump from the command line; image 18 is damaged after all headers were checked."""
    with pytest.MonkeyPatch.context() as patch:

        def check_and_damage(samples: Samples, *rest: Any) -> list[str]:
            notes = check_images(samples, *rest)
            damage(image(folder, 18))
            return notes

        patch.setattr("kdcache.dump.job.check_images", check_and_damage)
        return kdcache("dump-teacher", folder / "p.yaml", "-o", out)


def test_a_finished_shard_of_a_replaced_image_is_made_again(folder: Path) -> None:
    out = folder / "c.kdcache"
    cut_short(image(folder, 18))
    assert kdcache("dump-teacher", folder / "p.yaml", "-o", out).exit_code == 5
    draw(image(folder, 18), 100)
    draw(image(folder, 3), 101)
    again = kdcache("dump-teacher", folder / "p.yaml", "-o", out)
    assert again.exit_code == 0, again.output
    assert "images changed since" in again.stderr
    assert "1 finished shard will be made again" in again.stderr
    assert "2 of 3 shards remain" in again.stderr
    assert kdcache("dump-teacher", folder / "p.yaml", "-o", folder / "once.kdcache").exit_code == 0
    assert open_cache(out).manifest.digest == open_cache(folder / "once.kdcache").manifest.digest


def test_a_removed_image_is_refused_with_what_to_do(folder: Path) -> None:
    out = folder / "c.kdcache"
    cut_short(image(folder, 18))
    assert kdcache("dump-teacher", folder / "p.yaml", "-o", out).exit_code == 5
    image(folder, 18).unlink()
    again = kdcache("dump-teacher", folder / "p.yaml", "-o", out)
    assert again.exit_code == 4
    assert "dataset.samples: 24, 23" in again.stderr
    assert "delete the folder to start again" in again.stderr
