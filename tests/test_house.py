"""What holds of every file: its size, its words, its parameters, and that it patches nothing.

docs/style.md gives the reasons. Each rule is tried on a planted fault.
"""

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.source_tree import product_sources, sources_of

EVERYTHING = ("kernels", "models", "optim", "engine", "cli", "bench", "examples", "tests")
MOST_FILES, FEWEST_FILES = 14, 3
MOST_LINES = 400
MOST_PARAMETERS = 8
MOST_WORDS = 12

REPLACED_WORDS = {
    "card": "gpu",
    "cards": "gpus",
    "contenders": "baselines",
    "dead": "pruned",
    "differentiate": "backward",
    "dry": "simulate",
    "found": "what it is",
    "gone": "pruned",
    "held": "pruned, or what it is",
    "kept": "saved",
    "ladder": "options",
    "lend": "offload",
    "lent": "offloaded",
    "lever": "option",
    "levers": "options",
    "place": "path, offset or index",
    "places": "paths, offsets or indices",
    "room": "space",
    "rooms": "spaces",
    "rung": "option",
    "singly": "low_memory_decode",
    "ways": "what it is",
}
"""Words that no identifier holds, and what to write instead (docs/style.md)."""

ALLOWED = re.compile(
    # Names of other libraries, the user's word `--dry-run`, and the model card of the hub.
    r"dry_run|DryRun|model_card|ModelCard|\w*(?:NotFound|Found)Error|add_place|inplace|in_place"
)


@cache
def nodes_of(source: str) -> tuple[ast.AST, ...]:
    """The nodes of a file's syntax tree, the module first; rules share them."""
    return tuple(ast.walk(ast.parse(source)))


@cache
def words_of(identifier: str) -> list[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    parts = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+", identifier)
    return [part.lower() for part in parts]


def replaced_words(source: str) -> Iterator[str]:
    """Identifiers that hold a word of `REPLACED_WORDS`."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        name = token.string
        if token.type != tokenize.NAME or ALLOWED.fullmatch(name) or name.startswith("test_"):
            continue
        for word in set(words_of(name)) & set(REPLACED_WORDS):
            yield f"line {token.start[0]}: {name}; write {REPLACED_WORDS[word]}"


def imported_names(source: str) -> set[str]:
    """Names that a file binds by importing: modules, classes and functions of others."""
    aliases = (
        alias
        for node in nodes_of(source)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    )
    return {(alias.asname or alias.name).partition(".")[0] for alias in aliases}


def root_name(node: ast.expr) -> str | None:
    """`a` of `a.b.c`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def assigned(node: ast.AST) -> list[ast.expr]:
    """What a statement binds or deletes."""
    if isinstance(node, ast.Assign | ast.Delete):
        return list(node.targets)
    if isinstance(node, ast.AugAssign | ast.AnnAssign):
        return [node.target]
    return []


def replacements(source: str, methods: frozenset[str] = frozenset()) -> Iterator[str]:
    """Where a file replaces an attribute of a module, a class or, by a method's name, an object.

    `methods` are the names of the product's methods: assigning to one replaces it.
    """
    classes = {node.name for node in nodes_of(source) if isinstance(node, ast.ClassDef)}
    foreign = imported_names(source) | classes | {"cls"}
    for node in nodes_of(source):
        for target in (inner for outer in assigned(node) for inner in ast.walk(outer)):
            if not isinstance(target, ast.Attribute) or isinstance(target.ctx, ast.Load):
                continue
            root = root_name(target)
            if root in foreign or (target.attr in methods and root not in ("self", "ctx")):
                yield f"line {target.lineno}: assigns to {ast.unparse(target)}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("setattr", "delattr", "type.__setattr__") and not (
                isinstance(node.args[0], ast.Name)
                and node.args[0].id in ("self", "module")
                and called == "setattr"
            ):
                yield f"line {node.lineno}: calls {called} on {ast.unparse(node.args[0])}"
            if re.search(r"\b(mock|monkeypatch)\b|\bpatch\b\.", called):
                yield f"line {node.lineno}: calls {called}"
        if isinstance(node, ast.ImportFrom | ast.Import) and "mock" in ast.unparse(node):
            yield f"line {node.lineno}: imports a mock"
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            holder = ast.unparse(node.value)
            if holder == "sys.modules" or re.fullmatch(r"vars\(.*\)|(?!self)\w+\.__dict__", holder):
                yield f"line {node.lineno}: assigns to {holder}[...]"


def method_names(files: dict[Path, str]) -> frozenset[str]:
    """Names that only methods have, and no field or attribute of any class."""
    methods: set[str] = set()
    data: set[str] = set()
    for source in files.values():
        for node in nodes_of(source):
            if isinstance(node, ast.ClassDef):
                methods |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
                data |= {ast.unparse(x.target) for x in node.body if isinstance(x, ast.AnnAssign)}
            for target in assigned(node):
                if isinstance(target, ast.Attribute) and root_name(target) == "self":
                    data.add(target.attr)
    return frozenset(methods - data) | {"forward", "backward", "__call__"}


