"""Checkpoints as people bring them: prefixes, wrappers, training scripts' layouts, folders, exported programs."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import pathlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models as tv
from torchvision.transforms import InterpolationMode

from kdcache.errors import CorruptError, KdcacheError, MismatchError, UsageError
from kdcache.models import load_weights, save_weights, weights_digest
from kdcache.models.checkpoints import read_state


class Net(nn.Module):
    """A body, a batch normalization and a head."""

    def __init__(self, seed: int = 0, classes: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(1, 2, 3)
            self.norm = nn.BatchNorm2d(2)
            self.fc = nn.Linear(2, classes)
            self.norm.running_mean = torch.rand(2)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(images)).mean((2, 3)))  # type: ignore[no-any-return]


class Messages:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def task(self, *_: Any) -> Any:
        raise NotImplementedError


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, its = one.state_dict(), other.state_dict()
    return mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)


def loaded(path: str | Path, into: nn.Module | None = None) -> tuple[nn.Module, list[str]]:
    model, messages = into or Net(2), Messages()
    load_weights(model, path, messages)
    return model, messages.said


def refused(kind: type[KdcacheError], words: str, path: str | Path, into: nn.Module | None = None) -> str:
    with pytest.raises(kind, match=words) as caught:
        loaded(path, into)
    return caught.value.fix


# Prefixes


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "_orig_mod.module.", "model.net.", "other_net.",
     "module.model._orig_mod.backbone.", "student.network."],
)  # fmt: skip
def test_any_prefix_in_front_of_all_keys_is_removed(prefix: str, tmp_path: Path) -> None:
    torch.save({prefix + key: value for key, value in Net(1).state_dict().items()}, tmp_path / "net.pt")
    assert same(loaded(tmp_path / "net.pt")[0], Net(1))


@pytest.mark.parametrize(
    ("body", "head"),
    [("backbone.", ""), ("module.backbone.", "module."), ("model.backbone.", "model."), ("_orig_mod.", ""),
     ("net.module.", "net."), ("", "module.")],
)  # fmt: skip
def test_a_head_may_lack_the_prefix_of_the_body(body: str, head: str, tmp_path: Path) -> None:
    state = {(head if key.startswith("fc") else body) + key: value for key, value in Net(1).state_dict().items()}
    torch.save(state, tmp_path / "net.pt")
    assert same(loaded(tmp_path / "net.pt")[0], Net(1))


def test_wrappers_around_a_part_of_the_network_are_seen_through(tmp_path: Path) -> None:
    made = Net(1)
    wraps: list[Any] = [nn.DataParallel, torch.compile]
    for wrap in wraps:
        wrapped = Net(1)
        wrapped.conv = wrap(wrapped.conv)
        assert list(wrapped.state_dict()) != list(made.state_dict())
        torch.save(wrapped.state_dict(), tmp_path / "net.pt")
        assert same(loaded(tmp_path / "net.pt")[0], made)
        # And the other way round: a plain checkpoint, into a network of which a part is wrapped.
        torch.save(made.state_dict(), tmp_path / "net.pt")
        into = Net(2)
        into.conv = wrap(into.conv)
        assert weights_digest(loaded(tmp_path / "net.pt", into)[0]) == weights_digest(made)


def test_a_network_whose_own_parts_have_the_names_of_wrappers_is_filled_as_it_is(tmp_path: Path) -> None:
    for names in (("module",), ("model", "net"), ("backbone", "_orig_mod")):

        def made(seed: int, names: tuple[str, ...] = names) -> nn.Module:
            model: nn.Module = Net(seed)
            for name in names:
                model = nn.ModuleDict({name: model})
            return model

        for prefix in ("", "module.", "model.module."):
            state = {prefix + key: value for key, value in made(1).state_dict().items()}
            torch.save(state, tmp_path / "net.pt")
            assert same(loaded(tmp_path / "net.pt", made(2))[0], made(1))


def test_parts_that_a_prefix_would_make_one_stay_two(tmp_path: Path) -> None:
    def made(seed: int) -> nn.Module:
        return nn.ModuleDict({"module": nn.Linear(2, 2), "model": nn.ModuleDict({"module": Net(seed)})})

    one = made(1)
    torch.save({f"net.{key}": value for key, value in one.state_dict().items()}, tmp_path / "net.pt")
    assert same(loaded(tmp_path / "net.pt", made(2))[0], one)


def test_counters_may_be_missing_or_superfluous(tmp_path: Path) -> None:
    state = Net(1).state_dict()
    del state["norm.num_batches_tracked"]
    torch.save(state, tmp_path / "old.pt")
    assert same(loaded(tmp_path / "old.pt")[0], Net(1))
    extra = {
        **Net(1).state_dict(),
        "n_averaged": torch.tensor(7),
        "total_ops": torch.zeros(1),
        "conv.total_params": torch.zeros(1),
    }
    torch.save(extra, tmp_path / "more.pt")
    assert same(loaded(tmp_path / "more.pt")[0], Net(1))
    without = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    counted = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = {key: value for key, value in counted.state_dict().items() if "running" not in key}
    torch.save(state, tmp_path / "net.pt")
    assert loaded(tmp_path / "net.pt", without)[1] == []


def test_a_loss_and_auxiliary_heads_are_left_out_and_said(tmp_path: Path) -> None:
    for key in ("criterion.weight", "AuxLogits.fc.weight", "aux1.conv.weight"):
        torch.save({**Net(1).state_dict(), key: torch.zeros(3)}, tmp_path / "net.pt")
        model, said = loaded(tmp_path / "net.pt")
        assert same(model, Net(1))
        assert said == [f"note: not part of the network, and not loaded from {tmp_path}/net.pt: {key}"]
    torch.save({**Net(1).state_dict(), "other.weight": torch.zeros(3)}, tmp_path / "net.pt")
    refused(MismatchError, "unexpected: other.weight", tmp_path / "net.pt")


def test_of_two_networks_in_one_state_dict_one_must_be_chosen(tmp_path: Path) -> None:
    state = {
        f"{name}.{key}": value for name, seed in (("a", 1), ("b", 3)) for key, value in Net(seed).state_dict().items()
    }
    torch.save({"state_dict": state}, tmp_path / "net.ckpt")
    fix = refused(MismatchError, "holds several networks of this kind: a, b", tmp_path / "net.ckpt")
    assert fix == f"choose one: `weights: {tmp_path}/net.ckpt#a`"
    assert same(loaded(f"{tmp_path}/net.ckpt#a")[0], Net(1))
    assert same(loaded(f"{tmp_path}/net.ckpt#b")[0], Net(3))
    assert same(loaded(f"{tmp_path}/net.ckpt#state_dict.b")[0], Net(3))
    # The names of wrappers are the network itself.
    renamed = {key.replace("a.", "model.", 1) if key.startswith("a.") else key: value for key, value in state.items()}
    torch.save({"state_dict": renamed}, tmp_path / "net.ckpt")
    model, said = loaded(tmp_path / "net.ckpt")
    assert same(model, Net(1))
    assert "are model of" in said[0]
    assert "also has b" in said[0]


# Containers


@pytest.mark.parametrize(
    "path",
    ["state_dict", "model", "model_state_dict", "net", "network", "state_dict_ema", "ema", "model_ema", "teacher",
     "anything", "checkpoint.model", "ema.state_dict", "a.b.c"],
)  # fmt: skip
def test_a_state_dict_is_found_wherever_it_is(path: str, tmp_path: Path) -> None:
    held: Any = Net(1).state_dict()
    for name in reversed(path.split(".")):
        held = {name: held, "epoch": 3, "optimizer": {"state": {0: {"step": torch.zeros(1)}}, "param_groups": [{}]}}
    torch.save(held, tmp_path / "net.pt")
    model, said = loaded(tmp_path / "net.pt")
    assert same(model, Net(1))
    assert said == []
    assert same(loaded(f"{tmp_path}/net.pt#{path}")[0], Net(1))


@pytest.mark.parametrize(
    ("names", "taken"),
    [(("state_dict_ema", "state_dict"), "state_dict"), (("ema", "model"), "model"), (("student", "teacher"), "teacher"),
     (("model_ema", "model", "optimizer_copy"), "model"), (("mine", "net"), "net")],
)  # fmt: skip
def test_of_several_state_dicts_the_one_that_is_taken_is_said(
    names: tuple[str, ...], taken: str, tmp_path: Path
) -> None:
    torch.save({name: Net(seed).state_dict() for seed, name in enumerate(names, 3)}, tmp_path / "net.pt")
    model, said = loaded(tmp_path / "net.pt")
    assert same(model, Net(3 + names.index(taken)))
    assert len(said) == 1
    assert said[0].startswith(f"note: the weights are {taken} of {tmp_path}/net.pt; select another part with")
    for seed, name in enumerate(names, 3):
        assert name == taken or f"`weights: {tmp_path}/net.pt#{name}`" in said[0]
        model, said_then = loaded(f"{tmp_path}/net.pt#{name}")
        assert same(model, Net(seed))
        assert said_then == []


def test_the_state_dict_that_fits_is_taken_before_one_that_does_not(tmp_path: Path) -> None:
    torch.save({"state_dict": Net(1, classes=9).state_dict(), "student": Net(3).state_dict()}, tmp_path / "net.pt")
    assert same(loaded(tmp_path / "net.pt")[0], Net(3))


def test_a_part_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    torch.save({"model": Net(1).state_dict(), "ema": Net(1).state_dict()}, tmp_path / "net.pt")
    assert refused(UsageError, "has no part 'teacher'", f"{tmp_path}/net.pt#teacher") == "it has model, ema"
    torch.save(Net(1).state_dict(), tmp_path / "net.pt")
    assert "leave the # out" in refused(UsageError, "has no part 'ema'", f"{tmp_path}/net.pt#ema")
    refused(UsageError, "checkpoint not found: .*no.pt", f"{tmp_path}/no.pt#ema")


def test_a_file_may_have_a_hash_in_its_name(tmp_path: Path) -> None:
    torch.save(Net(1).state_dict(), tmp_path / "net#1.pt")
    assert same(loaded(tmp_path / "net#1.pt")[0], Net(1))
    torch.save({"ema": Net(3).state_dict()}, tmp_path / "net#1.pt")
    assert same(loaded(f"{tmp_path}/net#1.pt#ema")[0], Net(3))


def _config_class(name: str) -> Any:
    class Config(dict):  # type: ignore[type-arg]
        pass

    Config.__module__, _, Config.__qualname__ = name.rpartition(".")
    Config.__name__ = Config.__qualname__
    return Config


HARMLESS: dict[str, Callable[[], Any]] = {
    "Namespace": lambda: argparse.Namespace(lr=0.1, out=pathlib.Path("/x"), inner=argparse.Namespace(a=[1])),
    "SimpleNamespace": lambda: types.SimpleNamespace(a=1),
    "path": lambda: pathlib.Path("/a/b"),
    "numpy scalar": lambda: np.float64(0.25),
    "numpy array": lambda: np.arange(3),
    "enumeration": lambda: InterpolationMode.BICUBIC,
    "defaultdict": lambda: collections.defaultdict(list, {"a": [1]}),
    "deque": lambda: collections.deque([0.5, 0.25]),
    "time": lambda: datetime.datetime(2020, 1, 1),
    "version": lambda: torch.__version__,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_training_script_s_configuration_does_not_stand_in_the_way(name: str, tmp_path: Path) -> None:
    torch.save({"state_dict": Net(1).state_dict(), "args": HARMLESS[name]()}, tmp_path / "net.pt")
    before = set(torch.serialization.get_safe_globals())
    assert same(loaded(tmp_path / "net.pt")[0], Net(1))
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("name", ["yacs.config.CfgNode", "easydict.EasyDict", "box.box.Box"])
def test_configurations_of_libraries_that_are_not_here_are_read_past(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = _config_class(name)
    config = kind(lr=0.1)
    vars(config)["immutable"] = False
    module = types.ModuleType(kind.__module__)
    vars(module)[kind.__name__] = kind
    with monkeypatch.context() as patch:
        for part in (kind.__module__.partition(".")[0], kind.__module__):
            patch.setitem(sys.modules, part, module)
        torch.save({"model": Net(1).state_dict(), "config": config}, tmp_path / "net.pt")
    assert same(loaded(tmp_path / "net.pt")[0], Net(1))


def test_a_whole_pickled_network_is_refused_with_the_remedy(tmp_path: Path) -> None:
    for model in (Net(1), nn.Linear(2, 2), nn.DataParallel(Net(1))):
        torch.save(model, tmp_path / "net.pt")
        fix = refused(CorruptError, r"holds more than tensors \(\S+\), which is not loaded", tmp_path / "net.pt")
        assert "if you trust it, load it where it was made, and write its state dict only" in fix


# What does not fit


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda state: Net(1, classes=5).state_dict(), "the checkpoint is probably of 5 classes and the network has 3"),
        (lambda state: nn.LSTM(2, 2).state_dict(), "the checkpoint is of another network"),
        (lambda state: {k: v for k, v in state.items() if "fc" not in k}, "the checkpoint lacks fc, perhaps the head"),
        (lambda state: {**state, "conv.lora_A.weight": torch.zeros(1)}, "merge them into the network"),
        (lambda state: {**state, "fc.zero_point": torch.zeros(1)}, "is of a quantized network"),
        (
            lambda state: {**{k: v for k, v in state.items() if k != "conv.weight"}, "conv.weight_g": torch.zeros(2)},
            "remove the parametrizations",
        ),
    ],
)
def test_the_fix_names_the_likely_cause(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], cause: str, tmp_path: Path
) -> None:
    for wrapped in (False, True):
        state = change(Net(1).state_dict())
        torch.save({"model": state} if wrapped else state, tmp_path / "net.pt")
        words = "its part model" if wrapped else "does not fit the network"
        assert cause in refused(MismatchError, words, tmp_path / "net.pt")


def test_weights_of_half_precision_are_those_of_the_network_rounded(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in Net(1).state_dict().items()}
        for save, name in ((torch.save, "net.pt"), (save_file, "net.safetensors")):
            save(state, tmp_path / name)
            model, _ = loaded(tmp_path / name)
            assert all(p.dtype == torch.float32 for p in model.parameters())
            assert torch.equal(model.state_dict()["fc.weight"], state["fc.weight"].float())


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's quantized tensors are to go
def test_whole_numbers_are_not_taken_for_fractions(tmp_path: Path) -> None:
    for value in (
        torch.zeros(3, 2, dtype=torch.int8),
        torch.quantize_per_tensor(torch.zeros(3, 2), 0.1, 0, torch.qint8),
    ):
        torch.save({**Net(1).state_dict(), "fc.weight": value}, tmp_path / "net.pt")
        refused(MismatchError, r"of another type: fc.weight q?int8, the network has float32", tmp_path / "net.pt")


# Folders of save_pretrained


def folder(path: Path, shards: int = 0, torch_files: bool = False) -> Path:
    """A folder as transformers writes it, in one file or several."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    state = Net(1).state_dict()
    stem, suffix = ("pytorch_model", "bin") if torch_files else ("model", "safetensors")
    save = torch.save if torch_files else save_file
    if not shards:
        save(dict(state), path / f"{stem}.{suffix}")
        return path
    weight_map = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05}-of-{shards:05}.{suffix}"
        part = dict(list(state.items())[number::shards])
        save(part, path / name)
        weight_map.update(dict.fromkeys(part, name))
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("shards", [0, 1, 3])
@pytest.mark.parametrize("torch_files", [False, True])
def test_the_folder_of_a_saved_network_is_a_checkpoint(shards: int, torch_files: bool, tmp_path: Path) -> None:
    assert same(loaded(folder(tmp_path / "net", shards, torch_files))[0], Net(1))


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "net", 3)
    index = path / "model.safetensors.index.json"
    (path / "model-00002-of-00003.safetensors").unlink()
    refused(CorruptError, "names model-00002-of-00003.safetensors, which is not in the folder", path)
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"):
        index.write_text(text)
        refused(CorruptError, f"cannot read {index}", path)
    for name in ("../net/model-00001-of-00003.safetensors", "/etc/passwd", "a/b"):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refused(CorruptError, f"names {name}, which is not", path)
    index.write_text(json.dumps({"weight_map": {}}))
    refused(CorruptError, "names no file", path)
    index.unlink()
    assert "train-teacher" in refused(UsageError, "the folder has no model.safetensors and no pytorch_model.bin", path)


