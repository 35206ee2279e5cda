"""The teacher of a cache of sequences: sequences in, their tokens and the teacher's rows at taught positions out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcache.cache.format import stored_bases
from kdcache.cache.format.output_records import TOKENS
from kdcache.cache.format.schema import Manifest
from kdcache.cache.format.stored_sequences import read_counts
from kdcache.cache.format.tail_basis import TailBasis
from kdcache.cache.format.token_codec import mass_columns
from kdcache.cache.format.token_encoding import TokenEncoding
from kdcache.cache.format.token_rows import SequenceTokens, TokenRows
from kdcache.cache.format.vector_rows import R
from kdcache.cache.placement.choose import Placement, place_rows
from kdcache.cache.placement.prefetch import RowSource, gather
from kdcache.errors import MismatchError, UsageError, indices_below
from kdcache.losses.token_targets import TokenTargets

_MIXED_ROWS, _BLOCK_ROWS = 2**19, 2**15
"""Rows of a stream whose sequences are shuffled together, and of a block of neighbors: some 50 and 3 MB."""


class SequenceText(NamedTuple):
    """The tokens of sequences, or of prefixes of them, one after the other, and which positions have a row.

    Attributes:
        tokens: [m] int64, their tokens.
        token_start: [B + 1] int64, where each begins in `tokens`; the last is m.
        positions: [n] int64, where in `tokens` each row is: it is of the token after that.
        row_start: [B + 1] int64, where each sequence begins among the rows; the last is n.
    """

    tokens: Tensor
    token_start: Tensor
    positions: Tensor
    row_start: Tensor

    @property
    def next_tokens(self) -> Tensor:
        """The token that follows each row's position, [n] int64."""
        return self.tokens[self.positions + 1]

    def to(self, device: torch.device | str) -> SequenceText:
        """Return the text on another device."""
        return SequenceText(*(part.to(device) for part in self))


class SequenceBatch(NamedTuple):
    """Sequences, or prefixes of them, one after the other.

    Attributes:
        tokens: [m] int64, their tokens.
        token_start: [B + 1] int64, where each begins in `tokens`; the last is m.
        positions: [n] int64, where in `tokens` each row is: it is of the token after that.
        rows: [n], the encoded rows.
        row_start: [B + 1] int64, where each sequence begins in `rows`; the last is n.
    """

    tokens: Tensor
    token_start: Tensor
    positions: Tensor
    rows: TokenRows
    row_start: Tensor

    @property
    def next_tokens(self) -> Tensor:
        """The token that follows each row's position, [n] int64."""
        return self.tokens[self.positions + 1]


