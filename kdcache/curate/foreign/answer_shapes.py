"""Prompt log-probabilities in the answers of vLLM and SGLang, recognized by their shape.

vLLM, `prompt_logprobs`: a list with an entry per token of the prompt, None for the first. An entry maps ids to
log-probabilities, {id: {"logprob": ..., "rank": ..., "decoded_token": ...}} or {id: number}: of the prompt's own token,
and of the top k. JSON makes strings of the ids. With `flat_logprobs=True` it is one dictionary of lists instead:
`start_indices` and `end_indices` of each entry in `token_ids`, `logprobs` and `ranks`. The ids of the prompt are in
`prompt_token_ids`. A server has both in the answer, or in its one choice.

SGLang, `meta_info`: `input_token_logprobs`, a list of [log-probability, id, text] per token of the prompt from
`logprob_start_len` on, with None for the first log-probability or entry, and `input_top_logprobs`, a list of the top k
in that form per token, None for the first.

So entry i is of token i, given all before it: the row of position i - 1.

Source: vllm-project/vllm@578b601, `vllm/logprobs.py` (`Logprob`, `FlatLogprobs`, `append_logprobs_for_next_position`);
sgl-project/sglang, `srt/managers/tokenizer_manager.py`@001067f (`detokenize_top_logprobs_tokens`) and
`scheduler_output_processor_mixin.py`@004ec01 (`_process_input_token_logprobs`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

IDS = ("prompt_token_ids", "input_ids", "token_ids")
"""Names of the prompt's ids."""

_FLAT = ("start_indices", "end_indices", "token_ids", "logprobs")

_NO_RANK = 0


class ShapeError(Exception):
    """An answer does not have the shape of an engine's; the message says where."""


class Entries(NamedTuple):
    """What an answer says of the tokens of its prompt.

    Attributes:
        ids: [L] int64, of the prompt.
        first: number of the first token that has an entry, 1 or more; all after it have one.
        counts: [L - first] int64, tokens that each entry lists.
        tokens: [m] int64, these tokens, one entry after the other.
        log_probs: [m] float64.
        ranks: [m] int64, from 1; 0 where it is not stated.
        labels: [L - first] float64, log-probability of the prompt's own tokens where these are not in the list; else
            None.
    """

    ids: Array
    first: int
    counts: Array
    tokens: Array
    log_probs: Array
    ranks: Array
    labels: Array | None


def entries_of(record: Any) -> Entries:
    """Return what an answer says.

    Args:
        record: a line of a JSON lines file, or a row of a parquet file.

    Raises:
        ShapeError: if it has another shape.
    """
    if not isinstance(record, Mapping):
        raise ShapeError("it is not a dictionary")
    try:
        _check_temperature(record)
        answer = _answer(record)
        given = (part.get(name) for part in (answer, record) for name in IDS)
        ids = next((_plain(value) for value in given if value is not None), None)
        if answer.get("prompt_logprobs") is not None:
            return _of_vllm(_plain(answer["prompt_logprobs"]), ids)
        return _of_sglang(_plain(answer["input_token_logprobs"]), _plain(answer.get("input_top_logprobs")), ids)
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise ShapeError(
            f"it does not have the shape of an engine's answer ({type(error).__name__}: {error})"
        ) from None


def _plain(value: Any) -> Any:
    """Return a value whose nested lists are in a string of JSON, as some write them to parquet."""
    return json.loads(value) if isinstance(value, str) else value


def _check_temperature(record: Mapping[str, Any]) -> None:
    """Check that a request that is recorded with its answer is for log-probabilities at T = 1.

    At T = 0 both engines take T = 1 for log-probabilities.
    """
    for where in (record, *(record.get(name) for name in ("request", "sampling_params", "meta_info"))):
        for part in (where, where.get("sampling_params")) if isinstance(where, Mapping) else ():
            if not isinstance(part, Mapping):
                continue
            temperature, mode = part.get("temperature"), part.get("logprobs_mode")
            if temperature is not None and temperature not in (0, 1):
                raise ShapeError(f"it is of temperature {temperature}; only log-probabilities at T = 1 can be imported")
            if mode not in (None, "raw_logprobs"):
                raise ShapeError(f"it was made with logprobs_mode {mode}, and not raw_logprobs")


