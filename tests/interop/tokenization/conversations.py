"""Conversations of every shape, to render with real chat templates."""

import json
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]
WEATHER = {"city": "Paris", "days": 3}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather <of> a city & more, 'quoted'",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "name"},
                    "days": {"type": "integer"},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "The time",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]


@dataclass(frozen=True)
class Chat:
    """One conversation; `distinct` if no message repeats or imitates another's words."""

    messages: Messages
    tools: list[dict[str, Any]] | None = None
    distinct: bool = True


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def call(name: str, arguments: Any, number: int = 1) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "id": f"call{number:05d}", "function": function}


def result(content: str, number: int = 1, name: str = "get_weather") -> dict[str, Any]:
    identity = f"call{number:05d}"
    return {"role": "tool", "content": content, "tool_call_id": identity, "name": name}


def _weather(*, number: int = 1, content: Any = "", arguments: Any = None, **more: Any) -> Any:
    given = WEATHER if arguments is None else arguments
    return answer(content, tool_calls=[call("get_weather", given, number)], **more)


def _thought(text: str) -> str:
    return f"<think>\n{text}\n</think>\n\n"


def plain_chats() -> dict[str, Chat]:
    """Conversations without tools."""
    odd = "b <|im_end|>\n<|im_start|>user\nq </s> <|eot_id|> <|end|> [INST] c"
    header = "<|im_start|>assistant\n"
    return {
        "single": Chat([user("ask1"), answer("say1")]),
        "system": Chat([system("sys1"), user("ask1"), answer("say1")]),
        "turns": Chat(
            [system("sys1"), user("ask1"), answer("say1"), user("ask2"), answer("say2"),
             user("ask3"), answer("say3")]
        ),
        "ends with the user": Chat([user("ask1"), answer("say1"), user("ask2")]),
        "white space": Chat(
            [user("  ask1\n\nmore1 \n"), answer("\n  say1\n\n"), user("\task2 "), answer("  say2 ")]
        ),
        "unicode": Chat(
            [user("Grüße1 🙂 你好"), answer("é1🙂\u200d你 ñ\u0301"), user("ß2"), answer("𝔘2")]
        ),
        "templates": Chat([user("{{ x }} {% ask1"), answer("{{ messages }} {% endif %} {# say1")]),
        "markup": Chat([user("<b>ask1</b> & \"q\""), answer("<i>say1</i> & 'q' \\n \\")]),
        "reasoning": Chat([user("ask1"), answer("say1", reasoning_content="why1\nbecause1")]),
        "reasoning of all turns": Chat(
            [user("ask1"), answer("say1", reasoning_content="why1"),
             user("ask2"), answer("say2", reasoning_content="why2")]
        ),
        "thinking": Chat([user("ask1"), answer("say1", thinking="why1")]),
        "inline reasoning": Chat(
            [user("ask1"), answer(_thought("why1") + "say1"),
             user("ask2"), answer(_thought("why2") + "say2")]
        ),
        "reasoning, then none": Chat(
            [user("ask1"), answer(_thought("why1") + "say1"), user("ask2"), answer("say2")]
        ),
        "empty reasoning": Chat([user("ask1"), answer("<think>\n\n</think>\n\nsay1")]),
        "list of parts": Chat(
            [user([{"type": "text", "text": "ask1"}]), answer([{"type": "text", "text": "say1"}])]
        ),
        "untrained turn": Chat(
            [user("ask1"), answer("say1", weight=0), user("ask2"), answer("say2")]
        ),
        "two answers": Chat([user("ask1"), answer("say1"), answer("say2"), user("ask3"),
                             answer("say3")]),
        "empty answer": Chat([user("ask1"), answer(""), user("ask2"), answer("say2")]),
        "empty question": Chat([user(""), answer("say1"), user(""), answer("say2")]),
        "many turns": Chat(
            [message for n in range(20) for message in (user(f"ask{n}."), answer(f"say{n}."))]
        ),
        "long": Chat(
            [message for n in range(3)
             for message in (user(f"ask{n} " * 900), answer(f"say{n} is long. " * 600))]
        ),
        "one word": Chat([user("A"), answer("A"), user("A"), answer("A"), user("A")], None, False),
        "echo": Chat(
            [user("repeat"), answer("repeat"), user("Say one"), answer("Say one repeat"),
             user("Say one"), answer("Say one")], None, False
        ),
        "special tokens": Chat(
            [user("a <|im_end|> assistant\n</s>[/INST]"), answer(odd), user("more"),
             answer("fine")], None, False
        ),
        "headers": Chat(
            [user(f"{header}<think>\n\n</think>\n\n"), answer("ok"), user(header), answer(header)],
            None, False
        ),
    }  # fmt: skip


def tool_chats() -> dict[str, Chat]:
    """Conversations with tools."""
    return {
        "tools that are not used": Chat(
            [system("sys1"), user("ask1"), answer("say1"), user("ask2"), answer("say2")], TOOLS
        ),
        "call": Chat([user("ask1"), _weather()], TOOLS),
        "call and answer": Chat(
            [user("ask1"), _weather(), result('{"t": 31}'), answer("say1")], TOOLS
        ),
        "arguments as text": Chat(
            [user("ask1"), _weather(arguments=json.dumps(WEATHER)), result("31"), answer("say1")],
            TOOLS,
        ),
        "null content": Chat(
            [system("sys1"), user("ask1"), _weather(content=None), result("31"), answer("say1"),
             user("ask2"), answer("say2")], TOOLS
        ),
        "parallel calls": Chat(
            [user("ask1"),
             answer("", tool_calls=[call("get_weather", WEATHER, 1),
                                    call("get_weather", {"city": "Rome"}, 2)]),
             result("31", 1), result("42", 2), answer("say1")], TOOLS
        ),
        "no arguments": Chat(
            [user("ask1"), answer("", tool_calls=[call("now", {})]), result("noon1", 1, "now"),
             answer("say1"), user("ask2"), _weather(number=2), result("42", 2), answer("say2")],
            TOOLS,
        ),
        "text and call": Chat(
            [user("ask1"), _weather(content="wait1"), result("31"), answer("say1"), user("ask2"),
             answer("say2")], TOOLS
        ),
        "reasoning and call": Chat(
            [user("ask1"), _weather(reasoning_content="why1"), result("31"),
             answer("say1", reasoning_content="why2")], TOOLS
        ),
        "nested arguments": Chat(
            [user("ask1"),
             _weather(arguments={"city": 'a "q" <b> & é\n</s>', "n": [1, None, True, {"k": "v"}]}),
             result("31"), answer("say1")], TOOLS
        ),
        "many calls": Chat(
            [message for n in range(8)
             for message in (user(f"ask{n}."),
                             _weather(number=n, arguments={"city": f"city{n}.", "days": n}),
                             result(f"result{n}.", n), answer(f"say{n}."))], TOOLS
        ),
    }  # fmt: skip


CHATS = {**plain_chats(), **tool_chats()}
