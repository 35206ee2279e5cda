"""Teacher scores of Margin-MSE: one line per triple of a query, a positive and a negative passage.

    POSITIVE_SCORE <tab> NEGATIVE_SCORE <tab> QUERY <tab> POSITIVE_PASSAGE <tab> NEGATIVE_PASSAGE

The file states each score of a pair (query, passage) once per triple that the pair is in. A cache has one sample and
one score per pair, and a triple is a group of two samples.

Source: sebastian-hofstaetter/neural-ranking-kd@aafcc73 (README; the published scores are on Zenodo, record 4068216).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kdcache.cache.preconditions import check_place
from kdcache.cache.reader import Cache
from kdcache.config.cache import CacheSpec, OutputSpec
from kdcache.config.transform import Transform
from kdcache.curate.dense_logits import cache_of_arrays
from kdcache.curate.logit_files import LogitFile
from kdcache.curate.scratch import scratch_file
from kdcache.data.samples import Samples
from kdcache.data.transforms import is_random
from kdcache.dump.noise import refuse_noise
from kdcache.dump.plan import teacher_by_hearsay
from kdcache.errors import CorruptError, MismatchError, UsageError, counted
from kdcache.runtime.progress import Progress, Silent, delayed_task
from kdcache.runtime.terminal import reporter

OUTPUT = "scores"
"""Name of the output in the cache."""

_LINES_AT_ONCE = 2**16
_TOLERANCE = 1e-3
"""Largest difference between two scores of one pair, as a fraction of the range of all: what half precision leaves."""

_LAYOUT = "POSITIVE_SCORE NEGATIVE_SCORE QUERY POSITIVE_PASSAGE NEGATIVE_PASSAGE, separated by tabs"


class MarginMSEScores(NamedTuple):
    """The content of a file of teacher scores.

    Attributes:
        queries: [Q] ids of the queries.
        passages: [D] ids of the passages.
        pairs: [P, 2] int64, query and passage of each pair, as indices of the above, in the order of the file.
        triples: [M, 2] int64, the positive and the negative pair of each line, as indices of `pairs`.
        scores: [P] float32, of the pairs.
    """

    queries: tuple[str, ...]
    passages: tuple[str, ...]
    pairs: npt.NDArray[np.int64]
    triples: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]

    def sample_names(self) -> npt.NDArray[np.str_]:
        """Return the names by which the importer finds the score of a sample, [P]: "QUERY<tab>PASSAGE"."""
        return np.array([f"{self.queries[query]}\t{self.passages[passage]}" for query, passage in self.pairs.tolist()])


def read_margin_mse(path: str | Path, *, progress: Progress | bool | None = None) -> MarginMSEScores:
    """Read a file of teacher scores of triples.

    Args:
        path: tab-separated text, as in the head of this module.
        progress: True to show progress on stderr, or a progress reporter; silent if None.

    Raises:
        UsageError: if the file is not found.
        CorruptError: if a line is not a triple, or a score is not finite; names it.
        MismatchError: if two scores of one pair differ by more than rounding.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"file not found: {path}", "pass the file of teacher scores, one triple per line")
    queries: dict[str, int] = {}
    passages: dict[str, int] = {}
    scores, codes = [], []
    with delayed_task(reporter(progress), f"reading {path.name}", path.stat().st_size, "bytes") as task:
        for first, lines in _blocks(path):
            columns = _columns(lines)
            if columns is None:
                raise _malformed(path, first, lines)
            scores.append(columns.scores)
            of_passages = (_numbered(names, passages) for names in (columns.positive, columns.negative))
            codes.append((_numbered(columns.query, queries) << 32)[:, None] + np.stack([*of_passages], axis=1))
            task.advance(sum(map(len, lines)))
    if not codes:
        raise CorruptError(f"{path} is empty", f"each line is a triple: {_LAYOUT}")
    return _of_pairs(path, tuple(queries), tuple(passages), np.concatenate(codes), np.concatenate(scores))