def _answer(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a record that has the log-probabilities."""
    choices = _plain(record.get("choices"))
    if isinstance(choices, Sequence) and len(choices) > 1:
        raise ShapeError(f"it has {len(choices)} choices; write one answer per line")
    inner = choices[0] if isinstance(choices, Sequence) and choices else _plain(record.get("meta_info"))
    for part in (record, inner):
        if isinstance(part, Mapping) and any(
            part.get(name) is not None for name in ("prompt_logprobs", "input_token_logprobs")
        ):
            return part
    raise ShapeError("it has neither prompt_logprobs nor input_token_logprobs")


def _of_vllm(entries: Any, ids: Any) -> Entries:
    """Return the entries of vLLM."""
    if ids is None:
        raise ShapeError(f"it does not hold the prompt's ids, under one of the names {', '.join(IDS)}")
    if isinstance(entries, Mapping):
        starts, ends, tokens, log_probs = (np.array(entries[name]) for name in _FLAT)
        counts = ends - starts
        if len(starts) and (starts[0] != 0 or (starts[1:] != ends[:-1]).any() or ends[-1] != len(tokens)):
            raise ShapeError("the start and end indices of its entries do not follow one another")
        ranks = entries.get("ranks")
        ranks = np.zeros(len(tokens), int) if ranks is None else np.array([rank or _NO_RANK for rank in ranks])
        listed = (tokens, log_probs, ranks)
    else:
        pairs = [_pairs(entry) for entry in entries]
        counts = np.array([len(some) for some in pairs])
        listed = _columns([one for some in pairs for one in some])
    return _checked(ids, counts, listed, None)


def _pairs(entry: Any) -> list[tuple[int, float, int]]:
    """Return the tokens of an entry, with log-probabilities and ranks."""
    if entry is None:
        return []
    # A map of parquet is a list of pairs, and a struct has None for the ids of other entries.
    items = entry.items() if isinstance(entry, Mapping) else entry
    return [
        (int(token), value["logprob"], value.get("rank") or _NO_RANK)
        if isinstance(value, Mapping)
        else (int(token), value, _NO_RANK)
        for token, value in items
        if value is not None
    ]


def _of_sglang(own: Any, top: Any, ids: Any) -> Entries:
    """Return the entries of SGLang, whose ranks are the places in the list."""
    if top is None:
        raise ShapeError("it has no input_top_logprobs: request them with top_logprobs_num")
    own = [[None, None] if entry is None else entry for entry in own]
    own_ids = [entry[1] for entry in own]
    if ids is None:
        ids = own_ids
    end = list(ids[len(ids) - len(own_ids) :]) if len(own_ids) <= len(ids) else []
    if [None if own_id is None else token for own_id, token in zip(own_ids, end, strict=False)] != own_ids:
        raise ShapeError("its input_token_logprobs are of other tokens than its ids")
    missing = len(ids) - len(own_ids)
    lists = [None] * missing + [entry or None for entry in top]
    if len(top) != len(own):
        raise ShapeError(f"it has {len(own)} input_token_logprobs and {len(top)} input_top_logprobs")
    counts = np.array([len(entry or ()) for entry in lists])
    pairs = [(pair[1], pair[0], rank) for entry in lists for rank, pair in enumerate(entry or (), 1)]
    labels = np.array([np.nan] * missing + [np.nan if entry[0] is None else entry[0] for entry in own], np.float64)
    return _checked(ids, counts, _columns(pairs), labels)


def _columns(listed: list[tuple[int, float, int]]) -> tuple[Array, Array, Array]:
    """Return tokens, log-probabilities and ranks of a list of them."""
    tokens, log_probs, ranks = zip(*listed, strict=True) if listed else ((), (), ())
    return np.array(tokens), np.array(log_probs), np.array(ranks)


def _checked(ids: Any, counts: Array, listed: tuple[Array, Array, Array], labels: Array | None) -> Entries:
    """Return entries of all tokens but the first ones."""
    tokens, log_probs, ranks = listed
    of_prompt = np.array(ids)
    integers = (of_prompt, tokens, ranks)
    if of_prompt.ndim != 1 or any(not np.issubdtype(array.dtype, np.integer) for array in integers if array.size):
        raise ShapeError("its ids and ranks are not lists of integers")
    if len(counts) != len(of_prompt):
        raise ShapeError(f"it has {len(counts)} entries for the {len(of_prompt)} tokens of the prompt")
    if not len(log_probs) == len(tokens) == len(ranks) == counts.sum() or (counts < 0).any():
        raise ShapeError("its lists of tokens, log-probabilities and ranks have different lengths")
    first = int(np.argmax(counts > 0)) if counts.any() else len(counts)
    if first >= len(counts):
        raise ShapeError("none of its tokens has log-probabilities")
    if (counts[first:] == 0).any():
        missing = first + int(np.argmax(counts[first:] == 0))
        raise ShapeError(f"token {missing} has no log-probabilities, and those before it have")
    if first == 0:
        raise ShapeError("its first token has log-probabilities, which no token comes before")
    return Entries(
        of_prompt.astype(np.int64),
        first,
        counts[first:].astype(np.int64),
        tokens.astype(np.int64),
        log_probs.astype(np.float64),
        ranks.astype(np.int64),
        None if labels is None else labels[first:],
    )
