"""Noise is not taken for granted where logits come from files: every import refuses it, before anything is read."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import tiny_samples

from kdcache.config.cache import CacheSpec
from kdcache.curate.dense_logits import cache_of_logits
from kdcache.curate.foreign.importer import cache_of_files
from kdcache.curate.foreign.margin_mse import cache_of_scores
from kdcache.errors import UsageError

IMPORTS: dict[str, Any] = {
    "logits": cache_of_logits,
    "scores": cache_of_scores,
    **{
        layout: lambda source, samples, out, *, spec, layout=layout: cache_of_files(
            source, layout, samples, out, spec=spec
        )
        for layout in ("fkd", "ml-dr", "tinyvit")
    },
}


@pytest.mark.parametrize("name", IMPORTS)
def test_an_import_with_noise_is_refused(name: str, tmp_path: Path) -> None:
    spec = CacheSpec.model_validate({"noise": {"sigma": 0.5, "key": str(tmp_path / "key")}})
    run = partial(IMPORTS[name], tmp_path / "source", tiny_samples(5), tmp_path / "c.kdcache")
    with pytest.raises(UsageError, match="these logits come from files"):
        run(spec=spec)
    assert list(tmp_path.iterdir()) == []
