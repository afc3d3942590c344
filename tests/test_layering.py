"""The order of packages and rooms, the libraries each may use, and what none may do.

    cli  ->  engine  ->  models, optim  ->  kernels  ->  torch, triton

A package may import those below it; models and optim do not know each other; nothing imports tests,
bench or examples. Inside a package, a folder is a room: no two rooms import each other, no rooms
and no modules form a circle, and what lies directly in `engine`, `models` or `cli` stands above the
rooms, but for the few ground files that everybody may import. No room imports `engine.verbs`. The
rules are read off the syntax trees, so an import inside a function or under `TYPE_CHECKING` counts
too.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.source_tree import (
    ROOT,
    circles,
    import_graph,
    imports,
    module_name,
    product_sources,
    sources_of,
)

BELOW = {
    "kernels": set[str](),
    "models": {"kernels"},
    "optim": {"kernels"},
    "engine": {"models", "optim", "kernels"},
    "cli": {"engine", "models", "optim", "kernels"},
}
OWN = {*BELOW, "tests", "bench", "examples"}
ARITHMETIC_ONLY = {"kernels", "models", "optim"}
# numba and llvmlite are optional: kernels.runtime.cores asks for them.
ARITHMETIC_LIBRARIES = {"torch", "triton", "numpy", "safetensors", "numba", "llvmlite"}
PEERS = {
    "accelerate",
    "bitsandbytes",
    "datasets",
    "llama_cpp",
    "peft",
    "transformers",
    "trl",
    "unsloth",
    "xllamacpp",
}
# Reading any of these formats can run code that the file brings with it.
EXECUTING_FORMATS = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
EXECUTING_CALLS = {("torch", "load"), ("torch", "save")}


def import_fault(package: str, name: str) -> str | None:
    """Say what is wrong with ``package`` importing ``name``, or None."""
    top = name.split(".")[0]
    if top in OWN and top != package and top not in BELOW[package]:
        return f"{package} imports {name}, which is not below it"
    if top in PEERS:
        return f"imports {name}, a program this one is compared with"
    if top in EXECUTING_FORMATS or tuple(name.split(".")[:2]) in EXECUTING_CALLS:
        return f"imports {name}, which reads or writes pickle"
    allowed = OWN | ARITHMETIC_LIBRARIES | set(sys.stdlib_module_names)
    if package in ARITHMETIC_ONLY and top not in allowed:
        return f"{package} imports {name}; it may use only {sorted(ARITHMETIC_LIBRARIES)}"
    return None


def call_faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, fault) of every use of a function that reads or writes pickle."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in EXECUTING_CALLS:
                yield node.lineno, f"uses {node.value.id}.{node.attr}, which is pickle"
        elif (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and not (isinstance(node.value, ast.Constant) and node.value.value is False)
        ):
            yield node.value.lineno, "allows pickle"


def faults(source: str, path: Path) -> list[str]:
    """All faults of one file, ``path`` being relative to the root: 'path:line: what'."""
    tree = ast.parse(source, str(path))
    package = path.parts[0]
    problems = [
        (line, fault)
        for line, name in imports(tree, path.parts[:-1])
        if (fault := import_fault(package, name)) is not None
    ]
    problems += call_faults(tree)
    return [f"{path}:{line}: {fault}" for line, fault in sorted(problems)]


@pytest.mark.parametrize("package", BELOW)
def test_package_keeps_to_its_layer(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 1, f"nothing to check under {package}/"
    problems = [
        fault for file in files for fault in faults(file.read_text(), file.relative_to(ROOT))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("kernels/x.py", "from models.config.model_config import ModelConfig", "not below it"),
        ("kernels/x.py", "import engine", "not below it"),
        ("models/x.py", "def f():\n    from optim import AdamW8bit", "not below it"),
        ("optim/x.py", "import models.decoder", "not below it"),
        ("engine/x.py", "from cli import main", "not below it"),
        ("engine/data/x.py", "from ...cli import main", "not below it"),
        ("cli/x.py", "import examples.demo", "not below it"),
        ("engine/x.py", "from tests import conftest", "not below it"),
        ("models/x.py", "import pydantic", "may use only"),
        ("kernels/x.py", "from jinja2 import sandbox", "may use only"),
        ("engine/x.py", "import transformers.models", "compared with"),
        ("engine/x.py", "import importlib\nimportlib.import_module('peft')", "compared with"),
        ("cli/x.py", "__import__('bitsandbytes')", "compared with"),
        ("engine/x.py", "if True:\n    import pickle", "pickle"),
        ("engine/x.py", "from torch import load", "pickle"),
        ("engine/x.py", "import torch\ntorch.save({}, 'x')", "pickle"),
        ("engine/x.py", "import torch\nload = torch.load", "pickle"),
        ("engine/x.py", "import numpy\nnumpy.load('x', allow_pickle=True)", "pickle"),
    ],
)
def test_planted_fault_is_found(path: str, source: str, expected: str) -> None:
    problems = faults(source, Path(path))
    assert len(problems) == 1, problems
    assert expected in problems[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/x.py", "import math\nimport torch\nfrom kernels.runtime.dispatch import choose"),
        ("models/x.py", "from . import config\nfrom kernels import rope\nimport safetensors.torch"),
        ("engine/data/x.py", "from .. import errors\nfrom ..formats import gguf\nimport jinja2"),
        ("cli/x.py", "from engine.config.train_config import TrainConfig\nimport typer"),
    ],
)
def test_allowed_import_is_no_fault(path: str, source: str) -> None:
    assert faults(source, Path(path)) == []


GROUND = {
    "cli": {"from_settings", "say"},
    "engine": {
        "errors",
        "device",
        "provenance",
        "plots",
        "patterns",
        # What every table of settings is made of, so that tables may lie in rooms.
        "config.aliases",
        "config.choices",
        "config.explain",
        "config.numbers",
        "config.settings",
        "config.spelling",
    },
    "kernels": set[str](),
    "models": {"json_values"},
    "optim": set[str](),
}
"""Files of a package that all its rooms may import: each is a room of its own."""
VERBS = "engine.verbs"


def folder_of(module: str, folders: set[str]) -> str:
    """The folder that a module lies in; a package's `__init__` lies in the package."""
    package, _, name = module.partition(".")
    if module in folders or name in GROUND[package]:
        return module
    return module.rpartition(".")[0]


