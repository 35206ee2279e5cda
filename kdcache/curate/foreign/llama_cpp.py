"""Log-probabilities that llama.cpp stores to judge quantizations: `llama-perplexity --kl-divergence-base FILE`.

    "_logits_", n_ctx, n_vocab, n_chunk (int32), tokens [n_chunk, n_ctx] (int32), then for each chunk and each position
    from n_ctx / 2 to n_ctx - 2: scale, lowest (float32), q [n_vocab] (uint16; one more of them if n_vocab is odd)

A log-probability is scale * q + lowest. All that is 16 nats or more below the largest of its row has q = 0. Its total
mass is 1 less that of the others, but how it is shared is not known: of SmolLM2-135M 72 % of the tokens are there, and
have a mass that is 0.08 wrong at T = 2 if `lowest` is taken for each. So the rows are of T = 1.

If the tokenizer adds BOS, llama.cpp puts it in the place of the first token of each chunk, and stores the one that was
there. The file does not say so.

Source: ggml-org/llama.cpp@050fc7f, tools/perplexity/perplexity.cpp (`log_softmax`, `process_logits`, `perplexity`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdcache.cache.format.verified_files import record_of
from kdcache.cache.reader import Cache
from kdcache.cache.token_spec import TokenCacheSpec
from kdcache.curate.sequence_cache import Array, Origin, cache_of_sequences
from kdcache.errors import CorruptError, UsageError
from kdcache.runtime.progress import Progress, Silent

_MAGIC = b"_logits_"
_HEADER_BYTES = 20
_MOST = 2**31 - 1

_SUM_TOLERANCE = 0.01
"""By how much the probabilities of a row may exceed 1, or fall short of it; steps of 2.4e-4 nats make 1e-4."""

_RANGE = 16.0
"""Nats below the largest log-probability of a row, beyond which all are the same."""

_MOST_BELOW = 8.0
"""Nats below `lowest`, at most, of the tokens there: their mass may be less than the rounding errors of all others."""

_TINY = 1e-30

_GET_AGAIN = "write the file again with llama-perplexity, which does not notice a full disk"


class KldFile:
    """A file of log-probabilities; its rows are read when they are asked for.

    Args:
        path: the file.
        bos: id of BOS, if llama.cpp puts it in the place of the first token of each chunk; else None.

    Raises:
        UsageError: if it is not such a file, or has no such token.
        CorruptError: if it is truncated, or has tokens that are not in its vocabulary.
    """

    def __init__(self, path: Path, bos: int | None) -> None:
        if not path.is_file():
            raise UsageError(f"file not found: {path}", "pass the file that llama-perplexity wrote")
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES or not header.startswith(_MAGIC):
            raise UsageError(
                f"{path} is not a file of llama.cpp's log-probabilities",
                "write one with llama-perplexity -m MODEL -f TEXT --kl-divergence-base FILE",
            )
        self.path, self._bos = path, bos
        self.context, self.size, self.chunks = (int(number) for number in np.frombuffer(header, "<i4", 3, 8))
        if not (4 <= self.context < _MOST and 2 <= self.size < _MOST and 1 <= self.chunks < _MOST):
            raise CorruptError(
                f"{path} states {self.chunks} chunks of {self.context} tokens of {self.size}", _GET_AGAIN
            )
        self.first = self.context // 2
        self._width = 2 * ((self.size + 1) // 2) + 4
        self._rows = self.context - 1 - self.first
        self._begin = _HEADER_BYTES + 4 * self.chunks * self.context
        expected = self._begin + 2 * self.chunks * self._rows * self._width
        if (found := path.stat().st_size) != expected:
            raise CorruptError(f"{path} has {found:,} bytes, and its header states {expected:,}", _GET_AGAIN)
        if bos is not None and not 0 <= bos < self.size:
            raise UsageError(f"BOS is {bos}, and the vocabulary has {self.size:,} tokens", "pass the id of BOS")

    def __len__(self) -> int:
        return self.chunks

    def tokens(self, index: int) -> tuple[Array, Array]:
        """Return the tokens of a chunk as the model saw them, and which positions are taught."""
        ids = np.fromfile(self.path, "<i4", self.context, offset=_HEADER_BYTES + 4 * index * self.context)
        if ids.min() < 0 or ids.max() >= self.size:
            raise CorruptError(
                f"{self.path} has tokens from {ids.min()} to {ids.max()} of {self.size:,} in chunk {index}", _GET_AGAIN
            )
        if self._bos is not None:
            ids[0] = self._bos
        position = np.arange(self.context)
        return ids, (position >= self.first) & (position < self.context - 1)

    def logits(self, index: int) -> Tensor:
        """Return the log-probabilities of a chunk, [n, V] float32; the mass of those with q = 0 is shared evenly.

        Raises:
            CorruptError: if the probabilities of a row do not add up to 1; names it.
        """
        count = self._rows * self._width
        stored = np.fromfile(self.path, "<u2", count, offset=self._begin + 2 * index * count)
        stored = stored.reshape(self._rows, self._width)
        scale, lowest = np.ascontiguousarray(stored[:, :4]).view("<f4").T.astype(np.float32)
        steps = stored[:, 4 : 4 + self.size]
        log_probs = torch.from_numpy(steps.astype(np.float32) * scale[:, None] + lowest[:, None])
        at_floor = torch.from_numpy(steps == 0)
        known = log_probs.double().exp().masked_fill_(at_floor, 0.0).sum(dim=1)
        floor, count_at_floor = torch.from_numpy(lowest).double(), at_floor.sum(dim=1)
        least = known + count_at_floor * floor.exp()
        wrong = ~((scale >= 0) & np.isfinite(scale) & np.isfinite(lowest))
        wrong |= ~((known <= 1 + _SUM_TOLERANCE) & (least >= 1 - _SUM_TOLERANCE)).numpy()
        if wrong.any():
            where = f"chunk {index}, position {self.first + int(wrong.argmax())}"
            raise CorruptError(f"{self.path} does not hold probabilities that add up to 1: {where}", _GET_AGAIN)
        share = ((1 - known).clamp_min(_TINY) / count_at_floor.clamp_min(1)).log()
        share = share.maximum(floor - _MOST_BELOW).minimum(floor)
        # In a row of a smaller range, q = 0 is the least log-probability itself.
        is_exact = torch.from_numpy(scale * np.float32(65535) < _RANGE * (1 - 1e-5))
        share = torch.where(is_exact, floor, share)
        return torch.where(at_floor, share.float().unsqueeze(1), log_probs)


def cache_of_kld(
    source: str | Path,
    out: str | Path,
    *,
    bos: int | None,
    name: str | None = None,
    spec: TokenCacheSpec | None = None,
    progress: Progress | None = None,
) -> Cache:
    """Make a cache of sequences from a file of llama.cpp: each chunk is one, taught in its second half.

    The rows are of T = 1; see the head of this module. If interrupted, the same call resumes.

    Args:
        source: the file.
        out: folder of the cache.
        bos: id of BOS, if the tokenizer of the model adds it; None if it does not.
        name: name of the teacher; None for the name of the file.
        spec: how rows are stored; the defaults if None.
        progress: progress reporter; silent if None.

    Raises:
        UsageError: if the file is another, or `out` is something else.
        MismatchError: if `out` was started with other settings.
        CorruptError: if the file is damaged; names the chunk.
    """
    source = Path(source)
    file = KldFile(source, bos)
    precision = "by llama.cpp, log-probabilities in steps of 16 nats / 65535"
    origin = Origin.of_files(source, "llama-cpp", record_of(source).sha256, name, precision, bos=bos)
    special = {} if bos is None else {"bos": bos}
    return cache_of_sequences(file, out, origin, file.size, special, spec, progress or Silent())