def _blocks(path: Path) -> Iterator[tuple[int, list[bytes]]]:
    """Yield blocks of lines, each with the number of its first one, counted from 1."""
    with path.open("rb") as file:
        first = 1
        while lines := list(islice(file, _LINES_AT_ONCE)):
            yield first, lines
            first += len(lines)


class _Columns(NamedTuple):
    """The fields of m lines: `scores` [m, 2] float32, and three lists of m ids."""

    scores: npt.NDArray[np.float32]
    query: list[str]
    positive: list[str]
    negative: list[str]


def _columns(lines: Sequence[bytes]) -> _Columns | None:
    """Return the columns of lines; None if one of them is not a triple."""
    if any(line.count(b"\t") != 4 for line in lines):
        return None
    try:
        # Split in one call: a file of the size of MS MARCO has 40 million lines.
        fields = b"\t".join(line.rstrip(b"\r\n") for line in lines).decode().split("\t")
        scores = np.array([list(map(float, fields[column::5])) for column in (0, 1)])
    except ValueError:  # no number, or no text
        return None
    with np.errstate(over="ignore"):
        columns = _Columns(scores.T.astype(np.float32), *(fields[column::5] for column in (2, 3, 4)))
    whole = np.isfinite(columns.scores).all() and "" not in columns.query and "" not in columns.positive
    return columns if whole and "" not in columns.negative and not _compares_equals(columns) else None


def _compares_equals(columns: _Columns) -> bool:
    return any(map(operator.eq, columns.positive, columns.negative))


def _numbered(names: Sequence[str], numbers: dict[str, int]) -> npt.NDArray[np.int64]:
    """Return the number of each name; names that have none yet get the next ones."""
    new = [name for name in dict.fromkeys(names) if name not in numbers]
    numbers.update(zip(new, range(len(numbers), len(numbers) + len(new)), strict=True))
    return np.fromiter(map(numbers.__getitem__, names), np.int64, len(names))


def _malformed(path: Path, first: int, lines: Sequence[bytes]) -> CorruptError:
    """Return the error for the first line that is not a triple; `first` is the number of the first of all."""
    offset, line = next((offset, line) for offset, line in enumerate(lines) if _columns([line]) is None)
    where = f"line {first + offset} of {path}"
    shown = line.decode(errors="backslashreplace").rstrip("\r\n")
    fields = shown.split("\t")
    if len(fields) == 5 and "" not in fields:
        if fields[3] == fields[4]:
            return CorruptError(f"{where} compares the passage {fields[3]} with itself", "remove the line")
        return CorruptError(f"{where} has the scores {fields[0]}, {fields[1]}", "scores must be finite float32 numbers")
    return CorruptError(f"{where} is not a triple: {shown[:80]!r}", f"each line is {_LAYOUT}")


def _of_pairs(
    path: Path,
    queries: tuple[str, ...],
    passages: tuple[str, ...],
    codes: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
) -> MarginMSEScores:
    """Return the pairs of triples [M, 2], each of which is coded as 2^32 * query + passage, and one score of each."""
    found, first, index = np.unique(codes.ravel(), return_index=True, return_inverse=True)
    order = np.argsort(first)  # pairs in the order of the file
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    of_pairs, every = scores.ravel()[first], scores.ravel()
    apart = np.abs(every - of_pairs[index])
    if apart.max() > _TOLERANCE * np.ptp(every):
        worst = int(apart.argmax())
        raise MismatchError(
            f"line {worst // 2 + 1} of {path} has the score {every[worst]:.6g} for a pair that line "
            f"{first[index[worst]] // 2 + 1} has with {of_pairs[index[worst]]:.6g}",
            "use the scores of one teacher, in one run",
        )
    pairs = np.stack([found[order] >> 32, found[order] & 0xFFFFFFFF], axis=1)
    return MarginMSEScores(queries, passages, pairs, rank[index].reshape(codes.shape), of_pairs[order])


