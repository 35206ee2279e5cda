"""The card of a cache: what it says is the manifest's, the hub can read it, and no check minds it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from helpers.processes import recipe
from helpers.tiny import FLIP, TinyTeacher, tiny_samples
from PIL import Image

from kdcache import Cache, dump_teacher, open_cache
from kdcache.cache.inspect.audit import audit
from kdcache.cache.inspect.card import card, write_card
from kdcache.cli import main
from kdcache.config.cache import CacheSpec
from kdcache.config.loader import load_pipeline
from kdcache.curate.select import select
from kdcache.models.teacher import load_teacher


def dump(out: Path, **changes: Any) -> Cache:
    spec = CacheSpec.model_validate({"top_k": 3, "rank": 4, "pilot_rows": 32, "shard_rows": 8, **changes})
    transform = FLIP if spec.views > 1 else []
    return dump_teacher(TinyTeacher(), tiny_samples(), out, name="tiny", transform=transform, spec=spec)


def header(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    assert found
    read = yaml.safe_load(found[1])
    assert isinstance(read, dict)
    return read


@pytest.mark.usefixtures("real_pictures")
def test_a_dump_leaves_a_card_that_says_what_the_manifest_says(tmp_path: Path) -> None:
    cache = dump(tmp_path / "c.kdcache", views=2, seed=7, license="CC-BY-4.0", notes="of a test")
    text, manifest = (cache.path / "README.md").read_text(), cache.manifest
    assert header(text) == {
        "license": "cc-by-4.0",
        "pretty_name": "tiny on tiny/train: logits",
        "size_categories": ["n<1K"],
        "task_categories": ["image-classification"],
        "tags": ["knowledge-distillation", "logits", "kdcache", "zarr"],
    }
    assert manifest.plan.fidelity is not None
    fidelity = [f"| {t} | {value:.4f} |" for t, value in manifest.plan.fidelity.total_variation.items()]
    for said in [
        manifest.digest,
        manifest.plan.teacher.weights_digest,
        manifest.plan.dataset.digest,
        f"{manifest.summary.teacher_accuracy:.2%} on these samples",
        f"{manifest.summary.mean_sharpness:.3f}, mean logsumexp",
        "2 per sample, seed 7",
        "RandomHorizontalFlip {'p': 0.5}",
        "log-probabilities of the top 3 classes and the label as float16; of the others 4 coordinates",
        f"74 rows, {cache.bytes_on_disk:,} bytes",
        "membership inference",
        "CC-BY-4.0",
        "of a test",
        *fidelity,
    ]:
        assert said in text
    assert "(card.png)" in text
    with Image.open(cache.path / "card.png") as image:
        assert image.format == "PNG"
        assert image.width > 500


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        ("", {"license": "unknown"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("ImageNet: research only", {"license": "other", "license_name": "ImageNet: research only"}),
        ("x\n---\nlicense: mit", {"license": "other", "license_name": "x --- license: mit"}),
    ],
)
def test_the_hub_reads_the_licence(tmp_path: Path, licence: str, fields: dict[str, str]) -> None:
    text = card(dump(tmp_path / "c.kdcache", license=licence))
    assert {key: value for key, value in header(text).items() if key.startswith("license")} == fields


def test_a_manifest_cannot_write_a_card_of_its_own(tmp_path: Path) -> None:
    text = card(dump(tmp_path / "c.kdcache", notes="<script>x</script> [a](http://b)\n# Free\n| a | b |"))
    assert "<script>" not in text
    assert "[a](" not in text
    assert "\n# Free" not in text
    assert "| a |" not in text


def test_the_code_of_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = dump(tmp_path / "CACHE")
    (code,) = re.findall(r"```python\n(.*?)```", (cache.path / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    import torch

    found: dict[str, Any] = {"ids": torch.tensor([4, 1])}
    exec(code, found)  # noqa: S102  # a block of the card, which this repository writes
    assert torch.equal(found["logits"], cache.teacher()(torch.tensor([4, 1])))


def test_notes_of_the_user_are_kept_and_the_rest_is_made_anew(tmp_path: Path) -> None:
    cache = dump(tmp_path / "c.kdcache")
    path = cache.path / "README.md"
    written = path.read_text()
    begin = "<!-- your notes: kept by `kdcache card` -->\n"
    path.write_text(written.replace(begin, f"{begin}Seen with *care*.\n\nTwice.").replace("## Limitations", "## None"))
    noted = write_card(cache)[0].read_text()
    assert noted == written.replace(begin, f"{begin}Seen with *care*.\n\nTwice.")
    assert write_card(cache)[0].read_text() == noted


@pytest.mark.usefixtures("real_pictures")
def test_card_and_picture_are_covered_by_nothing_and_no_check_minds_them(tmp_path: Path) -> None:
    cache = dump(tmp_path / "c.kdcache", views=2)
    card_path, picture = write_card(cache)
    assert picture is not None
    assert f"({picture.name})" in card_path.read_text()
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > 500
    drawn = picture.read_bytes()
    write_card(cache)
    assert picture.read_bytes() == drawn
    assert open_cache(cache.path).manifest.digest == cache.manifest.digest
    assert audit(cache.path).failure is None
    assert not {"README.md", "card.png"} & set(cache.manifest.files)
    picture.unlink()
    card_path.write_text("Prose.")
    assert audit(cache.path).failure is None


def test_a_card_that_is_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    cache = dump(tmp_path / "c.kdcache")
    secret = tmp_path / "secret"
    secret.write_text("<!-- your notes: kept by `kdcache card` -->\nof another file\n<!-- end of your notes -->")
    path = cache.path / "README.md"
    path.unlink()
    path.symlink_to(secret)
    assert "of another file" not in write_card(cache)[0].read_text()
    assert not path.is_symlink()
    assert "of another file" in secret.read_text()


def test_a_derived_cache_says_what_it_was_made_of(tmp_path: Path) -> None:
    cache = dump(tmp_path / "c.kdcache")
    text = (select(cache, tmp_path / "s.kdcache", top_k=2).path / "README.md").read_text()
    assert "select, top_k 2" in text
    assert cache.manifest.digest in text
    assert "Not measured against the teacher." in text


def test_the_command_draws_and_says_where(tmp_path: Path) -> None:
    cache = dump(tmp_path / "c.kdcache")
    done = CliRunner().invoke(main, ["card", str(cache.path), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert Path(said["card"]).is_file()
    assert Path(said["picture"]).is_file()


def test_nothing_of_the_producers_machine_is_in_a_cache(tmp_path: Path) -> None:
    pipeline = recipe(tmp_path)
    teacher = tmp_path / "teacher.py"
    changed = teacher.read_text().replace("num_classes):", "num_classes, table=None, more=None):")
    teacher.write_text(changed)
    table = tmp_path / "table.csv"
    arguments = f"teacher.args={{table: {table}, more: {{deep: [{table}, 3]}}}}"
    out = tmp_path / "out" / "c.kdcache"
    done = CliRunner().invoke(main, ["dump-teacher", str(pipeline), "-o", str(out), "--set", arguments])
    assert done.exit_code == 0, done.output
    loaded = load_teacher(load_pipeline(pipeline, [arguments]))
    assert loaded.identity.arguments == {"table": "table.csv", "more": {"deep": ["table.csv", 3]}}
    for path in out.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert os.fsencode(tmp_path) not in content
            assert os.fsencode(Path.home()) + b"/" not in content
    assert (out / "card.png").is_file()
