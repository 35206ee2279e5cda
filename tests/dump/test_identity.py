"""A teacher is told from another by what it returns: its weights may be out of reach, or be used in another way."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import requests
import torch
from helpers.cli import kdcache, ok, refused
from helpers.interrupts import StopsAfter
from helpers.processes import command_line, exit_code, in_a_process
from helpers.ranks import torchrun
from helpers.tiny import FLIP
from torch import Tensor, nn

from kdcache import Cache, Samples, dump_teacher, open_cache
from kdcache.cache.format.schema import NO_WEIGHTS, PROBES
from kdcache.cache.inspect.card import card
from kdcache.config.cache import CacheSpec
from kdcache.data.images import ArrayImages
from kdcache.dump.check_teacher import check_identity, compare_with_teacher
from kdcache.dump.probes import probe_ids
from kdcache.errors import InterruptedRun, MismatchError, UsageError
from kdcache.models import Ensemble, weights_digest
from kdcache.models.teacher import as_network, has_weights

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")

CLASSES, COUNT = 12, 40

SPEC = CacheSpec(shard_rows=8, batch_size=5, seed=3)

Function = Callable[[Tensor], Any]


class Net(nn.Module):
    """A small CNN; `mean` and `std` are no weights, as in many models that prepare their images themselves."""

    def __init__(self, seed: int, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.body((images - self.mean) / self.std)
        return 4 * logits


def frozen(seed: int) -> nn.Module:
    """A TorchScript module whose weights have become constants of its program."""
    script: nn.Module = torch.jit.freeze(torch.jit.script(Net(seed).eval()))
    return script


def frozen_file(seed: int) -> nn.Module:
    """One that was saved and loaded."""
    file = io.BytesIO()
    torch.jit.save(frozen(seed), file)
    file.seek(0)
    loaded: nn.Module = torch.jit.load(file)  # type: ignore[no-untyped-call]
    return loaded


def function(seed: int) -> Function:
    """A plain function that returns a NumPy array, as a session of another library does."""
    net = Net(seed).eval()
    return lambda images: net(images).numpy()


def hidden(seed: int) -> nn.Module:
    """A module that keeps its network where its state dict does not see it."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = [Net(seed).eval()]

        def forward(self, images: Tensor) -> Tensor:
            return self.held[0](images)  # type: ignore[no-any-return]  # a Module's call is untyped

    return Hidden()


def ensemble(seed: int) -> nn.Module:
    """An ensemble whose second member is frozen; the first and the shares are the same for every seed."""
    return Ensemble([Net(0), frozen(seed)], [1, 2], "logits", ["a", "b"], CLASSES)


class _Server(BaseHTTPRequestHandler):
    """Answers images with the logits of the network whose seed is the path."""

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        images = torch.frombuffer(bytearray(sent), dtype=torch.float32).reshape(-1, 3, 8, 8)
        with torch.no_grad():
            logits: bytes = Net(int(self.path[1:])).eval()(images).numpy().tobytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(logits)))
        self.end_headers()
        self.wfile.write(logits)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("localhost", 0), _Server) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://localhost:{http.server_port}"
        http.shutdown()


def endpoint(url: str, seed: int) -> Function:
    def ask(images: Tensor) -> Tensor:
        answer = requests.post(f"{url}/{seed}", data=images.numpy().tobytes(), timeout=60)
        return torch.frombuffer(bytearray(answer.content), dtype=torch.float32).reshape(len(images), CLASSES)

    return ask


def other_pixels(seed: int) -> nn.Module:
    """The same weights for every seed, with another normalization of the images inside."""
    return Net(0, mean=0.485, std=0.229) if seed == 1 else Net(0, mean=0.5, std=0.25)


KINDS: dict[str, Callable[[int], Any]] = {
    "frozen TorchScript": frozen,
    "frozen TorchScript from a file": frozen_file,
    "a function": function,
    "a hidden network": hidden,
    "an ensemble with a frozen member": ensemble,
    "other pixels, the same weights": other_pixels,
}
"""Teachers by seed, 1 or 2, that differ in nothing that a digest of weights sees."""

WITHOUT_WEIGHTS = [kind for kind in KINDS if kind != "other pixels, the same weights"]


