"""Where the repository and what the tests read of it are."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
GOLDEN, REFERENCE = TESTS / "golden", TESTS / "reference"
