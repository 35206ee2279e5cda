"""The axes that rows lie on: samples; and of sequences their taught positions, and their tokens.

A row on the axis of samples is found by the id of its sample. On the other two every shard has the same room, so that a
shard is one file, and the room behind its last row is empty (docs/FORMAT.md, section 12.2). Readers number the rows
that there are, without the gaps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from kdcache.cache.format.output_records import DEFAULT_OUTPUT, TOKENS
from kdcache.cache.format.schema import Plan


class Axis(NamedTuple):
    """An axis of rows.

    Attributes:
        name: of the dimension: sample, row or token.
        counts: number of rows of each shard; None if all but the last are full.
        rows: number of all rows.
        shard: rows that a shard has room for.
        chunk: rows per chunk.
    """

    name: str
    counts: tuple[int, ...] | None
    rows: int
    shard: int
    chunk: int

    @property
    def extent(self) -> int:
        """Length of the dimension of an array, gaps included."""
        return self.rows if self.counts is None else self.shard * len(self.counts)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard) if self.counts is None else len(self.counts)

    def rows_of(self, shard: int) -> int:
        """Return the number of rows of a shard."""
        if self.counts is not None:
            return self.counts[shard]
        return min(self.rows - shard * self.shard, self.shard)

    def pieces(self, rows: range) -> Iterator[tuple[int, range]]:
        """Yield, for consecutive rows, each shard that holds some of them, and their range on the axis."""
        if not len(rows):
            return
        begin = 0
        for shard in range(self.shards):
            end = begin + self.rows_of(shard)
            if begin < rows.stop and rows.start < end:
                offset = shard * self.shard - begin
                yield shard, range(max(rows.start, begin) + offset, min(rows.stop, end) + offset)
            begin = end


def contiguous(ranges: Iterable[range]) -> list[range]:
    """Return ascending ranges, with those joined that follow one another without a gap."""
    joined: list[range] = []
    for each in ranges:
        if joined and joined[-1].stop == each.start:
            joined[-1] = range(joined[-1].start, each.stop)
        else:
            joined.append(each)
    return joined


def sample_axis(plan: Plan) -> Axis:
    """Return the axis of the samples of a cache."""
    return Axis("sample", None, plan.dataset.samples, plan.shape.shard_rows, plan.shape.chunk_rows)


def axis_of(plan: Plan, output: str) -> Axis:
    """Return the axis that the rows of an output lie on; `TOKENS` for the tokens of sequences."""
    of = plan.sequences
    if of is None or output == DEFAULT_OUTPUT:
        return sample_axis(plan)
    if output == TOKENS:
        return Axis("token", of.tokens, sum(of.tokens), of.token_capacity, of.token_chunk)
    return Axis("row", of.rows, sum(of.rows), of.row_capacity, of.row_chunk)
