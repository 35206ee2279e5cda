"""Files of the user import what is beside them, as scripts and modules do, and nothing of one another."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import kdcache
from kdcache.config.schema import DatasetSpec
from kdcache.data.datasets import load_split
from kdcache.data.views import View
from kdcache.errors import UsageError
from kdcache.runtime import user_code
from kdcache.runtime.import_closure import import_closure
from kdcache.runtime.user_modules import namespace

NET = """
from torch import nn

def net(num_classes=3):
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
    model.where = where()
    return model
"""


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def where(folder: Path, reference: str = "net.py:net") -> Any:
    """Return what the modules beside a model file say."""
    return kdcache.build_model(f"{folder}/{reference}", num_classes=3).where


def digest(folder: Path, reference: str = "net.py:net") -> str:
    return user_code.digest_of(f"{folder}/{reference}")


SAYS = "def where(): return {!r}\n"

LAYOUTS: dict[str, tuple[str, dict[str, str]]] = {
    "a module beside it": ("net.py", {"net.py": "from layers import where\n" + NET, "layers.py": SAYS.format("here")}),
    "a package beside it": (
        "net.py",
        {
            "net.py": "from nets import blocks\nwhere = blocks.where\n" + NET,
            "nets/__init__.py": "",
            "nets/blocks.py": "from .deeper.most import where\nfrom nets import other\nimport nets.other as again\n"
            "assert other is again\n",
            "nets/other.py": "",
            "nets/deeper/__init__.py": "from .. import blocks\n",
            "nets/deeper/most.py": SAYS.format("here"),
        },
    ),
    "a folder without __init__": (
        "net.py",
        {"net.py": "import nets.blocks\nwhere = nets.blocks.where\n" + NET, "nets/blocks.py": SAYS.format("here")},
    ),
    "relative imports in a package": (
        "models/deep/net.py",
        {
            "models/__init__.py": "from .deep import net\n",
            "models/deep/__init__.py": "from .net import net\n",
            "models/deep/net.py": "from ..layers import where\nfrom models.layers import where as same\n"
            "assert where is same\n" + NET,
            "models/layers.py": SAYS.format("here"),
        },
    ),
    "relative imports without __init__": (
        "models/net.py",
        {"models/net.py": "from .layers import where\n" + NET, "models/layers.py": SAYS.format("here")},
    ),
    "a file of a package that is like a script": (
        "models/net.py",
        {
            "models/__init__.py": "raise SystemExit('not needed')\n",
            "models/net.py": "from layers import where\n" + NET,
            "models/layers.py": SAYS.format("here"),
        },
    ),
    "an import inside a function": (
        "net.py",
        {"net.py": "def where():\n    import layers\n    return layers.where()\n" + NET,
         "layers.py": SAYS.format("here")},
    ),
    "by name": (
        "net.py",
        {
            "net.py": "import importlib\nfrom importlib import import_module\n"
            "where = importlib.import_module('nets.' + 'blocks').where\n"
            "assert import_module('.blocks', package='nets').where is where\n"
            "import importlib.util\nassert importlib.util.find_spec('torch')\n" + NET,
            "nets/__init__.py": "",
            "nets/blocks.py": SAYS.format("here"),
        },
    ),
    "everything of a package": (
        "net.py",
        {
            "net.py": "from nets import *\nwhere = blocks.where\n" + NET,
            "nets/__init__.py": "__all__ = [name for name in ('blocks',)]\n",
            "nets/blocks.py": SAYS.format("here"),
        },
    ),
    "a name of the standard library": (
        "net.py",
        {"net.py": "from random import where\n" + NET, "random.py": SAYS.format("here")},
    ),
    "a file that has the name of a library": (
        "safetensors.py",
        {"safetensors.py": "import safetensors.torch\nfrom layers import where\n" + NET,
         "layers.py": SAYS.format("here")},
    ),
    "a file whose name is not an identifier": (
        "net-v1.5.py",
        {"net-v1.5.py": "from layers import where\n" + NET, "layers.py": SAYS.format("here")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_modules_beside_a_file_are_imported_and_belong_to_its_digest(layout: str, tmp_path: Path) -> None:
    main, files = LAYOUTS[layout]
    write(tmp_path, files)
    before = [*sys.path]
    assert where(tmp_path, f"{main}:net") == "here"
    assert sys.path == before
    beside = [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]
    assert all(name.startswith("kdcache.runtime.user_modules.") for name in beside)
    says = next(name for name, text in files.items() if text == SAYS.format("here"))
    first = digest(tmp_path, f"{main}:net")
    (tmp_path / says).write_text(SAYS.format("then"))
    assert digest(tmp_path, f"{main}:net") != first
    assert where(tmp_path, f"{main}:net") == "then"
    (tmp_path / says).write_text(SAYS.format("here"))
    assert digest(tmp_path, f"{main}:net") == first
    assert not [*tmp_path.rglob("__pycache__")]


def test_the_closure_has_the_files_of_the_user_only(tmp_path: Path) -> None:
    for number, (main, files) in enumerate(LAYOUTS.values()):
        folder = tmp_path / str(number)
        write(folder, {**files, "unrelated.py": "import torch", f"{Path(main).parent}/too.py": "import numpy"})
        closure = {file.relative_to(folder).as_posix() for file in import_closure(namespace(folder / main))}
        script = main == "models/net.py" and "models/__init__.py" in files
        assert closure == {name for name in files if not (script and name == "models/__init__.py")}


def test_the_digest_of_a_file_alone_is_that_of_its_content(tmp_path: Path) -> None:
    write(tmp_path, {"net.py": "import torch, numpy as np\nfrom kdcache.errors import KdcacheError\n"})
    assert digest(tmp_path) == "sha256:" + hashlib.sha256((tmp_path / "net.py").read_bytes()).hexdigest()


def test_the_digest_does_not_depend_on_the_folder_or_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (main, files) in enumerate(LAYOUTS.values()):
        digests = []
        for folder in (tmp_path / f"a{number}", tmp_path / "deep" / f"b{number}"):
            write(folder, files)
            for current in (tmp_path, folder, folder.parent):
                monkeypatch.chdir(current)
                digests.append(digest(folder, f"{main}:net"))
        assert len(set(digests)) == 1


def test_names_that_are_computed_stand_for_all_that_they_may_name(tmp_path: Path) -> None:
    lines = {
        "f'nets.{name}'": {"nets/__init__.py", "nets/a.py", "nets/b.py"},
        "'nets.' + name": {"nets/__init__.py", "nets/a.py", "nets/b.py"},
        "name": {"a.py"},
    }
    files = {"nets/__init__.py": "", "nets/a.py": "", "nets/b.py": "", "other/a.py": "", "a.py": ""}
    for line, expected in lines.items():
        write(tmp_path, {**files, "net.py": f"import importlib\ndef net(name): importlib.import_module({line})"})
        closure = {file.relative_to(tmp_path).as_posix() for file in import_closure(namespace(tmp_path / "net.py"))}
        assert closure == {"net.py", *expected}


def test_files_of_two_folders_do_not_get_each_other_s_modules(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / name, {
            "net.py": "import utils\nfrom nets.blocks import name\n"
            "def where():\n    import utils as now, nets.blocks as then, later\n"
            "    return [utils.name, now.name, name, then.name, later.name]\n" + NET,
            "utils.py": f"name = {name!r}", "later.py": f"name = {name!r}", "nets/blocks.py": f"name = {name!r}",
        })  # fmt: skip
    models = [kdcache.build_model(f"{tmp_path}/{name}/net.py:net", num_classes=3) for name in "abc"]
    assert [model.where for model in models] == [[name] * 5 for name in "abc"]


def test_a_module_of_the_current_folder_is_found_unless_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {
        "nets/net.py": "from common.layers import where\nimport safetensors\nassert safetensors.torch\n" + NET,
        "common/layers.py": SAYS.format("current"), "safetensors.py": "", "run/x.py": "",
    })  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert where(Path("nets")) == "current"
    both = import_closure(namespace(Path("nets/net.py")))
    assert [file.name for file in both] == ["net.py", "layers.py"]
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(UsageError, match="No module named 'common'"):
        where(tmp_path / "nets")


MISTAKES = {
    "no such module": ({"net.py": "import layers"}, r"ModuleNotFoundError: No module named 'layers' \(.*/net.py:1\)"),
    "no such part": (
        {"net.py": "import nets.blocks", "nets/__init__.py": ""},
        r"ModuleNotFoundError: No module named 'nets.blocks' \(.*/net.py:1\)",
    ),
    "no such name": (
        {"net.py": "from layers import x", "layers.py": ""},
        r"ImportError: cannot import name 'x' from 'layers' \(.*/layers.py\) \(.*/net.py:1\)",
    ),
    "an error there": ({"net.py": "import layers", "layers.py": "\n1 / 0"}, r"ZeroDivisionError: .*/layers.py:2\)"),
    "bad syntax there": ({"net.py": "import layers", "layers.py": "\n\ndef"}, r"SyntaxError: .*/layers.py:3\)"),
    "a script": ({"net.py": "import sys\nsys.exit(3)"}, r"cannot be run: SystemExit: 3 \(.*/net.py:2\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_module_is_named_where_it_is(mistake: str, tmp_path: Path) -> None:
    files, message = MISTAKES[mistake]
    write(tmp_path, files)
    with pytest.raises(UsageError, match=message):
        where(tmp_path)
    write(tmp_path, {"net.py": "from layers import where\n" + NET, "layers.py": SAYS.format("mended")})
    assert where(tmp_path) == "mended"


def test_an_optional_module_may_be_missing(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"net.py": "try:\n    import fast\nexcept ImportError:\n    fast = 'slow'\nwhere = lambda: fast\n" + NET},
    )
    assert where(tmp_path) == "slow"


SHARED = {
    "layers.py": "from torch import nn\nclass Block(nn.Linear):\n    kind = 'mine'\n",
    "net.py": "from layers import Block\ndef net(num_classes): return Block(4, num_classes)\n",
    "other/layers.py": "class Block: kind = 'not mine'\n",
    "my_data.py": "import torch\nfrom items import Items\ndef data(split): return Items(20)\n",
    "items.py": "import torch\nclass Items:\n    def __init__(self, n): self.n = n\n"
    "    def __len__(self): return self.n\n"
    "    def __getitem__(self, i):\n        from layers import Block\n        assert Block.kind == 'mine'\n"
    "        return torch.full((1, 2, 2), i / 20.0), i % 3\n",
    "my_steps.py": "from amounts import AMOUNT\nclass Plus:\n    deterministic = True\n"
    "    def __call__(self, image): return image + AMOUNT\n",
    "amounts.py": "AMOUNT = 2.0\n",
}  # fmt: skip


def test_objects_of_the_user_s_classes_reach_a_new_process(tmp_path: Path) -> None:
    write(tmp_path / "here", SHARED)
    write(tmp_path / "there", {**SHARED, "layers.py": SHARED["layers.py"].replace("'mine'", "'also'")})
    models = [kdcache.build_model(f"{tmp_path}/{name}/net.py:net", num_classes=3) for name in ("here", "there")]
    (tmp_path / "models.pkl").write_bytes(pickle.dumps(models))
    script = "import pickle, sys\nprint([model.kind for model in pickle.load(open(sys.argv[1], 'rb'))])"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "models.pkl")], cwd="/",
                          env=os.environ, capture_output=True, text=True, check=False, timeout=120)  # fmt: skip
    assert done.stdout == "['mine', 'also']\n", done.stderr


def test_spawned_workers_load_a_data_set_and_a_step_with_their_modules(tmp_path: Path) -> None:
    write(tmp_path, SHARED)
    transform: list[dict[str, dict[str, Any]]] = [{f"{tmp_path}/my_steps.py:Plus": {}}]
    user_code.trust(name for step in transform for name in step)
    spec = DatasetSpec(name=f"{tmp_path}/my_data.py:data", validation_fraction=0.0, test_fraction=0.0)
    view = View(load_split(spec, "train"), transform)
    here = view.__getitems__([0, 5, 19]).images
    assert here[:, 0, 0, 0].tolist() == pytest.approx([2.0, 2.25, 2.95])
    loader = DataLoader(
        view, batch_sampler=[[0, 5, 19]], num_workers=1, multiprocessing_context="spawn", collate_fn=_as_it_is
    )
    (there,) = loader
    assert torch.equal(there.images, here)


def _as_it_is(batch: Any) -> Any:
    return batch


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, while it compiles
def test_a_compiled_network_of_the_user_imports_what_is_beside_it(tmp_path: Path) -> None:
    write(tmp_path, {
        "net.py": "from torch import nn\nclass Net(nn.Module):\n    def __init__(self, num_classes):\n"
        "        super().__init__()\n        self.fc = nn.Linear(4, num_classes)\n"
        "    def forward(self, x):\n        from layers import double\n        return double(self.fc(x.flatten(1)))\n",
        "layers.py": "def double(x): return 2 * x\n",
    })  # fmt: skip
    model = kdcache.build_model(f"{tmp_path}/net.py:Net", num_classes=3)
    images = torch.rand(2, 1, 2, 2)
    compiled: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    assert torch.equal(compiled(images), model(images))
    assert torch.equal(model(images), 2 * model.fc(images.flatten(1)))  # type: ignore[operator]


CALLABLES = """
import functools

