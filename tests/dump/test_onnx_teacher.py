"""A session of ONNX Runtime as teacher: kdcache sees neither its weights nor its code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import FLIP, tiny_samples
from torch import Tensor, nn

from kdcache import dump_teacher
from kdcache.dump.check_teacher import check_identity
from kdcache.errors import IncompleteError, MismatchError
from kdcache.models.teacher import as_network

pytestmark = pytest.mark.real

CLASSES = 10


def needed(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install 'kdcache[real]'")


def weights(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=(16, CLASSES)).astype(np.float32)


def session(folder: Path, seed: int, quantized: bool) -> Any:
    """A linear network in an ONNX file; `quantized` to int8 with a scale that depends on the batch."""
    onnx, runtime = needed("onnx"), needed("onnxruntime")
    helper, path = onnx.helper, folder / f"{seed}.onnx"
    images = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["B", 1, 4, 4])
    logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["B", CLASSES])
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    held = onnx.numpy_helper.from_array(weights(seed), "weight")
    graph = helper.make_graph(nodes, "teacher", [images], [logits], [held])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, path)
    if quantized:
        quantization = needed("onnxruntime.quantization")
        quantization.quantize_dynamic(path, folder / f"{seed}-int8.onnx")
        path = folder / f"{seed}-int8.onnx"
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


class Wrapped(nn.Module):
    """The usual way to make a module of a session."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self.session.run(None, {"images": images.cpu().numpy()})
        return torch.from_numpy(logits).to(images.device)


def function(session: Any) -> Callable[[Tensor], Any]:
    return lambda images: session.run(None, {"images": images.numpy()})[0]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("wrap", [Wrapped, function])
def test_a_session_is_recognized_by_its_logits(wrap: Callable[[Any], Any], quantized: bool, tmp_path: Path) -> None:
    first, second = (session(tmp_path, seed, quantized) for seed in (1, 2))
    out, samples = tmp_path / "c.kdcache", tiny_samples()
    options: dict[str, Any] = {"transform": FLIP, "shard_rows": 8, "batch_size": 5}
    stopped = wrap(first)

    def fails(images: Tensor) -> Any:
        if len(images) > 1 and int(images[:, 0, 0].max() * 8) >= 30:
            raise IncompleteError("the session is lost", "start it again")
        return stopped(images)

    with pytest.raises(IncompleteError, match="the session is lost"):
        dump_teacher(fails, samples, out, **options)
    with pytest.raises(MismatchError, match="was begun with"):
        dump_teacher(wrap(second), samples, out, **options)
    cache = dump_teacher(wrap(first), samples, out, **options)
    once = dump_teacher(wrap(first), samples, tmp_path / "once.kdcache", **options)
    assert cache.manifest.digest == once.manifest.digest
    assert cache.manifest.plan.teacher.weights == "none"

    if not quantized:
        expected = samples.images.pixels.flatten(1) @ torch.from_numpy(weights(1))  # type: ignore[attr-defined]
        plain = dump_teacher(wrap(first), samples, tmp_path / "plain.kdcache", dtype="float32")
        torch.testing.assert_close(plain.teacher()(torch.arange(37)), expected, rtol=1e-5, atol=1e-5)

    more = options | {"views": 2, "extends": cache}
    with pytest.raises(MismatchError, match="was made with"):
        dump_teacher(wrap(second), samples, tmp_path / "more.kdcache", **more)
    dump_teacher(wrap(first), samples, tmp_path / "more.kdcache", **more)
    found = check_identity(cache, as_network(wrap(first)), samples)
    assert found is not None
    assert found.relative < 1e-6
    with pytest.raises(MismatchError, match="was made with"):
        check_identity(cache, as_network(wrap(second)), samples)
