"""Read YAML strictly: safe tags, bounded aliases, one error for every fault.

PyYAML's safe loader runs no code, but a text can still hurt a program that trusts it: aliases of
aliases that stand for billions of values, nesting deeper than the interpreter's stack, and tags
whose values do not fit (`!!int ''`), which raise whatever Python raises. Here each of these is a
`yaml.YAMLError` with line and column.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_DEPTH = 64
"""Mappings and lists nested deeper than this are refused (the loader itself is recursive)."""

_TOO_DEEP = f"values nested more than {MAX_DEPTH} deep"

MAX_SHARED = 50_000
"""How many values the aliases of a text may stand for, all together."""

_YAML_1_1 = (":bool", ":float", ":int", ":timestamp")
_MISFITS = (ValueError, KeyError, AttributeError, TypeError, IndexError, OverflowError)


class GuardedLoader(yaml.SafeLoader):
    """PyYAML's safe loader, bounded in depth and in what aliases stand for."""

    def __init__(self, text: str) -> None:
        self._depth = 0
        self._values = 0
        self._shared = 0
        self._sizes: dict[int, int] = {}
        super().__init__(text)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose as PyYAML does, counting values; an alias counts for all that it stands for."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            size = self._sizes.get(id(node))
            if size is None:
                told = "an alias inside the very value that it stands for"
                raise self._refused(told, event.start_mark)
            self._shared += size
            self._values += size
            if self._shared > MAX_SHARED:
                told = f"aliases that stand for over {MAX_SHARED} values"
                raise self._refused(told, event.start_mark)
            return node
        before = self._values
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._refused(_TOO_DEEP, event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._values += 1
        self._sizes[id(node)] = self._values - before
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; one that does not fit its tag is a `YAMLError` too."""
        try:
            return super().construct_object(node, deep)
        except _MISFITS as error:
            kind = node.tag.rpartition(":")[2]
            told = f"a value that cannot be read as {kind} ({type(error).__name__})"
            raise yaml.constructor.ConstructorError(None, None, told, node.start_mark) from None

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        """Scan a bracket; the scanner looks a thousand characters ahead, slowly where all are."""
        if self.flow_level >= MAX_DEPTH:
            raise self._refused(_TOO_DEEP, self.get_mark())
        super().fetch_flow_collection_start(token)

    @staticmethod
    def _refused(what: str, mark: Any) -> yaml.YAMLError:
        return yaml.MarkedYAMLError(problem=what, problem_mark=mark)


class StrictLoader(GuardedLoader):
    """YAML 1.2's idea of numbers and booleans; dates are texts."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(_YAML_1_1)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Decimal whatever zeros it begins with; 0o17 and 0xf as they say."""
        text = str(self.construct_scalar(node))
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


StrictLoader.add_constructor("tag:yaml.org,2002:int", StrictLoader.construct_yaml_int)
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    list("-+0123456789"),
)
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d[\d_]*)?\.\d[\d_]*(?:[eE][-+]?\d+)?|\d[\d_]*\.?(?:[eE][-+]?\d+)"
        r"|\d[\d_]*\.|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def load(text: str, loader: type[GuardedLoader] = GuardedLoader) -> Any:
    """The one value of a YAML text, with `GuardedLoader` in YAML 1.1. Raises `yaml.YAMLError`."""
    try:
        return yaml.load(text, Loader=loader)
    except RecursionError as error:
        raise yaml.YAMLError(str(error)) from None