# torch.export and TorchScript


def exported(path: Path, model: nn.Module) -> None:
    torch.export.save(torch.export.export(model.eval(), (torch.rand(2, 1, 8, 8),)), path)


@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_s_weights_are_read_without_it(tmp_path: Path) -> None:
    class More(Net):
        def __init__(self, seed: int = 0) -> None:
            super().__init__(seed)
            self.register_buffer("table", torch.full((2, 3), 0.5 + seed, dtype=torch.bfloat16).t())
            self.register_buffer("empty", torch.zeros(0, 2))
            self.register_buffer("passing", torch.zeros(2), persistent=False)

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + self.get_buffer("table").sum() + self.get_buffer("empty").sum()

    exported(tmp_path / "net.pt2", More(1))
    model, _ = loaded(tmp_path / "net.pt2", More(2))
    assert same(model, More(1))
    torch.export.save(torch.export.export(tv.squeezenet1_1().eval(), (torch.rand(1, 3, 64, 64),)), tmp_path / "b.pt2")
    assert len(read_state(tmp_path / "b.pt2")) == len(tv.squeezenet1_1().state_dict())


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_exported_program_is_refused(tmp_path: Path) -> None:
    import zipfile

    exported(tmp_path / "net.pt2", Net(1))
    with zipfile.ZipFile(tmp_path / "net.pt2") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    config_name = next(name for name in files if name.endswith("model_weights_config.json"))
    config = json.loads(files[config_name])["config"]
    meta = config["conv.weight"]["tensor_meta"]
    for change in (
        {"use_pickle": True},
        {"path_name": "../../nowhere"},
        {"tensor_meta": {**meta, "sizes": [{"as_int": 2**40}]}},
        {"tensor_meta": {**meta, "strides": [{"as_int": -1}] * 4}},
        {"tensor_meta": {**meta, "storage_offset": {"as_int": 10**6}}},
        {"tensor_meta": {**meta, "dtype": 99}},
        {"tensor_meta": None},
    ):
        entry = {**config["conv.weight"], **change}
        changed = {**files, config_name: json.dumps({"config": {**config, "conv.weight": entry}}).encode()}
        with zipfile.ZipFile(tmp_path / "bad.pt2", "w") as archive:
            for name, content in changed.items():
                archive.writestr(name, content)
        refused(CorruptError, "cannot read the checkpoint", tmp_path / "bad.pt2")


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused_with_the_remedy(tmp_path: Path) -> None:
    scripted = torch.jit.script(Net(1).eval())
    for model, name in ((scripted, "a.pt"), (torch.jit.freeze(scripted), "b.pth"), (scripted, "c.bin")):
        model.save(str(tmp_path / name))
        fix = refused(UsageError, "is a TorchScript archive, which holds code", tmp_path / name)
        assert "torch.jit.load(path, 'cpu').state_dict()" in fix


