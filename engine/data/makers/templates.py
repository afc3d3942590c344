"""Rows from templates whose variables take values from lists.

    values:
      operation: [{word: sum, sign: "+"}, {word: difference, sign: "-"}]
      a: {from: 1, to: 99}
      b: [2, 3, 5]
    templates:
      - prompt: "What is the {{ operation.word }} of {{ a }} and {{ b }}?"
        response: "{{ a + b if operation.sign == '+' else a - b }}"
        when: "a != b"
        category: arithmetic

Templates are Jinja's, in its sandbox. A template takes every combination of the values that it
names, in an order that the seed decides.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox
import yaml

from engine.data.corpus.records import Record, new_record
from engine.errors import DataError
from engine.storage import strict_yaml

_TEXTS = ("prompt", "response", "system", "category", "difficulty")
_KEYS = {*_TEXTS, "tags", "rating", "when"}
_SHUFFLED, _TRIES = 200_000, 50


@dataclass(frozen=True)
class _Template:
    """A template: its texts, its condition, and the lists of values that it names."""

    texts: Mapping[str, jinja2.Template]
    about: Mapping[str, Any]
    when: Any
    values: Mapping[str, Sequence[Any]]

    @property
    def combinations(self) -> int:
        return math.prod(len(values) for values in self.values.values())

    def values_at(self, index: int) -> dict[str, Any]:
        """The combination of a number, which has a digit for each list."""
        chosen = {}
        for name, values in self.values.items():
            index, digit = divmod(index, len(values))
            chosen[name] = values[digit]
        return chosen


def expand(text: str, source: str, limit: int, seed: int) -> tuple[list[Record], Counter[str]]:
    """Rows of a file of templates, all of which have their turn, and what was left out.

    Args:
        text: the file, YAML.
        source: its name, which rows have as theirs.
        limit: most rows.
        seed: of the order.

    Raises:
        DataError: the file is no such file, or a template of it cannot be filled.
    """
    templates = _templates(text, source)
    counts = Counter[str]()
    streams = [
        _rows(template, f"{source}:{number}", random.Random(f"{seed} {number}"), counts)
        for number, template in enumerate(templates, 1)
    ]
    rows: list[Record] = []
    seen = set[tuple[str, str]]()
    for turn in itertools.zip_longest(*streams):
        for row in turn:
            if row is None or len(rows) == limit:
                continue
            key = row["prompt"], row["response"]
            counts["repeated"] += key in seen
            if key not in seen:
                seen.add(key)
                rows.append(row)
        if len(rows) == limit:
            break
    if not rows:
        raise DataError(f"{source}: no combination of values gives a row; look at its conditions.")
    return rows, counts


def _templates(text: str, source: str) -> list[_Template]:
    try:
        told = strict_yaml.load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{source}: the file is no YAML ({error}).") from None
    if not isinstance(told, dict) or set(told) - {"values", "templates"}:
        raise DataError(
            f"{source}: expected the keys 'values' and 'templates', and found "
            f"{sorted(map(str, told)) if isinstance(told, dict) else type(told).__name__}."
        )
    values = told.get("values") or {}
    if not isinstance(values, dict):
        raise DataError(f"{source}: 'values' should be a mapping of names to lists.")
    lists = {name: _values(name, value, source) for name, value in values.items()}
    items = told.get("templates")
    if not isinstance(items, list) or not items:
        raise DataError(f"{source}: 'templates' should be a list of at least one.")
    return [
        _template(item, lists, f"{source}, template {number}")
        for number, item in enumerate(items, 1)
    ]


def _values(name: str, value: Any, source: str) -> Sequence[Any]:
    if isinstance(value, dict) and {"from", "to"} <= set(value) <= {"from", "to", "step"}:
        first, last, step = value["from"], value["to"], value.get("step", 1)
        if all(type(number) is int for number in (first, last, step)) and step > 0:
            value = range(first, last + 1, step)
    if not isinstance(value, list | range) or not value:
        raise DataError(
            f"{source}: the values of '{name}' should be a list, or {{from: 1, to: 9}} with whole "
            "numbers."
        )
    return value


def _template(item: Any, lists: Mapping[str, Sequence[Any]], where: str) -> _Template:
    if not isinstance(item, dict) or not {"prompt", "response"} <= set(item) <= _KEYS:
        raise DataError(
            f"{where}: expected a mapping with 'prompt' and 'response', and of other keys only "
            f"{sorted(_KEYS - {'prompt', 'response'})}."
        )
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    sources = {key: str(item[key]) for key in _TEXTS if item.get(key) is not None}
    try:
        condition = str(item.get("when", "true"))
        parsed = [*sources.values(), f"{{{{ {condition} }}}}"]
        names = set[str]()
        for text in parsed:
            names |= jinja2.meta.find_undeclared_variables(environment.parse(text))
        texts = {key: environment.from_string(text) for key, text in sources.items()}
        when = environment.compile_expression(condition)
    except jinja2.TemplateError as error:
        raise DataError(f"{where}: the template cannot be read ({error}).") from None
    unknown = names - set(lists) - set(environment.globals)
    if unknown:
        raise DataError(f"{where}: {sorted(unknown)} have no values; there are {sorted(lists)}.")
    about = {key: item[key] for key in ("tags", "rating") if item.get(key) is not None}
    return _Template(texts, about, when, {n: v for n, v in lists.items() if n in names})


def _rows(
    template: _Template, source: str, generator: random.Random, counts: Counter[str]
) -> Iterator[Record]:
    for index in _order(template.combinations, generator):
        values = template.values_at(index)
        try:
            if not template.when(**values):
                counts["against_the_condition"] += 1
                continue
            texts = {key: text.render(values) for key, text in template.texts.items()}
        except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError) as error:
            raise DataError(f"{source} cannot be filled with {values} ({error}).") from None
        if not texts["response"].strip():
            counts["without_a_response"] += 1
            continue
        yield new_record(**texts, **template.about, source=source)


def _order(count: int, generator: random.Random) -> Iterator[int]:
    """Numbers below `count` in a random order; of very many, draws without repeats."""
    if count <= _SHUFFLED:
        yield from generator.sample(range(count), count)
        return
    drawn, misses = set[int](), 0
    while misses < _TRIES:
        index = generator.randrange(count)
        misses = misses + 1 if index in drawn else 0
        if index not in drawn:
            drawn.add(index)
            yield index