def data(count: int = COUNT, changed: int | None = None) -> Samples:
    pixels = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    if changed is not None:
        pixels[changed] = 1 - pixels[changed]
    names = tuple(map(str, range(CLASSES)))
    return Samples("data", "train", ArrayImages(pixels), np.arange(count, dtype=np.int32) % CLASSES, names, [])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dump(out: Path, model: Any, samples: Samples | None = None, **options: Any) -> Cache:
    return dump_teacher(model, data() if samples is None else samples, out, **{"spec": SPEC} | options)


def begun(out: Path, model: Any, batches: int = 5, **options: Any) -> dict[str, bytes]:
    """Interrupt a dump after some batches, two of which are a shard, and return its files."""
    with pytest.raises(InterruptedRun):
        dump(out, model, progress=StopsAfter(batches), **options)
    return contents(out)


# The next run of an interrupted dump.


@pytest.mark.parametrize("batches", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_dump_is_resumed_by_its_own_teacher_alone(kind: str, batches: int, tmp_path: Path) -> None:
    make, out = KINDS[kind], tmp_path / "c.kdcache"
    assert weights_digest(as_network(make(1))) == weights_digest(as_network(make(2)))
    before = begun(out, make(1), batches)
    assert PROBES in before
    with pytest.raises(MismatchError, match=r"this teacher is not the one that .* was begun with") as caught:
        dump(out, make(2))
    assert caught.value.exit_code == 4
    # Both values, as the teachers themselves give them.
    words = caught.value.what.split()
    sample, of_class = (int(words[words.index(word) + 1].strip(",:")) for word in ("sample", "class"))
    then, now = (float(words[words.index(word) - 1]) for word in ("then,", "now"))
    image = data().images.pixels[sample : sample + 1]  # type: ignore[attr-defined]  # these are in an array
    with torch.no_grad():
        expected = [float(torch.as_tensor(as_network(make(seed)).eval()(image))[0, of_class]) for seed in (1, 2)]
    assert [then, now] == pytest.approx(expected, abs=1e-3)
    assert contents(out) == before, "nothing was written"

    resumed = dump(out, make(1))
    once = dump(tmp_path / "once.kdcache", make(1))
    assert resumed.manifest.digest == once.manifest.digest
    assert not (out / PROBES).exists()
    assert contents(out) == contents(once.path)


def test_a_server_is_recognized_by_what_it_answers(server: str, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    begun(out, endpoint(server, 1))
    with pytest.raises(MismatchError, match="was begun with"):
        dump(out, endpoint(server, 2))
    cache = dump(out, endpoint(server, 1))
    live = Net(1).eval()(data().images.pixels)  # type: ignore[attr-defined]  # these are in an array
    torch.testing.assert_close(cache.teacher()(torch.arange(COUNT)), live, rtol=2e-3, atol=2e-3)


ANOTHER = """
import os, signal
import torch

class Hidden(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        seed = torch.Generator().manual_seed(int(os.environ.get("SEED", "1")) + int(os.environ.get("RANK", "0")) * SKEW)
        self.held = [torch.randn(192, num_classes, generator=seed)]

    def forward(self, images):
        if len(images) > 1 and os.environ.get("KILL") and float(images[0, 0, 0, 0]) == float(os.environ["KILL"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return images.flatten(1) @ self.held[0]
"""


def pipeline(folder: Path, skew: int = 0) -> Path:
    """A pipeline whose teacher has no state; the pixel in the corner of an image is its index."""
    images = np.random.default_rng(0).integers(0, 255, (COUNT, 8, 8, 3), np.uint8)
    images[:, 0, 0] = np.arange(COUNT)[:, None]
    np.savez(folder / "data.npz", images=images, labels=np.arange(COUNT) % CLASSES)
    (folder / "net.py").write_text(ANOTHER.replace("SKEW", str(skew)))
    (folder / "p.yaml").write_text(
        f"dataset: {{name: npz, root: {folder / 'data.npz'}, validation_fraction: 0, test_fraction: 0}}\n"
        "transform: [ToDtype: {dtype: float32}]\n"
        f"teacher: {{model: '{folder / 'net.py'}:Hidden'}}\n"
        "cache: {top_k: 3, rank: 2, pilot_rows: 8, shard_rows: 8, batch_size: 4}\n"
    )
    return folder / "p.yaml"


def test_a_killed_dump_is_not_completed_by_another_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out, log = pipeline(tmp_path), tmp_path / "c.kdcache", tmp_path / "log"
    arguments = ["dump-teacher", recipe, "-o", out, "--device", "cpu"]
    assert exit_code(in_a_process(command_line, log, {"KILL": "36"}, *arguments)) == -signal.SIGKILL
    assert len(list(out.rglob("commits/0/*.json"))) >= 2
    before = contents(out)
    monkeypatch.setenv("SEED", "2")
    assert f"this teacher is not the one that {out} was begun with" in refused(4, *arguments)
    assert {name: before[name] for name in contents(out)} == contents(out)
    monkeypatch.setenv("SEED", "1")
    said = kdcache(*arguments)
    assert said.exit_code == 0, said.output
    assert "without weights: recognized by its logits alone" in said.stdout
    assert "has no weights that kdcache can read" in said.stderr
    ok("dump-teacher", recipe, "-o", tmp_path / "once.kdcache", "--device", "cpu")
    assert open_cache(out).manifest.digest == open_cache(tmp_path / "once.kdcache").manifest.digest

    # The sealed cache: the same command, and verify.
    ok(*arguments)
    told = json.loads(ok("verify", out, recipe, "--teacher", "--device", "cpu", "--json"))
    assert told["identity"]["weights"] == "none"
    assert told["identity"]["relative_difference"] < 1e-3
    assert "it has no weights to compare" in ok("verify", out, recipe, "--teacher", "--device", "cpu")
    monkeypatch.setenv("SEED", "2")
    assert f"this teacher is not the one that {out} was made with" in refused(4, *arguments)
    assert "the teacher's logits are not those of the cache" in refused(
        4, "verify", out, recipe, "--teacher", "--device", "cpu"
    )


@pytest.mark.parametrize("skew", [0, 1])
def test_ranks_must_have_the_same_teacher(skew: int, tmp_path: Path) -> None:
    recipe, out = pipeline(tmp_path, skew), tmp_path / "c.kdcache"
    done = torchrun(2, recipe, out)
    if not skew:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode != 0
    assert "this teacher is not the one that the first rank has" in done.stderr
    assert "start every rank with the same command" in done.stderr
    assert not (out / "manifest.json").exists()


def test_a_replaced_image_is_no_other_teacher_and_hides_none(tmp_path: Path) -> None:
    out, changed = tmp_path / "c.kdcache", probe_ids(COUNT)[5]
    begun(out, frozen(1))
    with pytest.raises(InterruptedRun):
        dump(out, frozen(1), data(changed=changed), progress=StopsAfter(1))
    with pytest.raises(MismatchError, match="was begun with"):
        dump(out, frozen(2), data(changed=changed))
    once = dump(tmp_path / "once.kdcache", frozen(1), data(changed=changed))
    assert dump(out, frozen(1), data(changed=changed)).manifest.digest == once.manifest.digest


@pytest.mark.parametrize("damage", [b"", b"PK", None])
def test_probes_that_were_lost_are_made_again(damage: bytes | None, tmp_path: Path) -> None:
    out = tmp_path / "c.kdcache"
    begun(out, frozen(1))
    (out / PROBES).unlink() if damage is None else (out / PROBES).write_bytes(damage)
    with pytest.raises(InterruptedRun):
        dump(out, frozen(1), progress=StopsAfter(1))
    with pytest.raises(MismatchError, match="was begun with"):
        dump(out, frozen(2))


def test_a_teacher_that_differs_from_itself_is_told_so(tmp_path: Path) -> None:
    net = Net(1)
    noisy = lambda images: nn.functional.dropout(net(images))  # noqa: E731  # a function that a user has at hand
    begun(tmp_path / "c.kdcache", noisy)
    with pytest.raises(MismatchError, match="other logits each time that it is run") as caught:
        dump(tmp_path / "c.kdcache", noisy)
    assert "no dropout" in caught.value.fix


# The same teacher, run in another way.


def threads(_: Path) -> dict[str, Any]:
    torch.set_num_threads(2)
    return {}


SAME: dict[str, tuple[dict[str, Any], Callable[[Path], dict[str, Any]]]] = {
    "on two threads": ({}, threads),
    "with workers": ({}, lambda _: {"spec": SPEC.model_copy(update={"num_workers": 1})}),
    "compiled": ({"compile": True}, lambda _: {}),
    "in bf16": ({"precision": "bf16"}, lambda _: {}),
    "channels last": ({"channels_last": True}, lambda _: {}),
}


@pytest.mark.parametrize("how", SAME)
def test_the_same_teacher_passes_whatever_it_runs_on(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # needs no compiler
    options, change = SAME[how]
    spec, out = SPEC.model_copy(update=options), tmp_path / "c.kdcache"
    begun(out, Net(1), spec=spec)
    before = torch.get_num_threads()
    try:
        cache = dump(out, Net(1), **{"spec": spec} | change(tmp_path))
        found = check_identity(cache, Net(1), data(), spec)
        assert found is not None
        assert found.relative <= (0.01 if how == "in bf16" else 1e-5)
        compare_with_teacher(cache, Net(1), data(), spec.model_copy(update={"batch_size": 7}))
        more = spec.model_copy(update={"views": 2})
        with pytest.raises(UsageError, match="would all be the same"):
            dump(tmp_path / "more.kdcache", Net(1), spec=more, extends=cache)
        dump(tmp_path / "more.kdcache", Net(1), data(50), spec=spec, extends=cache)
    finally:
        torch.set_num_threads(before)


# Sealed caches.

ENCODINGS: dict[str, dict[str, Any]] = {
    "float16": {},
    "float32": {"dtype": "float32"},
    "uint8": {"dtype": "uint8"},
    "top 1": {"top_k": 1, "tail": "uniform"},
    "low rank": {"top_k": 3, "rank": 2, "pilot_rows": 16},
}


@pytest.mark.parametrize(
    ("kind", "encoding"),
    [("other pixels, the same weights", "float16"), *(("a function", encoding) for encoding in ENCODINGS)],
)
def test_a_cache_is_extended_and_verified_with_its_own_teacher_alone(kind: str, encoding: str, tmp_path: Path) -> None:
    make, spec = KINDS[kind], SPEC.model_copy(update={"views": 2, **ENCODINGS[encoding]})
    old = dump(tmp_path / "old.kdcache", make(1), spec=spec, transform=FLIP)
    more: dict[str, Any] = {"spec": spec.model_copy(update={"views": 3}), "transform": FLIP, "extends": old}
    with pytest.raises(MismatchError, match=r"this teacher is not the one that .*old.kdcache was made with") as caught:
        dump(tmp_path / "more.kdcache", make(2), **more)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "more.kdcache").exists()
    dump(tmp_path / "more.kdcache", make(1), **more)

    found = check_identity(old, as_network(make(1)), data(), spec)
    assert found is not None
    assert found.relative < 1e-6
    with pytest.raises(MismatchError, match="was made with"):
        check_identity(old, as_network(make(2)), data(), spec)


def test_a_derived_cache_is_not_compared_with_batches_of_the_pass(tmp_path: Path) -> None:
    recipe = pipeline(tmp_path)
    ok("dump-teacher", recipe, "-o", tmp_path / "c.kdcache", "--device", "cpu")
    ok("select", tmp_path / "c.kdcache", "-o", tmp_path / "d.kdcache", "--top-k", 2)
    told = json.loads(ok("verify", tmp_path / "d.kdcache", recipe, "--teacher", "--device", "cpu", "--json"))
    assert told["identity"] == {"weights": "none", "relative_difference": None}


@pytest.mark.parametrize("kind", WITHOUT_WEIGHTS)
def test_a_teacher_without_weights_is_said_to_have_none(kind: str, tmp_path: Path) -> None:
    listener = StopsAfter()
    cache = dump(tmp_path / "c.kdcache", KINDS[kind](1), progress=listener)
    assert not has_weights(as_network(KINDS[kind](1)))
    assert any("has no weights that kdcache can read" in message for message in listener.said)
    record = cache.manifest.plan.teacher
    assert record.weights == "none"
    assert json.loads((cache.path / "manifest.json").read_text())["plan"]["teacher"]["weights"] == "none"
    assert cache.teacher_seen
    assert "| weights | none that kdcache can read" in card(cache)
    assert "without weights" in ok("info", cache.path)


def test_a_teacher_with_weights_has_the_manifest_that_it_had(tmp_path: Path) -> None:
    listener = StopsAfter()
    cache = dump(tmp_path / "c.kdcache", Net(1), progress=listener)
    assert "weights" not in json.loads((cache.path / "manifest.json").read_text())["plan"]["teacher"]
    assert cache.manifest.plan.teacher.weights_digest != NO_WEIGHTS
    assert not [message for message in listener.said if "weights" in message]
    assert f"| weights | `{weights_digest(Net(1))}` |" in card(cache)


@pytest.mark.parametrize("given", [None, "resnet18", Net, 3])
def test_what_is_neither_a_network_nor_a_function_is_refused(given: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither a torch\.nn.Module nor a function"):
        dump(tmp_path / "c.kdcache", given)