def is_triton(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def long_signatures(source: str) -> Iterator[str]:
    """Functions with too many parameters; Triton kernels and autograd signatures aside."""
    autograd = {
        id(item)
        for node in nodes_of(source)
        if isinstance(node, ast.ClassDef) and any("Function" in ast.unparse(b) for b in node.bases)
        for item in node.body
    }
    for node in nodes_of(source):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if is_triton(node) or id(node) in autograd:
            continue
        arguments = node.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > MOST_PARAMETERS:
            yield f"line {node.lineno}: {node.name} takes {count} parameters"


def first_line(source: str) -> str:
    module = nodes_of(source)[0]
    assert isinstance(module, ast.Module)
    return (ast.get_docstring(module) or "").partition("\n")[0]


def every_fault(rule: str, files: dict[Path, str]) -> list[str]:
    """The faults of all files by one rule: 'path: fault'."""
    methods = method_names(files) if rule == "replacements" else frozenset()
    checks = {
        "words": replaced_words,
        "replacements": lambda source: replacements(source, methods),
        "signatures": long_signatures,
    }
    return [f"{path}: {fault}" for path, text in files.items() for fault in checks[rule](text)]


def test_no_identifier_holds_a_replaced_word() -> None:
    faults = every_fault("words", sources_of(EVERYTHING))
    assert not faults, f"{len(faults)} identifiers\n" + "\n".join(faults)


def test_the_product_replaces_no_attribute_at_run_time() -> None:
    faults = every_fault("replacements", product_sources())
    assert not faults, "\n".join(faults)


def test_no_function_takes_more_parameters_than_a_reader_can_hold() -> None:
    faults = every_fault("signatures", product_sources())
    assert not faults, "\n".join(faults)


def test_class_names_are_unique() -> None:
    names = Counter(
        node.name
        for source in product_sources().values()
        for node in nodes_of(source)
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_docstrings_begin_with_a_short_line() -> None:
    files = sources_of(("kernels", "models", "optim", "engine", "cli", "bench", "examples"))
    lines = {path: first_line(source) for path, source in files.items() if source.strip()}
    assert [str(path) for path, line in lines.items() if not line] == []
    long = {path: line for path, line in lines.items() if len(line.split()) > MOST_WORDS}
    assert not long, "\n".join(f"{path}: {line}" for path, line in long.items())


def test_folders_and_files_are_small() -> None:
    files = sources_of(EVERYTHING)
    folders = Counter(path.parent for path, source in files.items() if source.strip())
    crowded = {str(folder): count for folder, count in folders.items() if count > MOST_FILES}
    product = {path.parts[0] for path in product_sources()} | {"bench"}
    lonely = {
        str(folder): count
        for folder, count in folders.items()
        if folder.parts[0] in product
        and count + len({inner for inner in folders if inner.parent == folder}) < FEWEST_FILES
    }
    long = {str(p): n for p, s in files.items() if (n := len(s.splitlines())) > MOST_LINES}
    assert (crowded, lonely, long) == ({}, {}, {})


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        ("words", "kept = 1"),
        ("words", "class DryMeter:\n    pass"),
        ("words", "def f(some_levers): ..."),
        ("replacements", "import torch\ntorch.cuda.current_device = f"),
        ("replacements", "from models.layers.block import DecoderLayer\nDecoderLayer.forward = f"),
        ("replacements", "import optim.clip as clip\nsetattr(clip, 'norm', f)"),
        ("replacements", "class A:\n    x = 1\ndel A.x"),
        ("replacements", "import sys\nsys.modules['torch'] = f"),
        ("replacements", "vars(module)['f'] = g"),
        ("replacements", "from unittest import mock"),
        ("replacements", "class M:\n    def forward(self): ...\ndef f(m):\n    m.forward = g"),
        ("signatures", "def f(a, b, c, d, e, *, g, h, i, j): ..."),
    ],
)
def test_a_planted_fault_is_found(rule: str, source: str) -> None:
    assert len(every_fault(rule, {Path("engine/x.py"): source})) == 1


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        ("words", "dry_run = FileNotFoundError  # kept in a comment"),
        ("replacements", "import torch\nx = torch.zeros(3)\nx.grad = None\nself.forward_pass = 1"),
        ("signatures", "@triton.jit\ndef kernel(a, b, c, d, e, f, g, h, i, j): ..."),
        ("signatures", "class F(Function):\n    def forward(ctx, a, b, c, d, e, f, g, h, i): ..."),
        ("signatures", "def method(self, a, b, c, d, e, f, g, h): ..."),
    ],
)
def test_what_is_allowed_is_no_fault(rule: str, source: str) -> None:
    assert every_fault(rule, {Path("engine/x.py"): source}) == []
