"""Read a cache with TensorStore and NumPy alone (docs/FORMAT.md): python read_with_tensorstore.py CACHE [VIEW]"""

import json
import sys
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import tensorstore

logsumexp = partial(np.logaddexp.reduce, axis=1, keepdims=True)
total = partial(np.sum, axis=1, keepdims=True)


def read(cache: Path, view: int = 0) -> np.ndarray:
    """Return the teacher's logits of all samples in a view, [N, C] float32, after a check of every listed file."""
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
        x, wanted, raised = x - np.maximum(logsumexp(x), -1e30) + mass, np.exp(mass - last), 0 * mass
        of_cap = np.exp(np.clip(x - last, -80, 0))
        for _ in range(3):
            below = x + raised < last
            raised = np.clip(np.log(np.maximum(wanted - total(~below), 1e-30) / total(of_cap * below)), 0, 40)
        x, of_cap = np.minimum(x + raised * (wanted > 1), last), np.minimum(of_cap * np.exp(raised), 1)
        missing, room = wanted - total(of_cap), total((x > -np.inf) * (1 - of_cap))
        drawn = of_cap + (1 - of_cap) * np.clip(missing / np.maximum(room, 1e-30), 0, 1)
        x = np.where((wanted > 1) & (missing > 5e-4 * wanted), last + np.log(drawn), x)
        x[is_label] = np.minimum(column["label_log_prob"], last)[labels >= 0]
        np.put_along_axis(x, indices, head, axis=1)
    if encoding["dtype"] == "uint8":
        x = column["log_prob_max"] - x * column["log_prob_range"] / 255
        x = x - logsumexp(x)
    if encoding["dtype"] == "float16":
        x = x * (1 + np.clip(logsumexp(x) / np.maximum(total(-x * np.exp(x)), 1e-30), -(2**-11), 2**-11))
    return np.asarray(x + data["logsumexp"][:, None], np.float32)


if __name__ == "__main__":
    for sample, row in enumerate(read(Path(sys.argv[1]), int([*sys.argv, "0"][2]))[:10]):
        sys.stdout.write(f"sample {sample}: class {row.argmax()}, p {1 / np.exp(row - row.max()).sum():.4f}\n")
