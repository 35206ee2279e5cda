"""Read a cache with TensorStore and NumPy alone (docs/FORMAT.md): python read_with_tensorstore.py CACHE [VIEW]"""

import json
import sys
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import tensorstore

logsumexp = partial(np.logaddexp.reduce, axis=1, keepdims=True)


def read(cache: Path, view: int = 0) -> np.ndarray:
    """The teacher's logits of all samples in a view, [N, C] float32; every file that is listed is checked first."""
    written = (cache / "manifest.json").read_bytes()
    manifest, data = json.loads(written), {}
    root = sha256(written[:-68] + b"0" * 64 + written[-4:]).hexdigest()
    changed = [n for n, f in manifest["files"].items() if sha256((cache / n).read_bytes()).hexdigest() != f["sha256"]]
    if manifest["plan"]["format_version"] != 1 or manifest["digest"] != f"sha256:{root}" or changed:
        raise ValueError(f"{cache} is damaged, or not of version 1 {changed}")
    for folder in (path.parent for path in (cache / "data.zarr").glob("*/zarr.json")):
        spec = {"driver": "zarr3", "kvstore": f"{folder.absolute().as_uri()}/", "fill_missing_data_reads": False}
        array = tensorstore.open(spec).result()
        data[folder.name] = (array[view] if array.domain.labels[0] == "view" else array).read().result()
    columns = json.loads((cache / "data.zarr/statistics/zarr.json").read_text())["attributes"]["columns"]
    column = dict(zip(columns, data["statistics"].astype(float).T[:, :, None], strict=True))  # each [N, 1]
    encoding, x = manifest["plan"]["encoding"], data["log_probs"].astype(float)
    if encoding["tail"] != "none":
        head, indices, labels = x, data["indices"].astype(int), data["labels"][:, None]
        x, last, mass = np.zeros((len(head), encoding["num_classes"])), head[:, -1:], column["tail_log_mass_t1"]
        if encoding["tail"] == "lowrank":
            x += data["tail_mean"] + (data["tail"] * data["tail_scale"]) @ data["tail_basis"].astype(float)
        is_label = labels == np.arange(x.shape[1])
        x[is_label] = -np.inf
        np.put_along_axis(x, indices, -np.inf, axis=1)
        in_tail = x > -np.inf
        for _ in range(3):
            x = np.minimum(x - np.maximum(logsumexp(x), -1e30) + mass, last)
        share, wanted = np.exp(x - last), np.exp(mass - last)
        missing, room = wanted - share.sum(1, keepdims=True), (in_tail * (1 - share)).sum(1, keepdims=True)
        given = share + (1 - share) * np.clip(missing / np.maximum(room, 1e-30), 0, 1)
        filled = in_tail & (wanted > 1) & (missing > 5e-4 * wanted)
        x[filled] = (last + np.log(np.maximum(given, 1e-300)))[filled]
        x[is_label] = np.minimum(column["label_log_prob"], last)[labels >= 0]
        np.put_along_axis(x, indices, head, axis=1)
    if encoding["dtype"] == "uint8":
        x = column["log_prob_max"] - x * column["log_prob_range"] / 255
        x = x - logsumexp(x)
    if encoding["dtype"] == "float16":
        entropy = -(np.exp(x) * x).sum(1, keepdims=True)
        x = x * (1 + np.clip(logsumexp(x) / np.maximum(entropy, 1e-30), -(2**-11), 2**-11))
    return np.asarray(x + data["logsumexp"][:, None], np.float32)


if __name__ == "__main__":
    for sample, row in enumerate(read(Path(sys.argv[1]), int([*sys.argv, "0"][2]))[:10]):
        sys.stdout.write(f"sample {sample}: class {row.argmax()}, p {1 / np.exp(row - row.max()).sum():.4f}\n")
