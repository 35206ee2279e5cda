"""Inspect caches: audit, summary, diff, fidelity measured without the teacher, card."""
