"""A sweep of language models in several processes."""

from __future__ import annotations

from pathlib import Path

from helpers.cli import ok
from helpers.forked import forked_workers
from helpers.language_training import cache_of, taught, text_pipeline


def test_processes_train_the_students_that_one_trains(tmp_path: Path) -> None:
    cache_of(taught(), tmp_path / "t.kdcache")
    (tmp_path / "text.yaml").write_text(text_pipeline(train={"held_out_fraction": 0.2}).to_yaml())
    arguments = ("--cache", tmp_path / "t.kdcache", "--over", "loss=kd,ce", "--seeds", "1", "--device", "cpu")
    ok("sweep", tmp_path / "text.yaml", *arguments, "-o", tmp_path / "one")
    with forked_workers():
        ok("sweep", tmp_path / "text.yaml", *arguments, "-j", "2", "-o", tmp_path / "two")
    for loss in ("kd", "ce"):
        name = Path(f"loss={loss}") / "seed5" / "model" / "model.safetensors"
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
