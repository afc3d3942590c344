"""Rows from sources of other languages: documented definitions, by tree-sitter's grammars.

A definition is documented by the comment that ends on the line before it, with nothing but its
attributes or annotations between them. Sources are parsed and never compiled. The grammars are
packages of their own, the extra `code`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from engine.data.corpus.records import Record
from engine.data.makers.code import SHORTEST, Definition, ExtractLimits, definition_rows

if TYPE_CHECKING:
    from tree_sitter import Node, Parser


@dataclass(frozen=True)
class Grammar:
    """A language: its name in prompts, the package of its grammar, and that package's function."""

    name: str
    package: str
    function: str = "language"


_JAVASCRIPT = Grammar("JavaScript", "tree_sitter_javascript")
_TYPESCRIPT = Grammar("TypeScript", "tree_sitter_typescript", "language_typescript")
_C, _CPP = Grammar("C", "tree_sitter_c"), Grammar("C++", "tree_sitter_cpp")
GRAMMARS: dict[str, Grammar] = {
    **dict.fromkeys((".js", ".mjs", ".cjs", ".jsx"), _JAVASCRIPT),
    **dict.fromkeys((".ts", ".mts", ".cts"), _TYPESCRIPT),
    ".tsx": Grammar("TypeScript", "tree_sitter_typescript", "language_tsx"),
    ".go": Grammar("Go", "tree_sitter_go"),
    ".rs": Grammar("Rust", "tree_sitter_rust"),
    ".java": Grammar("Java", "tree_sitter_java"),
    ".c": _C,
    **dict.fromkeys((".h", ".hh", ".hpp", ".hxx", ".cc", ".cpp", ".cxx"), _CPP),
    ".rb": Grammar("Ruby", "tree_sitter_ruby"),
    ".cs": Grammar("C#", "tree_sitter_c_sharp"),
}
"""Suffix of a file -> its language."""

_KINDS = {
    "function": (
        "function_declaration generator_function_declaration function_item function_definition "
        "function_signature_item"
    ),
    "method": (
        "method_definition method_declaration constructor_declaration method singleton_method"
    ),
    "class": "class_declaration abstract_class_declaration class_specifier class",
    "struct": "struct_item struct_specifier struct_declaration",
    "enum": "enum_declaration enum_item enum_specifier",
    "interface": "interface_declaration",
    "trait": "trait_item",
    "record": "record_declaration",
    "module": "module",
    "type": "type_declaration type_alias_declaration type_item",
}
_KIND_OF = {node: kind for kind, nodes in _KINDS.items() for node in nodes.split()}
_BETWEEN = (
    "attribute_item", "attribute_list", "decorator", "annotation", "marker_annotation", "modifiers",
)  # fmt: skip
_COMMENT_MARKS = re.compile(r"^\s*(?://[/!]?|#|/\*[*!]?|\*(?!/))? ?|\s*\*/\s*$")
_TAGS = re.compile(r"</?(summary|remarks|para|returns)>|<(param|exception) [^>]*>|</[a-z]+>")


def missing_grammar(file: Path) -> str | None:
    """The language of a file whose grammar is not installed; None where it can be read."""
    grammar = GRAMMARS[file.suffix]
    present = find_spec("tree_sitter") is not None and find_spec(grammar.package) is not None
    return None if present else grammar.name


@cache
def _parser(grammar: Grammar) -> Parser:
    from tree_sitter import Language, Parser

    make = getattr(import_module(grammar.package), grammar.function)
    return Parser(Language(make()))


