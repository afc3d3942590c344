"""Checkers accept what they are named for, in fences and bare, and say what is wrong."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config.tasks.gates import GateSettings
from engine.errors import ConfigError
from engine.gates.checkers import fenced, make_checker


def accepts(answer: str, **settings: Any) -> bool:
    checker = make_checker(GateSettings(**settings))
    assert checker is not None
    return checker(answer) is None


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ("x = 1", True),
        ("Sure!\n```python\ndef f():\n    return 1\n```\nThat is it.", True),
        ("```py\nx = 1\n```\nand\n```python\ny = x\n```", True),
        ("~~~\nx = 1\n~~~", True),
        ("```python\nx = 1", True),  # cut off at the longest answer, and whole all the same
        ("```json\n{}\n```\n```python\nx =\n```", False),
        ("Sure, here is the function.", False),
        ("", False),
        ("# only a comment", False),
        ("x = (", False),
        ("x = 1\0", False),
        ("(" * 500 + ")" * 500, False),
    ],
)
def test_python(answer: str, accepted: bool) -> None:
    assert accepts(answer, checker="python-ast") is accepted


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        ('{"a": 1}', True), ("```json\n[1, 2]\n```", True), ("```\nnull\n```", True),
        ('{"a": 1,}', False), ("{'a': 1}", False), ("", False), ('{"a": 1} and more', False),
        ("[" * 100_000, False),
    ],
)  # fmt: skip
def test_json(answer: str, accepted: bool) -> None:
    assert accepts(answer, checker="json") is accepted


def test_json_schema(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "required": ["name"]}))
    asked = {"checker": "json-schema", "schema_file": schema}
    assert accepts('{"name": 1}', **asked)
    assert not accepts("{}", **asked)
    assert not accepts("[", **asked)
    schema.write_text('{"type": "thing"}')
    with pytest.raises(ConfigError, match="no valid JSON schema"):
        accepts("{}", **asked)


def test_pattern_and_command() -> None:
    assert accepts("the answer is\n42", checker="regex", pattern=r"answer.*\d+")
    assert not accepts("none", checker="regex", pattern=r"\d")
    test = [sys.executable, "-c", "import sys; sys.exit('x' not in sys.stdin.read())"]
    assert accepts("x", checker="command", command=test)
    assert not accepts("y", checker="command", command=test)
    endless = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert not accepts("x", checker="command", command=endless, command_seconds=0.5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"checker": "regex"}, "needs `pattern`"),
        ({"checker": "regex", "pattern": "("}, "no regular expression"),
        ({"checker": "json-schema"}, "needs `schema_file`"),
        ({"checker": "command"}, "needs `command`"),
        ({"checker": "vibes"}, "python-ast"),
        ({"parse_rate": 1.5}, "parse_rate"),
        ({"pass_at": {"one": 0.5}}, "numbers of answers"),
    ],
)
def test_what_is_missing_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_checker(GateSettings(**settings))


def test_the_language_that_was_asked_for_is_taken_before_plain_fences() -> None:
    answer = "```\nplain\n```\n```python\ncode\n```\n"
    assert fenced(answer, ("python",)) == "code\n"
    assert fenced(answer, ("json",)) == "plain\n"
    assert fenced("no fence", ("json",)) == "no fence"