def is_verbs(folder: str) -> bool:
    """Whether a folder is `engine.verbs` or lies in it."""
    return folder == VERBS or folder.startswith(f"{VERBS}.")


def folder_faults(sources: Mapping[Path, str]) -> list[str]:
    """Circles of modules or rooms, and rooms that import what stands above them."""
    graph = import_graph(sources)
    folders = {".".join(path.parts[:-1]) for path in sources}
    faults = [f"circle: {' -> '.join(circle)}" for circle in circles(graph)]
    reached: dict[str, set[str]] = {folder_of(module, folders): set() for module in graph}
    for module, targets in graph.items():
        home, package = folder_of(module, folders), module.partition(".")[0]
        others = {target: folder_of(target, folders) for target in sorted(targets)}
        faults += [
            f"{module} imports {target}, which stands above its room"
            for target, other in others.items()
            if home != package == other
        ]
        faults += [
            f"{module} imports {target}, a verb, which stands above its room"
            for target, other in others.items()
            if is_verbs(other) and package == "engine" and home != package and not is_verbs(home)
        ]
        reached[home] |= set(others.values()) - {home, *GROUND}
    return faults + [f"rooms in a circle: {' -> '.join(circle)}" for circle in circles(reached)]


def test_no_modules_and_no_rooms_import_each_other_in_a_circle() -> None:
    sources = product_sources()
    assert len(sources) > 200
    assert not folder_faults(sources), "\n".join(folder_faults(sources))
    around = import_graph(sources | sources_of(("bench", "examples")))
    assert circles(around) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"engine/a/x.py": "from engine.a import y", "engine/a/y.py": "import engine.a.x"},
            "circle",
        ),
        (
            {
                "engine/a/x.py": "from engine.a.y import f",
                "engine/a/y.py": "if TYPE_CHECKING:\n    from engine.a.x import g",
            },
            "circle",
        ),
        (
            {
                "engine/a/x.py": "def f():\n    import engine.b.x",
                "engine/a/y.py": "",
                "engine/b/x.py": "",
                "engine/b/y.py": "import engine.a.y",
            },
            "rooms in a circle",
        ),
        (
            {
                "engine/a/x.py": "from engine.a.b.x import f",
                "engine/a/y.py": "",
                "engine/a/b/x.py": "",
                "engine/a/b/y.py": "from engine.a.y import g",
            },
            "rooms in a circle",
        ),
        ({"engine/a/x.py": "from engine.train import f", "engine/train.py": ""}, "stands above"),
        (
            {
                "engine/a/x.py": "import engine.verbs.training.train",
                "engine/verbs/training/train.py": "",
            },
            "a verb, which stands above",
        ),
        (
            {
                "engine/errors.py": "import engine.a.x",
                "engine/a/x.py": "",
                "engine/a/y.py": "import engine.errors",
            },
            "rooms in a circle",
        ),
    ],
)
def test_planted_fault_between_rooms_is_found(files: dict[str, str], expected: str) -> None:
    packages = {f"{path.partition('/')[0]}/__init__.py": "" for path in files}
    problems = folder_faults({Path(path): source for path, source in (packages | files).items()})
    assert len(problems) == 1, problems
    assert expected in problems[0]


def test_ground_files_and_rooms_below_are_no_fault() -> None:
    files = {
        "engine/__init__.py": "",
        "engine/train.py": "import engine.a.x",
        "engine/errors.py": "",
        "engine/a/x.py": "import engine.errors\nimport engine.b.x",
        "engine/b/x.py": "",
    }
    assert folder_faults({Path(path): source for path, source in files.items()}) == []
    assert module_name(Path("engine/a/__init__.py")) == "engine.a"