def tree_rows(file: Path, task: str, limits: ExtractLimits, counts: Counter[str]) -> list[Record]:
    """Rows of a file, as `engine.data.makers.code.code_rows` makes them of Python.

    Raises `ValueError` for a file that is no UTF-8 or whose grammar finds an error in it.
    """
    grammar, source = GRAMMARS[file.suffix], file.read_bytes()
    lines = source.decode("utf-8-sig").splitlines()
    root = _parser(grammar).parse(source).root_node
    if root.has_error and not root.child_count:
        raise ValueError(f"it is not {grammar.name}")
    rows = []
    for node, name, text in _documented(root, ()):
        kind = _kind(node)
        if kind in ("function", "method"):
            kind = "method" if "." in name else "function"
        if not limits.private and name.rpartition(".")[2].startswith(("_", "#")):
            counts["private"] += 1
            continue
        if len(text) < SHORTEST or node.has_error:
            counts["cannot_be_parsed" if node.has_error else "without_a_docstring"] += 1
            continue
        first, last = node.start_point.row, node.end_point.row
        where, code = f"{file}:{first + 1}", _code(node, lines)
        documented = Definition(grammar.name, kind, name, text, code, last - first + 1, where)
        rows += definition_rows(documented, task, limits, counts)
    return rows


def _documented(node: Node, path: tuple[str, ...]) -> Iterator[tuple[Node, str, str]]:
    """Every definition below a node: itself, its name with those around it, its comment."""
    for child in node.named_children:
        inner = _inner(child)
        name = _name(inner) if inner.type in _KIND_OF else None
        if name is not None:
            yield child, ".".join((*path, name)), _comment_before(child)
        if name is not None and _kind(child) in ("function", "method"):
            continue  # what is defined inside a function is its own affair
        own = (name or _container(inner),)
        yield from _documented(inner, (*path, *(part for part in own if part)))


def _inner(node: Node) -> Node:
    """What an export or a template declares, or the node itself."""
    if node.type in ("export_statement", "template_declaration"):
        for child in node.named_children:
            if child.type in _KIND_OF:
                return child
    return node


def _kind(node: Node) -> str:
    return _KIND_OF[_inner(node).type]


def _container(node: Node) -> str | None:
    """The name of what holds definitions and is none: an implementation of a type."""
    target = node.child_by_field_name("type") if node.type == "impl_item" else None
    return None if target is None else _text(target).partition("<")[0]


def _name(node: Node) -> str | None:
    """The name that a definition gives; None for one without body or name."""
    if node.type.endswith("_specifier") and node.child_by_field_name("body") is None:
        return None  # a type that is used, not defined
    if node.type == "type_declaration":
        node = next((c for c in node.named_children if c.type == "type_spec"), node)
    named = node.child_by_field_name("name")
    declarator = node.child_by_field_name("declarator") if named is None else None
    while declarator is not None:
        named, declarator = declarator, declarator.child_by_field_name("declarator")
    if named is None:
        return None
    receiver = node.child_by_field_name("receiver")
    if receiver is not None:  # Go's methods stand beside their type
        of = re.findall(r"\w+", _text(receiver))
        return f"{of[-1]}.{_text(named)}" if of else _text(named)
    return _text(named).replace("::", ".")


def _comment_before(node: Node) -> str:
    """The text of the comment that ends just before a definition, without its marks."""
    parts: list[str] = []
    first, before, body = node.start_point.row, node.prev_named_sibling, node.parent
    if before is None and body is not None and body.type == "body_statement":
        before = body.prev_named_sibling  # Ruby has the first comment of a class outside its body
    while before is not None and (before.type in _BETWEEN or "comment" in before.type):
        end = before.end_point.row - (before.end_point.column == 0)
        if first - end > 1:
            break
        if "comment" in before.type:
            parts.append(_text(before).rstrip("\n"))
        first, before = before.start_point.row, before.prev_named_sibling
    lines = [_COMMENT_MARKS.sub("", line) for part in reversed(parts) for line in part.split("\n")]
    return _TAGS.sub("", "\n".join(line.rstrip() for line in lines)).strip()


def _code(node: Node, lines: list[str]) -> str:
    """The lines of a definition, without their common indentation."""
    start = node
    while start.prev_named_sibling is not None and start.prev_named_sibling.type in _BETWEEN:
        start = start.prev_named_sibling
    chosen = lines[start.start_point.row : node.end_point.row + 1]
    indent = chosen[0][: len(chosen[0]) - len(chosen[0].lstrip())]
    return "\n".join(line.removeprefix(indent) for line in chosen).rstrip()


def _text(node: Node) -> str:
    return (node.text or b"").decode("utf-8", "replace")