def cache_of_scores(
    source: str | Path,
    samples: Samples,
    out: str | Path,
    *,
    name: str | None = None,
    transform: Transform | None = None,
    spec: CacheSpec | None = None,
    scheduler: str = "threads",
    progress: Progress | None = None,
) -> Cache:
    """Make a cache of the output `scores` from a file of triples: one score for each sample, which is a pair.

    If interrupted at any moment, the same call resumes at the first unfinished shard.

    Args:
        source: the file.
        samples: pairs, whose `sample_names` are "QUERY<tab>PASSAGE"; they may be some of the file's, in any order.
        out: folder of the cache.
        name: name of the teacher; None for the name of the file.
        transform: of the samples; None for their own.
        spec: `shard_rows`, `license` and `notes` are used.
        scheduler: backend; see `parallel.over`.
        progress: progress reporter; silent if None.

    Raises:
        UsageError: if the samples have no names, their transform is random, or `spec` names outputs.
        MismatchError: if the file has no score for a sample, or `out` was started with other settings.
        CorruptError: if the file is malformed; names the line.
    """
    source, out, spec, progress = Path(source), Path(out), spec or CacheSpec(), progress or Silent()
    refuse_noise(spec)
    if spec.outputs:
        raise UsageError(
            f"the pipeline names the outputs {', '.join(spec.outputs)}, and a file of margin-mse has the scores of one "
            f"teacher, which become the output {OUTPUT}",
            "remove cache.outputs",
        )
    transform = samples.transform if transform is None else transform
    check_place(out)
    out = out.absolute()
    if is_random(transform):
        raise UsageError("the scores of a file are of one view, and the transform is random", "remove `transform`")
    scores = _scores_of(samples, read_margin_mse(source, progress=progress), source, progress)
    spec = spec.model_copy(update={"logits": False, "outputs": {OUTPUT: OutputSpec(kind="score")}})
    teacher = teacher_by_hearsay(name or source.stem, "by margin-mse")
    with scratch_file(out.with_name(f"{out.name}.{OUTPUT}")) as array:
        with array.open("wb") as file:
            np.save(file, scores)
        opened = LogitFile(source, array, (1, len(scores), 1), "float32", None, None, None)
        keys, described = samples.keys(progress), {"from": "margin-mse"}
        return cache_of_arrays({OUTPUT: opened}, samples, keys, out, transform, spec, teacher, described, scheduler)


def _scores_of(samples: Samples, file: MarginMSEScores, source: Path, progress: Progress) -> npt.NDArray[np.float32]:
    """Return the score of each sample, [N].

    Raises:
        UsageError: if the samples have no names.
        MismatchError: if a sample is in no triple of the file.
    """
    where = f"{samples.name}/{samples.split}"
    if samples.sample_names is None:
        raise UsageError(
            f"the samples of {where} have no names, so that their scores cannot be found in {source}",
            "store sample_names=[N] beside x in the npz file, or give the data set an attribute sample_names: "
            "kdcache.read_margin_mse(FILE).sample_names() are those of all pairs",
        )
    queries = {name: index for index, name in enumerate(file.queries)}
    passages = {name: index for index, name in enumerate(file.passages)}
    parts = [name.split("\t") for name in samples.sample_names.tolist()]
    wanted = np.array(
        [(queries.get(each[0], -1), passages.get(each[1], -1)) if len(each) == 2 else (-1, -1) for each in parts]
    )
    codes, coded = (pairs[:, 0] << 32 | pairs[:, 1] for pairs in (wanted, file.pairs))
    order = np.argsort(coded)
    at = order[np.searchsorted(coded, codes, sorter=order).clip(max=len(coded) - 1)]
    missing = np.flatnonzero((wanted < 0).any(axis=1) | (coded[at] != codes))
    if len(missing):
        raise MismatchError(
            f"{source} has no score for {counted(len(missing), 'sample')} of {where}, first sample {missing[0]} "
            f"({str(samples.sample_names[missing[0]])!r})",
            'name each sample "QUERY<tab>PASSAGE" with the ids of the file, and leave out pairs that it does not score',
        )
    if unused := len(file.pairs) - len(samples):
        progress.say(f"note: {unused:,} of the {len(file.pairs):,} pairs of {source} are not in {where}")
    scores: npt.NDArray[np.float32] = file.scores[at]
    return scores
