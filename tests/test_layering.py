"""The order of the packages, the libraries each may use, and what none of them may do.

    cli  ->  engine  ->  models, optim  ->  kernels  ->  torch, triton

A package may import those below it; models and optim do not know each other; nothing imports tests
or bench. The rules are read off the syntax trees, so an import inside a function counts too.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "kernels": set[str](),
    "models": {"kernels"},
    "optim": {"kernels"},
    "engine": {"models", "optim", "kernels"},
    "cli": {"engine", "models", "optim", "kernels"},
}
OWN = {*BELOW, "tests", "bench", "examples"}
ARITHMETIC_ONLY = {"kernels", "models", "optim"}
ARITHMETIC_LIBRARIES = {"torch", "triton", "numpy", "safetensors"}
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


def imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of every import, relative and by-name ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            first = node.args[0]
            by_name = called in {"__import__", "import_module", "importlib.import_module"}
            if by_name and isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


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
    found = [
        (line, fault)
        for line, name in imports(tree, path.parts[:-1])
        if (fault := import_fault(package, name)) is not None
    ]
    found += call_faults(tree)
    return [f"{path}:{line}: {fault}" for line, fault in sorted(found)]


@pytest.mark.parametrize("package", BELOW)
def test_package_keeps_to_its_layer(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 1, f"nothing to check under {package}/"
    found = [fault for file in files for fault in faults(file.read_text(), file.relative_to(ROOT))]
    assert not found, "\n".join(found)


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
    found = faults(source, Path(path))
    assert len(found) == 1, found
    assert expected in found[0]


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
