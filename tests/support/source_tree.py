"""Syntax trees of the product and the imports between its modules."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCT = ("kernels", "models", "optim", "engine", "cli")


def module_name(path: Path) -> str:
    """The dotted name of a file, its path being relative to the root."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources_of(tops: Iterable[str]) -> dict[Path, str]:
    """Path relative to the root -> source, of every file below these folders."""
    files = (path for top in tops for path in sorted((ROOT / top).rglob("*.py")))
    return {path.relative_to(ROOT): path.read_text() for path in files}


def product_sources() -> dict[Path, str]:
    """Path relative to the root -> source, of every file of the product."""
    return sources_of(PRODUCT)


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
            first = node.args[0]
            if not isinstance(first, ast.Constant) or not isinstance(first.value, str):
                continue
            if ast.unparse(node.func) in {"__import__", "import_module", "importlib.import_module"}:
                yield node.lineno, first.value


def import_graph(sources: Mapping[Path, str]) -> dict[str, set[str]]:
    """Module -> the modules of `sources` that it imports, `TYPE_CHECKING` imports included."""
    names = {module_name(path): path for path in sources}
    graph: dict[str, set[str]] = {}
    for path, source in sources.items():
        module = module_name(path)
        targets = {name for _, name in imports(ast.parse(source, str(path)), path.parts[:-1])}
        # `from a.b import c` names a module or something that the module a.b holds.
        known = {name if name in names else name.rpartition(".")[0] for name in targets}
        graph[module] = {name for name in known if name in names} - {module}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Every circle of imports, as one path that ends where it begins."""
    done: set[str] = set()
    paths: list[list[str]] = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            paths.append([*path[path.index(module) :], module])
            return
        if module in done:
            return
        for target in sorted(graph[module]):
            visit(target, [*path, module])
        done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return paths
