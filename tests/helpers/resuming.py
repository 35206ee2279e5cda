"""Runs of kdcache that are killed at a commit, or stopped, and resumed."""

from __future__ import annotations

from pathlib import Path

import torch

from helpers.processes import command_line, kill_at


def unfinished(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def epochs_kept(out: Path) -> int:
    state = unfinished(out) / "state.pt"
    return len(torch.load(state, weights_only=True)["rows"]) if state.is_file() else 0


def train_as_a_rank(
    rank: int, environment: dict[str, str], said: Path, out: Path, kill: tuple[str, bool] | None, *arguments: object
) -> None:
    if kill is not None:
        kill_at(unfinished(out), *kill)
    command_line(said, environment, *arguments, "--device", "cpu")


def train_alone(said: Path, out: Path, kill: tuple[str, bool] | None, *arguments: object) -> None:
    train_as_a_rank(0, {}, said, out, kill, *arguments)
