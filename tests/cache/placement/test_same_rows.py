"""Every placement returns the same logits, in any order, announced or not."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.placement import (
    CHUNK,
    COUNT,
    FROM_DISK,
    Made,
    check,
    count_reads,
    drawn,
    make,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdcache.cache.format.codec import Rows
from kdcache.cache.placement import choose, mmap, prefetch, stream
from kdcache.cache.placement.choose import PLACEMENTS, Placement
from kdcache.cache.teacher import CachedTeacher


@pytest.mark.parametrize("placed", PLACEMENTS)
def test_every_place_gives_what_was_written(placed: Placement, made: Made) -> None:
    teacher = made.cache.teacher(placement=placed)
    assert (teacher.placement, teacher.why) == (placed, "as requested")
    for view in (1, 0):
        check(teacher, made, torch.cat([drawn(view), torch.tensor([36, 0, 36, 36, 17])]), view)
        check(teacher, made, torch.arange(36, 30, -1, dtype=torch.int32), view)
        check(teacher, made, torch.tensor([], dtype=torch.int64), view)
        for one in (0, 17, 36):
            check(teacher, made, torch.tensor([one]), view)


# A few batches come again and again, in one view and the other.
IDS = st.one_of(
    st.sampled_from([[5], [36, 0, 9], [1, 2, 3, 4]]),
    st.lists(st.integers(0, COUNT - 1), max_size=9),
).map(lambda ids: torch.tensor(ids, dtype=torch.int64))


BATCHES = st.lists(IDS, max_size=6)


VIEWS = st.integers(0, 1)


class Announce(NamedTuple):
    """Batches of a view are announced, as ids of this type."""

    batches: list[Tensor]
    view: int
    dtype: torch.dtype


class Follow(NamedTuple):
    """Of what was announced, so many batches are left out, then so many are asked for."""

    skip: int
    take: int


class Ask(NamedTuple):
    """A batch that nobody has announced."""

    ids: Tensor
    view: int


TYPES = st.sampled_from([torch.int64, torch.int32])


ACTS = st.lists(
    st.one_of(
        st.builds(Announce, BATCHES, VIEWS, TYPES),
        st.builds(Follow, st.integers(0, 2), st.integers(0, 6)),
        st.builds(Ask, IDS, VIEWS),
    ),
    max_size=8,
)


@pytest.mark.parametrize(("placed", "blocks"), [("host", 0), ("mmap", 0), ("stream", 1), ("stream", 3)])
def test_whatever_was_announced_the_answer_is_right(
    placed: Placement, blocks: int, lowrank: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = sum(value[0].numel() * value.element_size() for value in lowrank.rows[0].arrays().values())
    monkeypatch.setattr(choose, "_MIXED_BYTES", blocks * CHUNK * width)
    teacher = lowrank.cache.teacher(placement=placed)

    @given(ACTS)
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def answers(acts: list[Announce | Follow | Ask]) -> None:
        announced: Iterator[Tensor] = iter(())
        view = 0
        for act in acts:
            match act:
                case Announce():
                    teacher.prefetch([ids.to(act.dtype) for ids in act.batches], act.view)
                    announced, view = iter(act.batches), act.view
                case Follow():
                    for ids in itertools.islice(announced, act.skip, act.skip + act.take):
                        check(teacher, lowrank, ids, view)
                case Ask():
                    check(teacher, lowrank, act.ids, act.view)

    answers()


@pytest.mark.parametrize("placed", FROM_DISK)
def test_announced_batches_are_fetched_ahead_and_no_other(placed: Placement, lowrank: Made) -> None:
    teacher = lowrank.cache.teacher(placement=placed)
    batches = torch.split(drawn(0), 5)
    asked_for = count_fetches(teacher)
    teacher.prefetch(batches)
    for ids in batches:
        check(teacher, lowrank, ids, 0)
    assert torch.equal(torch.cat(asked_for), torch.cat(batches)), "each row once, in this order"
    assert len(asked_for) < len(batches), "several batches at once"
    asked_for.clear()
    for ids in batches:
        check(teacher, lowrank, ids, 0)
    assert len(asked_for) == len(batches), "an announcement is good for once"


def count_fetches(teacher: CachedTeacher) -> list[Tensor]:
    """The ids of each fetch of a place on disk from now on."""
    asked_for: list[Tensor] = []
    ahead: prefetch.Prefetcher[Rows] = vars(teacher.source)["_prefetcher"]
    fetch = ahead._fetch

    def counted(ids: Tensor, view: int) -> Rows:
        asked_for.append(ids)
        return fetch(ids, view)

    ahead._fetch = counted
    return asked_for


@pytest.mark.parametrize("placed", FROM_DISK)
def test_a_batch_in_between_does_not_end_what_was_announced(placed: Placement, lowrank: Made) -> None:
    teacher = lowrank.cache.teacher(placement=placed)
    batches = torch.split(drawn(0), 5)
    asked_for = count_fetches(teacher)
    teacher.prefetch(batches)
    other = torch.tensor([3, 1])
    for ids in batches:
        check(teacher, lowrank, other, 0)
        check(teacher, lowrank, ids, 0)
        check(teacher, lowrank, other, 1)
    assert sum(len(ids) == 2 and torch.equal(ids, other) for ids in asked_for) == 2 * len(batches)
    assert sum(map(len, asked_for)) == COUNT + 2 * 2 * len(batches)


@pytest.mark.parametrize("placed", FROM_DISK)
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_the_same_batches_may_be_announced_for_another_view(placed: Placement, taken: int, lowrank: Made) -> None:
    teacher = lowrank.cache.teacher(placement=placed)
    batches = torch.split(drawn(0), 5)
    for view in (0, 1, 0):
        teacher.prefetch(batches, view)
        for ids in batches[:taken]:
            check(teacher, lowrank, ids, view)
        check(teacher, lowrank, batches[taken], 1 - view)


@pytest.mark.parametrize("placed", FROM_DISK)
def test_the_caller_may_use_its_tensors_again(placed: Placement, lowrank: Made) -> None:
    teacher = lowrank.cache.teacher(placement=placed)
    ids = torch.arange(COUNT)
    teacher.prefetch([ids])
    ids += 1
    ids %= COUNT
    check(teacher, lowrank, ids, 0)
    same = torch.empty(5, dtype=torch.int64)
    teacher.prefetch(same.copy_(batch) for batch in torch.split(drawn(0)[:35], 5))
    for batch in torch.split(drawn(0)[:35], 5):
        check(teacher, lowrank, batch, 0)


def test_pages_of_every_view_are_given_back(lowrank: Made, kept_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = lowrank.cache.teacher(placement="mmap")
    monkeypatch.setattr(mmap, "_RESIDENT", 0)
    for view in (0, 1):
        check(teacher, lowrank, drawn(0), view)
    mapped = Path("/proc/self/smaps").read_text().split(str(kept_here))[1:]
    assert len(mapped) == 2
    assert all("Rss:                   0 kB" in part for part in mapped)


@pytest.mark.parametrize("placed", PLACEMENTS)
@pytest.mark.parametrize("count", [1, 15, COUNT])
def test_the_order_is_of_all_ids_and_follows_from_the_seed(placed: Placement, count: int, tmp_path: Path) -> None:
    teacher = make(tmp_path, count=count, top_k="all").cache.teacher(placement=placed)

    def order(seed: int) -> list[int]:
        return teacher.order(torch.Generator().manual_seed(seed)).tolist()

    for seed in range(5):
        assert sorted(order(seed)) == list(range(count))
        assert order(seed) == order(seed)
    if count > 1:
        assert len({tuple(order(seed)) for seed in range(5)}) == 5
    generator = torch.Generator().manual_seed(0)
    assert teacher.order(generator).tolist() == order(0)
    assert count == 1 or teacher.order(generator).tolist() != order(0), "the next epoch has another"


@pytest.mark.parametrize(("size", "mixed"), [(CHUNK, 1), (CHUNK, 3), (3 * CHUNK, 2), (CHUNK, 100)])
def test_a_block_shuffled_order_mixes_whole_blocks(size: int, mixed: int, lowrank: Made) -> None:
    place: stream.StreamedRows[Rows] = stream.StreamedRows(lowrank.cache.path, lowrank.cache.manifest.plan, size, mixed)
    first_groups, neighbors = set(), 0
    for seed in range(20):
        order = place.order(torch.Generator().manual_seed(seed)).tolist()
        neighbors += sum(a // size == b // size for a, b in itertools.pairwise(order))
        first_groups.add(tuple(order[: mixed * size]))
        while order:
            blocks = list(dict.fromkeys(one // size for one in order))[:mixed]
            whole = sorted(one for one in range(COUNT) if one // size in blocks)
            assert sorted(order[: len(whole)]) == whole
            order = order[len(whole) :]
    assert len(first_groups) > 15, "blocks and rows are drawn at random"
    if mixed > 1:
        # In a random order of so many blocks of four, so many neighbors are of one block.
        assert neighbors < 1.3 * 20 * COUNT * (size - 1) / (min(mixed * size, COUNT) - 1)


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize(
    ("size", "mixed", "batch"), [(CHUNK, 1, 3), (CHUNK, 2, 3), (CHUNK, 3, 1), (3 * CHUNK, 1, 5), (CHUNK, 100, 4)]
)
def test_a_stream_reads_each_block_once_an_epoch(
    announced: bool, size: int, mixed: int, batch: int, lowrank: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    place: stream.StreamedRows[Rows] = stream.StreamedRows(lowrank.cache.path, lowrank.cache.manifest.plan, size, mixed)
    teacher = dataclasses.replace(lowrank.cache.teacher(placement="stream"), source=place)
    generator = torch.Generator().manual_seed(mixed)
    firsts = range(0, COUNT, size)
    for view in (0, 1):
        # The last block is short: where it lies not at the end, batches and blocks are out of step from there on.
        batches = torch.split(teacher.order(generator), batch)
        with monkeypatch.context() as patch:
            reads = count_reads(patch)
            if announced:
                teacher.prefetch(batches, view)
            for ids in batches:
                check(teacher, lowrank, ids, view)
        assert sorted(reads) == [(view, first, min(first + size, COUNT)) for first in firsts]