# Digests


def test_the_same_weights_have_the_same_digest_compiled_parallel_or_plain(tmp_path: Path) -> None:
    plain = weights_digest(Net(1))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        distributed = nn.parallel.DistributedDataParallel(Net(1))
    finally:
        torch.distributed.destroy_process_group()
    in_place = Net(1)
    in_place.compile()
    part = Net(1)
    part.conv = torch.compile(part.conv)  # type: ignore[assignment]
    compiled: Any = torch.compile(Net(1))
    models: list[Any] = [
        nn.DataParallel(Net(1)),
        distributed,
        compiled,
        torch.compile(nn.DataParallel(Net(1))),
        nn.DataParallel(compiled),
        in_place,
        part,
    ]
    for model in models:
        assert weights_digest(model) == plain
        save_weights(model, tmp_path / "net.safetensors")
        assert same(loaded(tmp_path / "net.safetensors")[0], Net(1))
    assert weights_digest(nn.ModuleDict({"module": Net(1)})) != plain


class Extra(nn.Module):
    """A network with extra state."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_is_digested_or_refused() -> None:
    values: list[Any] = [
        None, 1, 2, 1.0, "1", b"1", True, torch.zeros(2), torch.zeros(3), [1, 2], [[1], 2], {"a": 1}, {"a": 2},
        {"a": {"b": torch.ones(1)}}, torch.float16, (1, 2, 3),
    ]  # fmt: skip
    digests = [weights_digest(nn.ModuleDict({"part": Extra(value)})) for value in values]
    assert len(set(digests)) == len(values)
    for value in (object(), lambda: 1, {1.5: 2}, np.zeros(2)):
        with pytest.raises(MismatchError, match=r"has part._extra_state, a \w+, which cannot be digested"):
            weights_digest(nn.ModuleDict({"part": Extra(value)}))
        with pytest.raises(MismatchError, match=r"has part._extra_state, a \w+, which model.safetensors cannot hold"):
            save_weights(nn.ModuleDict({"part": Extra(value)}), Path("/nowhere/net.safetensors"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's compressed sparse tensors are new
def test_sparse_buffers_are_digested_by_what_they_hold() -> None:
    def made(dense: Tensor, layout: str) -> nn.Module:
        model = nn.Module()
        model.register_buffer("table", getattr(dense, layout)())
        return model

    dense = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    other = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    layouts = ("to_sparse", "to_sparse_csr", "to_sparse_csc", "clone")
    assert len({weights_digest(made(values, layout)) for layout in layouts for values in (dense, other)}) == 8
    for layout in layouts:
        assert weights_digest(made(dense, layout)) == weights_digest(made(dense.clone(), layout))
    uncoalesced = nn.Module()
    uncoalesced.register_buffer(
        "table", torch.sparse_coo_tensor(torch.tensor([[1, 0, 1], [0, 1, 0]]), torch.tensor([1.5, 1.0, 0.5]), (2, 2))
    )
    assert weights_digest(uncoalesced) == weights_digest(made(dense, "to_sparse"))


@pytest.mark.filterwarnings("ignore")
def test_quantized_networks_are_digested() -> None:
    def quantized(seed: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        quantize: Any = torch.ao.quantization.quantize_dynamic
        return quantize(model, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-any-return]

    assert weights_digest(quantized(1)) == weights_digest(quantized(1)) != weights_digest(quantized(2))
    ones, scales = torch.ones(2, 2), torch.tensor([0.1, 0.2])
    for one, other in (
        [torch.quantize_per_tensor(ones, scale, 0, torch.qint8) for scale in (0.1, 0.2)],
        [torch.quantize_per_channel(ones, scales, torch.tensor([0, 0]), axis, torch.qint8) for axis in (0, 1)],
    ):
        digests = []
        for value in (one, other):
            model = nn.Module()
            model.register_buffer("table", value)
            digests.append(weights_digest(model))
            with pytest.raises(MismatchError, match=r"quantized, which model\.safetensors cannot hold"):
                save_weights(model, Path("/nowhere/net.safetensors"))
        assert digests[0] != digests[1]


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = Net(1)
    with pytest.raises(MismatchError, match="is on the meta device and has no values"):
        weights_digest(model)


# Layouts of training scripts


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def split_head(body: str, head: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {(head if key.startswith("fc.") else body) + key: value for key, value in state.items()}


def _layouts(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, tuple[Any, str]]:
    """Return, of each script, what it saves of the weights `a`, and of others `b`; and how `a` is selected."""
    momentum = {"state": {0: {"momentum_buffer": torch.zeros(2, 1, 3, 3)}}, "param_groups": [{"lr": 0.1}]}
    counted = {"n_averaged": torch.tensor(4)}
    return {
        "torchvision's references": (
            {"model": a, "optimizer": momentum, "lr_scheduler": {"last_epoch": 3}, "epoch": 3, "scaler": {"scale": 2.0},
             "args": argparse.Namespace(lr=0.1), "model_ema": {**counted, **prefixed("module.", b)}},
            "",
        ),
        "torchvision's references, average": (
            {"model": prefixed("module.", b), "model_ema": {**counted, **prefixed("module.module.", a)}},
            "#model_ema",
        ),
        "Lightning": (
            {"epoch": 1, "pytorch-lightning_version": "2.4", "hyper_parameters": {"net": "resnet", "lr": 0.1},
             "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.9)}}, "loops": {"fit_loop": {}},
             "optimizer_states": [momentum], "lr_schedulers": [{}],
             "state_dict": {**prefixed("model.", a), "criterion.weight": torch.ones(3)}},
            "",
        ),
        "parallel and compiled Lightning": ({"state_dict": prefixed("model.module._orig_mod.", a)}, ""),
        "compiled around parallel": (prefixed("_orig_mod.module.", a), ""),
        "MMPretrain": (
            {"meta": {"epoch": 9, "cfg": "model = dict()"}, "optimizer": momentum, "message_hub": {},
             "state_dict": split_head("backbone.", "head.", a)},
            "",
        ),
        "MMPretrain in parallel": (
            {"state_dict": {**split_head("module.backbone.", "module.head.", a),
                            "data_preprocessor.mean": torch.ones(3)}},
            "",
        ),
        "fairseq": (
            {"args": None, "cfg": {"model": {"arch": "a"}}, "model": {**prefixed("encoder.", a)},
             "optimizer_history": [{"num_updates": 3}], "extra_state": {"epoch": 3}, "last_optimizer_state": momentum},
            "",
        ),
        "DeepSpeed": ({"module": a, "ds_config": {"a": 1}, "ds_version": "0.14", "optimizer": None}, ""),
        "fastai": ((a, momentum), ""),
        "a list of weights and epoch": ([a, 3], ""),
        "MoCo": (
            {"arch": "resnet50", "state_dict": {"module.queue": torch.ones(3, 3), **prefixed("module.encoder_q.", a),
                                                **prefixed("module.encoder_k.", b)}},
            "#encoder_q",
        ),
        "DINO": ({"student": prefixed("module.backbone.", b), "teacher": prefixed("backbone.", a)}, ""),
        "VISSL": ({"classy_state_dict": {"base_model": {"model": {"trunk": a}}}}, ""),
        "BasicSR": ({"params": a, "params_ema": b}, ""),
        "kuangliu": ({"net": prefixed("module.", a), "acc": 93.1, "epoch": 3}, ""),
    }  # fmt: skip


LAYOUTS = [*_layouts({}, {})]


@pytest.mark.parametrize("script", LAYOUTS)
def test_checkpoints_of_training_scripts_are_loaded(script: str, tmp_path: Path) -> None:
    saved, part = _layouts(Net(1).state_dict(), Net(3).state_dict())[script]
    torch.save(saved, tmp_path / "last.pth")
    assert same(loaded(f"{tmp_path}/last.pth{part}")[0], Net(1))


def test_a_head_at_another_place_is_told_of_and_only_taken_where_it_is_the_only_one(tmp_path: Path) -> None:
    state = split_head("backbone.", "head.", Net(1).state_dict())
    torch.save(state, tmp_path / "net.pth")
    assert loaded(tmp_path / "net.pth")[1] == [f"note: fc.weight is head.fc.weight of {tmp_path}/net.pth"]
    torch.save({**state, "aux_head.fc.weight": torch.zeros(3, 2)}, tmp_path / "net.pth")
    refused(MismatchError, "missing: fc.weight; fc.bias", tmp_path / "net.pth")
    renamed = {key.replace("head.fc.", "head.classifier."): value for key, value in state.items()}
    torch.save(renamed, tmp_path / "net.pth")
    fix = refused(MismatchError, "missing: fc.weight; fc.bias", tmp_path / "net.pth")
    assert fix.startswith("the checkpoint has head.classifier, of the same shapes, in place of fc: rename it")


def test_the_fix_names_the_part_that_is_missing_or_superfluous(tmp_path: Path) -> None:
    changes: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
        (lambda s: {k: v for k, v in s.items() if "conv" not in k}, "the checkpoint lacks conv of the network: set"),
        (lambda s: {k: v for k, v in s.items() if "fc" not in k}, "the checkpoint lacks fc, perhaps the head"),
        (lambda s: {k: v for k, v in s.items() if "fc" not in k and "conv" not in k}, "lacks conv (and 1 more) of"),
        (lambda s: {**s, "fc2.weight": torch.ones(2)}, "the network has no fc2: set `model:` and `args:`"),
        (lambda s: {**s, **{f"p.{i}.weight": torch.ones(2) for i in range(6)}}, "the network has no p.0 (and 5 more)"),
    ]
    for change, words in changes:
        torch.save(change(dict(Net(1).state_dict())), tmp_path / "net.pth")
        assert words in refused(MismatchError, "does not fit the network", tmp_path / "net.pth")


OTHERS: dict[str, tuple[bytes, str, str]] = {
    "text": (b"hello, this is text", "is not a checkpoint, and begins with the text 'hello, this '", "safetensors"),
    "text that torch takes for a pickle": (b"epoch 3", "begins with the text 'epoch 3'", "safetensors"),
    "bytes": (bytes(range(1, 40)), "begins with the bytes 01 02 03 04 05 06 07 08", "safetensors"),
    "a web page": (b"<!DOCTYPE html><html>Not found</html>", "is a web page", "download it again"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a pointer of Git LFS", "pull"),
    "nothing": (b"", "is an empty file", "download it again"),
    "gzip": (b"\x1f\x8b\x08\0", "is compressed with gzip", "unpack"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file", "convert"),
    "half of an archive": (b"PK\x03\x04" + bytes(99), "its end is missing", "download it again"),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("name", ["net.pth", "net.safetensors"])
def test_a_file_that_is_not_a_checkpoint_is_named_by_what_it_is(what: str, name: str, tmp_path: Path) -> None:
    content, words, fix = OTHERS[what]
    (tmp_path / name).write_bytes(content)
    assert fix in refused(CorruptError, words, tmp_path / name)


def test_a_checkpoint_is_read_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    torch.save(Net(1).state_dict(), tmp_path / "net.safetensors")
    save_file(Net(1).state_dict(), tmp_path / "net.pth")
    for path in tmp_path.iterdir():
        assert same(loaded(path)[0], Net(1))
    np.savez(tmp_path / "net.npz", a=np.ones(3))
    refused(CorruptError, "is a zip archive of a.npy", tmp_path / "net.npz")