def _starts(counts: npt.NDArray[np.integer[Any]]) -> Tensor:
    """Return where each of some neighbors begins, and where the last ends, from their lengths: [N] -> [N + 1] int64."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))


def _spans(starts: Tensor, which: Sequence[int], sizes: Sequence[int] | None = None) -> Tensor:
    """Return the indices of all that belongs to some sequences, or of the first so many of each."""
    begins, ends = starts[which].tolist(), starts[[index + 1 for index in which]].tolist()
    if sizes is not None:
        ends = [begin + size for begin, size in zip(begins, sizes, strict=True)]
    return torch.cat([torch.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])


@dataclass(frozen=True, repr=False)
class CachedSequences:
    """The teacher of a cache of sequences.

    A row is valid wherever a student sees the same tokens before it: in the whole sequence, or in a prefix, however
    these are packed into batches, as long as attention and positions begin anew in each.

    Attributes:
        name: of the output.
        source: returns encoded rows.
        token_source: returns tokens.
        placement: where rows are held: device, host, mmap or stream.
        why: the reason for that placement, in a few words.
        token_start: [N + 1] int64, where each sequence begins among all tokens.
        row_start: [N + 1] int64, where each sequence begins among all rows.
        encoding: of the rows.
        device: of what is returned.
        basis: of the tails, on the device; None if the encoding has no basis.
    """

    name: str
    source: RowSource[TokenRows]
    token_source: RowSource[SequenceTokens]
    placement: Placement
    why: str
    token_start: Tensor
    row_start: Tensor
    encoding: TokenEncoding
    device: torch.device
    basis: TailBasis | None = None

    def __len__(self) -> int:
        return len(self.row_start) - 1

    def __repr__(self) -> str:
        return (
            f"CachedSequences({self.name!r}, sequences={len(self):,}, tokens={int(self.token_start[-1]):,}, "
            f"rows={int(self.row_start[-1]):,}, vocabulary={self.encoding.num_classes:,}, "
            f"placement={self.placement!r}, device={str(self.device)!r})"
        )

    def tokens(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Return the tokens of a sequence, [L] int64, and which of its positions are taught, [L] bool."""
        self._check([sequence])
        found = self.token_source.rows(torch.arange(*self.token_start[sequence : sequence + 2].tolist()), 0)
        return found.tokens.long(), found.taught.bool()

    def __call__(
        self, sequences: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor | None = None
    ) -> SequenceBatch:
        """Return sequences, or prefixes of them, with their rows, on the teacher's device.

        A prefix has the rows of the positions before its last token, as the token after the last is not in it.

        Args:
            sequences: [B] indices.
            lengths: [B], tokens of each prefix; longer than the sequence for the whole of it. None for whole sequences.

        Raises:
            UsageError: if an index is out of range, or a prefix has no tokens.
        """
        text = self.text(sequences, lengths)
        tokens, token_start, positions, row_start = text.to(self.device)
        return SequenceBatch(tokens, token_start, positions, self.rows_of(sequences, text), row_start)

    def text(self, sequences: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor | None = None) -> SequenceText:
        """Return the tokens of sequences, or of prefixes of them, on the CPU.

        Args: as for the call.

        Raises:
            UsageError: as the call.
        """
        which = [int(index) for index in sequences]
        self._check(which)
        cut = [None] * len(which) if lengths is None else [int(length) for length in lengths]
        if len(cut) != len(which) or any(length is not None and length < 1 for length in cut):
            raise UsageError(f"{len(cut)} lengths for {len(which)} sequences", "pass a length above 0 for each")
        whole = (self.token_start[[index + 1 for index in which]] - self.token_start[which]).tolist()
        sizes = [size if length is None else min(length, size) for size, length in zip(whole, cut, strict=True)]
        found = self._read(self.token_source, self.token_start, which, sizes)
        token_start = torch.tensor([0, *np.cumsum(sizes).tolist()])
        taught = found.taught.cpu().bool()
        taught[token_start[1:] - 1] = False
        positions = taught.nonzero().squeeze(1)
        return SequenceText(
            found.tokens.cpu().long(), token_start, positions, torch.searchsorted(positions, token_start)
        )

    def rows_of(self, sequences: Sequence[int] | Tensor, text: SequenceText) -> TokenRows:
        """Return the encoded rows of what `text` returned for the same sequences, [n], on the teacher's device."""
        which = [int(index) for index in sequences]
        return self._read(self.source, self.row_start, which, text.row_start.diff().tolist()).to(self.device)

    def prefetch(self, batches: Iterable[Sequence[int]]) -> None:
        """Announce the batches of sequences that will be asked for, tokens and rows, in this order."""
        if self.placement != "stream":
            return
        announced, again = itertools.tee(batches)
        self.token_source.prefetch((_spans(self.token_start, which) for which in announced), 0)
        self.source.prefetch((_spans(self.row_start, which) for which in again), 0)

    def _read(self, source: RowSource[R], starts: Tensor, which: list[int], sizes: list[int]) -> R:
        """Return the first so many rows of each of some sequences, of a source in which they begin at `starts`."""
        if self.placement != "stream":
            return source.rows(_spans(starts, which, sizes), 0)
        # As they were announced: whole, of which a part may be taken.
        found, whole = source.rows(_spans(starts, which), 0), starts.diff()[which].tolist()
        if whole == sizes:
            return found
        begins = [0, *np.cumsum(whole).tolist()]
        kept = [torch.arange(begin, begin + size) for begin, size in zip(begins, sizes, strict=False)]
        return gather(found, torch.cat(kept))

    def order(self, generator: torch.Generator) -> Tensor:
        """Return a random order of all sequences, [N] int64, in which they can be read fast: in blocks for a stream."""
        if self.placement != "stream":
            return torch.randperm(len(self), generator=generator)
        _, sizes = torch.unique_consecutive(self.row_start[:-1] // _BLOCK_ROWS, return_counts=True)
        blocks = torch.split(torch.arange(len(self)), sizes.tolist())
        parts = []
        for mixed in torch.split(torch.randperm(len(blocks), generator=generator), _MIXED_ROWS // _BLOCK_ROWS):
            together = torch.cat([blocks[block] for block in mixed.tolist()])
            parts.append(together[torch.randperm(len(together), generator=generator)])
        return torch.cat(parts)

    def check_tokens(self, sequence: int, tokens: Tensor | npt.NDArray[Any]) -> None:
        """Check that a student's tokens are those of a sequence, or of a prefix.

        Raises:
            MismatchError: with the first position that differs, and both tokens.
        """
        ours, given = self.tokens(sequence)[0].cpu(), torch.as_tensor(tokens).cpu().long()
        common = min(len(ours), len(given))
        differ = (ours[:common] != given[:common]).nonzero()
        if len(differ):
            at = int(differ[0])
            raise MismatchError(
                f"token {at} of sequence {sequence} is {int(ours[at])} in the cache, and {int(given[at])} in the batch",
                "use the data set, tokenizer and chat template that the teacher saw",
            )
        if len(given) > len(ours):
            raise MismatchError(
                f"sequence {sequence} has {len(ours)} tokens in the cache, and {len(given)} in the batch",
                "cut the batch to the sequence, or dump the teacher with longer sequences",
            )

    def targets(self, rows: TokenRows) -> TokenTargets:
        """Return encoded rows as what the losses of tokens compare a student with, on the device of the rows."""
        return targets_of(rows, self.encoding, self.basis)

    def _check(self, sequences: Sequence[int]) -> None:
        if wrong := [index for index in sequences if not 0 <= index < len(self)]:
            raise UsageError(
                f"the cache has no sequence {wrong[0]}", f"sequences are numbered {indices_below(len(self))}"
            )


def targets_of(rows: TokenRows, encoding: TokenEncoding, basis: TailBasis | None) -> TokenTargets:
    """Return encoded rows as what the losses of tokens compare a student with, on the device of the rows.

    Args:
        rows: n of them.
        encoding: of the rows.
        basis: of their tails, on the same device; None if the encoding has no basis.
    """
    if rows.draws is not None:
        none = torch.empty(len(rows), 0, device=rows.draws.device)
        drawn = rows.draws.long(), rows.part("counts").float()
        return TokenTargets(none.long(), none, none, encoding.temperatures, encoding.num_classes, draws=drawn)
    statistics = rows.part("statistics")
    masses = [statistics[:, encoding.statistics.index(name)] for name in mass_columns(encoding).values()]
    targets = TokenTargets(
        rows.part("indices").long(),
        rows.part("log_probs").float(),
        torch.stack(masses, dim=1).float(),
        encoding.temperatures,
        encoding.num_classes,
        logsumexp=rows.logsumexp,
    )
    if rows.tail is None or basis is None:
        return targets
    coordinates = rows.tail.float() * basis.scale
    return replace(targets, coordinates=coordinates, basis=basis.basis.float(), mean=basis.mean)


def placed_sequences(
    cache: Path, manifest: Manifest, output: str, device: torch.device | str, placement: Placement | Literal["auto"]
) -> CachedSequences:
    """Load tokens and rows with the requested placement, and return the teacher of a cache of sequences.

    Args:
        cache: folder of the cache.
        manifest: of the cache.
        output: name of one of its outputs.
        device: device of what the teacher returns.
        placement: as for `place_rows`.

    Raises:
        As `place_rows`.
    """
    plan = manifest.plan
    placed, tokens = (place_rows(cache, manifest, device, placement, (0,), name) for name in (output, TOKENS))
    basis = stored_bases.read_output_basis(cache, plan, output)
    token_start, row_start = (_starts(counts) for counts in read_counts(cache, plan))
    return CachedSequences(
        output,
        placed.source,
        tokens.source,
        placed.placement,
        placed.why,
        token_start,
        row_start,
        plan.named_outputs[output].token_encoding,
        torch.device(device),
        basis.to(device) if isinstance(basis, TailBasis) else None,
    )
