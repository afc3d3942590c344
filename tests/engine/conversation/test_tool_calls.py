"""Tool calls are read in the spellings of the common families, at every cut of the text."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from engine.conversation.tool_calls import ToolCall, ToolCallStream, forced_call
from engine.errors import ConfigError

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "templates"


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool("weather", city={"type": "string"}, days={"type": "integer"}),
    tool("add", a={"type": "number"}, b={}),
]


def read(text: str, seed: int, begun: str = "") -> tuple[str, list[tuple[str, Any]]]:
    """The text and the calls of an answer that comes in random pieces."""
    generator = random.Random(seed)
    stream, parts, at = ToolCallStream(TOOLS, begun), list[str | ToolCall](), 0
    while at < len(text):
        size = generator.randint(1, 12)
        parts += stream.push(text[at : at + size])
        at += size
    parts += stream.finish()
    calls = [(p.name, json.loads(p.arguments)) for p in parts if isinstance(p, ToolCall)]
    assert stream.calls == len(calls)
    return "".join(p for p in parts if isinstance(p, str)), calls


HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
CODER = (
    "<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>"
)
OSLO = ("weather", {"city": "Oslo"})


@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        (HERMES, "", [OSLO]),
        (f"Let me see.\n{HERMES}\n{HERMES}", "Let me see.", [OSLO, OSLO]),
        (f"{HERMES}\nDone.", "Done.", [OSLO]),
        (CODER, "", [("weather", {"city": "12", "days": 3})]),
        ('{"name": "add", "parameters": {"a": 1, "b": "x"}}', "", [("add", {"a": 1, "b": "x"})]),
        (
            '{"name": "add", "parameters": {}}; {"name": "weather", "parameters": {}}',
            "",
            [("add", {}), ("weather", {})],
        ),
        ('[{"name": "add", "arguments": {"a": 1}}]', "", [("add", {"a": 1})]),
        ('{"name": "add", "arguments": "{\\"a\\": 2}"}', "", [("add", {"a": 2})]),
        # What is no call stays as it was written.
        ('{"name": "delete", "parameters": {}}', '{"name": "delete", "parameters": {}}', []),
        ('{"a": 1} is JSON', '{"a": 1} is JSON', []),
        ("<tool_call>{broken</tool_call> so", "<tool_call>{broken</tool_call> so", []),
        ('<tool_call>{"name": "we', '<tool_call>{"name": "we', []),
        ("a < b <tool", "a < b <tool", []),
        ("ends with space \n", "ends with space \n", []),
        ("", "", []),
        # The last mark is missing where the answer ends with the call.
        ('<tool_call>{"name": "add", "arguments": {}}', "", [("add", {})]),
    ],
)
def test_calls_are_read_at_every_cut(text: str, shown: str, calls: list[Any]) -> None:
    for seed in range(40):
        assert read(text, seed) == (shown, calls)


def test_without_tools_an_answer_is_text() -> None:
    stream = ToolCallStream([])
    assert stream.push(HERMES) == [HERMES]
    assert stream.finish() == []


@pytest.mark.parametrize(
    ("template", "name", "rest", "call"),
    [
        ("qwen3", "weather", '"arguments": {"city": "Oslo"}}\n</tool_call>', OSLO),
        ("qwen3", None, 'weather", "arguments": {"city": "Oslo"}}\n</tool_call>', OSLO),
        ("llama3", "weather", '"parameters": {"city": "Oslo"}}', OSLO),
        ("llama3", None, 'add", "parameters": {}}', ("add", {})),
    ],
)
def test_an_answer_can_be_made_to_call(
    template: str, name: str | None, rest: str, call: Any
) -> None:
    begun = forced_call((TEMPLATES / f"{template}.jinja").read_text(), name)
    for seed in range(20):
        assert read(rest, seed, begun) == ("", [call])


def test_a_template_without_calls_cannot_be_made_to_call() -> None:
    with pytest.raises(ConfigError, match="tool_choice"):
        forced_call((TEMPLATES / "chatml.jinja").read_text(), "weather")


def test_parameters_have_the_types_of_their_schema() -> None:
    body = "<function=add>\n<parameter=a>\nTrue\n</parameter>\n<parameter=b>\n[1, 2]\n</parameter>"
    _, calls = read(f"<tool_call>{body}</function></tool_call>", 0)
    assert calls == [("add", {"a": True, "b": [1, 2]})]
