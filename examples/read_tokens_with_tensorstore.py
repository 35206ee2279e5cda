"""Read a cache of sequences with TensorStore and NumPy (docs/FORMAT.md, 12): python FILE CACHE [SEQUENCE] [T]"""

import json
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import tensorstore

logsumexp = np.logaddexp.reduce


def read(cache: Path, sequence: int, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tokens [L] of a sequence, its taught positions [n], and log-probabilities of the next token [n, P]."""
    written = (cache / "manifest.json").read_bytes()
    manifest = json.loads(written)
    root = sha256(written[:-68] + b"0" * 64 + written[-4:]).hexdigest()
    changed = [n for n, f in manifest["files"].items() if sha256((cache / n).read_bytes()).hexdigest() != f["sha256"]]
    if manifest["plan"]["format_version"] != 1 or manifest["digest"] != f"sha256:{root}" or changed:
        raise ValueError(f"{cache} is damaged, or not of version 1 {changed}")
    of, per_shard = manifest["plan"]["sequences"], manifest["plan"]["shape"]["shard_rows"]
    (name, output), *_ = manifest["plan"]["outputs"].items()
    shard, before = sequence // per_shard, slice(sequence // per_shard * per_shard, sequence)

    def opened(array: str) -> tensorstore.TensorStore:
        folder = (cache / "data.zarr" / array).absolute().as_uri()
        return tensorstore.open({"driver": "zarr3", "kvstore": f"{folder}/", "fill_missing_data_reads": False}).result()

    def place(counts: str, numbers: list[int], chunk: int) -> slice:
        every, room = opened(counts)[...].read().result().astype(int), -(-max(numbers) // chunk) * chunk
        begin = shard * room + every[before].sum()
        return slice(begin, begin + every[sequence])

    at, rows = place("token_count", of["tokens"], of["token_chunk"]), place("row_count", of["rows"], of["row_chunk"])
    tokens, taught = (opened(array)[0, at].read().result() for array in ("tokens", "taught"))

    def part(array: str) -> np.ndarray:
        return opened(f"outputs/{name}/{array}")[0, rows].read().result().astype(float)

    encoding = output["encoding"]
    if temperature < 1 or (temperature not in encoding["temperatures"] and len(encoding["temperatures"]) == 1):
        raise ValueError(f"T = {temperature} is not known of these rows")
    head, indices, statistics = part("log_probs"), part("indices").astype(int), part("statistics")
    masses = np.minimum(statistics[:, -len(encoding["temperatures"]) :], -(2.0**-24))
    betas = 1 / np.array(encoding["temperatures"])
    of_head = logsumexp(head[:, None] * betas[:, None], axis=2)
    points = np.column_stack([of_head + masses - np.log(-np.expm1(masses)), of_head[:, 0] * 0])
    points[:, -1] = np.log(encoding["num_classes"] - encoding["top_k"])  # of beta = 0
    polynomials = np.polyfit([*betas, 0], points.T, len(betas))
    scaled = head / temperature
    tail = np.array([np.polyval(polynomial, 1 / temperature) for polynomial in polynomials.T])[:, None]
    shape = np.zeros((len(head), encoding["num_classes"]))
    if encoding["tail"] == "lowrank":
        mean, scale, basis = (
            opened(f"outputs/{name}/tail_{array}")[...].read().result().astype(float)
            for array in ("mean", "scale", "basis")
        )
        shape = (mean + (part("tail") * scale) @ basis) / temperature
    np.put_along_axis(shape, indices, -np.inf, axis=1)
    for _ in range(4):  # no token of the tail is above the last of the head
        shape = np.minimum(shape + tail - logsumexp(shape, axis=1, keepdims=True), scaled[:, -1:])
    np.put_along_axis(shape, indices, scaled, axis=1)
    return tokens, np.flatnonzero(taught), shape - logsumexp(shape, axis=1, keepdims=True)


if __name__ == "__main__":
    path, number, tau = [*sys.argv[1:], "0", "1"][:3] if len(sys.argv) == 2 else [*sys.argv[1:], "1"][:3]
    _, where, log_probs = read(Path(path), int(number), float(tau))
    for position, row in list(zip(where, log_probs, strict=True))[:10]:
        sys.stdout.write(f"position {position}: token {row.argmax()}, p {np.exp(row.max()):.4f}\n")