def scaled(student_logits, teacher_logits, labels, scale=1.0):
    return scale * (student_logits - teacher_logits).square().mean(dim=1)

half = functools.partial(scaled, scale=0.5)
positional = functools.lru_cache(lambda a, b, c, /: (a - b).square().mean(dim=1))

class Distance:
    def __call__(self, student_logits, teacher_logits, labels):
        return (student_logits - teacher_logits).square().mean(dim=1)
    @staticmethod
    def of(*logits): return (logits[0] - logits[1]).square().mean(dim=1)
instance, static = Distance(), Distance.of

class Unreadable(Distance):
    __signature__ = "of a compiled library"
unreadable = Unreadable()
"""


@pytest.mark.parametrize("name", ["scaled", "half", "positional", "instance", "static", "unreadable"])
def test_a_loss_may_be_any_callable(name: str, tmp_path: Path) -> None:
    write(tmp_path, {"losses.py": CALLABLES})
    loss = kdcache.loss(f"{tmp_path}/losses.py:{name}", ce_weight=0.0, kd_weight=1.0)
    student, teacher = torch.rand(4, 3, requires_grad=True), torch.rand(4, 3)
    expected = (student - teacher).square().mean() * (0.5 if name == "half" else 1.0)
    assert torch.allclose(loss(student, teacher, torch.zeros(4, dtype=torch.int64)).total, expected)
