"""Read-only views of a cache: audit, summary, diff, self-measured fidelity, card."""
