"""Rows as other programs write them: what is used, what is refused, what is reported."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.data.dataset import load_rows, read_rows
from engine.data.rows import Row, parse_row
from engine.data.rows.fields import RowFault
from engine.errors import DataError

USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}
TURNS = [USER, ANSWER]
ARGUMENTS = {"city": "Paris", "days": [1, {"a": None}]}


def parse(row: Any) -> Row:
    return parse_row(row, "d.jsonl", 1)


def arguments_of(row: Row) -> list[Any]:
    return [
        call["function"]["arguments"]
        for message in row.messages
        for call in message.get("tool_calls", [])
    ]


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": "", "tool_calls": [call(ARGUMENTS)]},
        {"role": "assistant", "content": None, "tool_calls": [call(json.dumps(ARGUMENTS))]},
        {"role": "assistant", "tool_calls": json.dumps([call(json.dumps(ARGUMENTS))])},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": json.dumps(ARGUMENTS)}]},
        {"role": "assistant", "function_call": {"name": "f", "arguments": json.dumps(ARGUMENTS)}},
        {"from": "function_call", "value": json.dumps({"name": "f", "arguments": ARGUMENTS})},
        {
            "from": "function_call",
            "value": json.dumps([{"name": "f", "arguments": json.dumps(ARGUMENTS)}]),
        },
        {"from": "function_call", "value": {"name": "f", "parameters": ARGUMENTS}},
    ],
    ids=range(8),
)
def test_a_tool_call_is_the_same_in_every_spelling(turn: dict[str, Any]) -> None:
    opening = USER if "role" in turn else {"from": "human", "value": "Q"}
    row = parse({"messages": [opening, turn]})
    assert arguments_of(row) == [ARGUMENTS]
    (made,) = row.messages[1]["tool_calls"]
    assert made["function"]["name"] == "f"
    assert made["type"] == "function"
    assert not row.messages[1].get("content")
    assert row.unused == ()


@pytest.mark.parametrize("arguments", ["", "{}", None, {}])
def test_a_call_without_arguments_has_none(arguments: Any) -> None:
    assert arguments_of(
        parse({"messages": [USER, {"role": "assistant", "tool_calls": [call(arguments)]}]})
    ) == [{}]


def test_a_list_of_calls_in_sharegpt_is_parallel_calls() -> None:
    calls = [{"name": name, "arguments": {"n": number}} for number, name in enumerate("fgh")]
    row = parse({"conversations": [
        {"from": "human", "value": "Q"}, {"from": "function_call", "value": json.dumps(calls)},
    ]})  # fmt: skip
    names = [made["function"]["name"] for made in row.messages[1]["tool_calls"]]
    assert (names, arguments_of(row)) == (["f", "g", "h"], [{"n": 0}, {"n": 1}, {"n": 2}])


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"prompt": "Q", "response": "A"},
        {"prompt": [USER], "completion": [ANSWER]},
    ],
    ids=range(4),
)
def test_a_system_prompt_beside_any_form_is_the_first_message(
    row: dict[str, Any], key: str
) -> None:
    system = {"role": "system", "content": "Be kind."}
    assert parse({**row, key: "Be kind."}).messages == [system, *TURNS]
    for nothing in ("", None):
        assert parse({**row, key: nothing}).messages == TURNS
    if "messages" in row:
        row = {"messages": [system, *TURNS]}
        assert parse({**row, key: "Be kind."}).messages == [system, *TURNS]
        with pytest.raises(RowFault, match=f"both '{key}' and a system message"):
            parse({**row, key: "Be rude."})


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction": "Q", "context": "C", "response": "A"}, "Q\nC"),
        ({"instruction": "Q", "input": "I", "context": "C", "response": "A"}, "Q\nI\nC"),
        ({"question": "Q", "context": "C", "answer": "A"}, "Q\nC"),
        ({"question": "Q", "context": "", "answer": "A"}, "Q"),
        ({"input": "Q", "output": "A"}, "Q"),
        ({"query": "Q", "response": "A"}, "Q"),
        ({"problem": "Q", "solution": "A"}, "Q"),
        ({"INSTRUCTION": "Q", "RESPONSE": "A"}, "Q"),
        ({"Prompt": "Q", "Completion": "A"}, "Q"),
    ],
    ids=range(9),
)
def test_context_and_the_rarer_names_are_used(row: dict[str, Any], text: str) -> None:
    made = parse(row)
    assert made.messages == [{"role": "user", "content": text}, ANSWER]
    assert made.unused == ()


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"question": "Q", "choices": ["a"], "answer": "A"}, ["choices"]),
        ({"messages": TURNS, "prompt": "P", "id": 3, "none": None}, ["id", "prompt"]),
        ({"prompt": "Q", "response": "A", "weight": 2, "rating": 3}, []),
        ({"messages": [{**USER, "lang": "en"}, {**ANSWER, "id": 1}]},
         ["messages[].id", "messages[].lang"]),
        ({"conversations": [{"from": "human", "value": "Q", "x": 1},
                            {"from": "gpt", "value": "A"}]}, ["conversations[].x"]),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, ["messages[].weight of role user"]),
        ({"messages": [{**USER, "train": False}, {**ANSWER, "train": True}]}, []),
        ({"prompt": [USER], "context": "C", "response": "A"}, ["context"]),
    ],
    ids=range(8),
)  # fmt: skip
def test_what_nothing_reads_is_named(row: dict[str, Any], unused: list[str]) -> None:
    assert list(parse(row).unused) == unused


def test_unused_keys_are_counted_and_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "Q", "response": "A", "id": n, **({"x": 1} if n else {})} for n in range(3)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, report = read_rows(path)
    assert report.unused == {"id": 3, "x": 2}
    (note,) = report.notes()
    assert "'id' (3 rows), 'x' (2 rows)" in note
    assert [record.message for record in caplog.records] == [note]


FLAGS = pytest.mark.parametrize("flag", ["weight", "train", "loss"])


@FLAGS
@pytest.mark.parametrize("value", [False, 0, 0.0])
def test_a_message_may_say_no_to_the_loss(flag: str, value: Any) -> None:
    row = parse({"messages": [USER, {**ANSWER, flag: value}, USER, ANSWER]})
    assert row.messages[1][flag] == 0
    with pytest.raises(RowFault, match="nothing to learn"):
        parse({"messages": [USER, {**ANSWER, flag: value}]})


@FLAGS
@pytest.mark.parametrize("value", [True, 1, 1.0, None])
def test_a_message_may_say_yes_to_the_loss(flag: str, value: Any) -> None:
    assert len(parse({"messages": [USER, {**ANSWER, flag: value}]}).messages) == 2


NO_FLAGS: list[Any] = ["false", 0.5, 2, -1, [], "1"]
NO_WEIGHTS: list[Any] = ["false", -1, [], "1", float("nan"), 1e300]


@pytest.mark.parametrize(
    ("flag", "value"),
    [(flag, value) for flag in ("train", "loss") for value in NO_FLAGS]
    + [("weight", value) for value in NO_WEIGHTS],
)
def test_a_message_may_say_nothing_else(flag: str, value: Any) -> None:
    with pytest.raises(RowFault, match=rf"messages\[1\]: '{flag}' is .* expected"):
        parse({"messages": [USER, {**ANSWER, flag: value}]})


@pytest.mark.parametrize("value", [0.5, 2])
def test_a_message_may_weigh_more_or_less_than_others(value: float) -> None:
    row = parse({"messages": [USER, {**ANSWER, "weight": value}]})
    assert row.messages[1]["weight"] == value


def test_flags_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(RowFault, match="contradict"):
        parse({"messages": [USER, {**ANSWER, "weight": 1, "train": False}]})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "A"}], "A"),
        ([{"type": "text", "text": "A"}, {"type": "output_text", "text": " b"}], "A b"),
        ([{"text": "A"}, "B"], "AB"),
        ([], ""),
    ],
)
def test_a_list_of_text_parts_is_a_text(content: list[Any], text: str) -> None:
    row = parse({"messages": [{**USER, "content": content}, ANSWER]})
    assert row.messages[0]["content"] == text


@pytest.mark.parametrize("content", [{"a": 1}, [{"a": 1}], [1, 2]])
def test_a_tool_result_that_is_json_is_written_as_json(content: Any) -> None:
    turn = {"role": "assistant", "content": "", "tool_calls": [call({})]}
    row = parse({"messages": [USER, turn, {"role": "tool", "content": content}, ANSWER]})
    assert json.loads(row.messages[2]["content"]) == content


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ("", None), (" ", None), ("[]", None), ([], None), (None, None),
        ('[{"name": "f"}]', [{"name": "f"}]),
        (['{"name": "f"}'], [{"name": "f"}]),
        ([{"type": "function", "function": {"name": "f"}}],
         [{"type": "function", "function": {"name": "f"}}]),
    ],
)  # fmt: skip
def test_tools_in_every_spelling(tools: Any, expected: Any) -> None:
    assert parse({"messages": TURNS, "tools": tools}).tools == expected


def test_old_style_functions_are_tools() -> None:
    row = parse({"messages": TURNS, "functions": [{"name": "f"}]})
    assert row.tools == [{"type": "function", "function": {"name": "f"}}]


REFUSED = [
    ({"messages": [USER, {**ANSWER, "content": [{"type": "image_url"}]}]}, "type 'image_url'"),
    ({"messages": [USER, {**ANSWER, "content": [{"type": "text", "text": 1}]}]}, "text is a num"),
    ({"messages": [USER, {**ANSWER, "content": {"a": 1}}]}, "content is an object"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [call("{no}")]}]}, "not JSON"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [call("[1]")]}]}, "are a list"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "no name"),
    ({"messages": [USER, {"role": "assistant", "tool_calls": 3}]}, "is a number"),
    ({"messages": [{**USER, "tool_calls": [call({})]}, ANSWER]}, "its role is 'user'"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [call({})], "function_call": {}}]}, "both tool"),
    ({"messages": [USER, {**ANSWER, "reasoning_content": 3}]}, "reasoning_content is a number"),
    ({"conversations": [{"from": "function_call", "value": "add 1 and 2"}]}, "not JSON"),
    ({"conversations": [{"from": "function_call", "value": "[]"}]}, "where a tool call was"),
    ({"messages": TURNS, "tools": "no"}, "'tools' is text that is not JSON"),
    ({"messages": TURNS, "tools": [1]}, r"tools\[0\] is a number"),
    ({"prompt": "Q", "chosen": "A"}, "--map response=chosen"),
    ({"text": " "}, "'text' is empty"),
    ({"input_ids": [1]}, "no token of 'input_ids' is trained"),
    ({"dialog": []}, "rename 'dialog' to 'messages'"),
]


@pytest.mark.parametrize(("row", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_trained_is_refused_by_name(row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowFault, match=words):
        parse(row)


MIXED = [
    [{"role": "user", "value": "Q"}, {"role": "assistant", "value": "A"}],
    [{"from": "human", "content": "Q"}, {"from": "gpt", "content": "A"}],
    [{"role": "human", "content": "Q"}, {"role": "gpt", "content": "A"}],
]


@pytest.mark.parametrize("turns", MIXED, ids=range(3))
def test_messages_that_mix_the_two_forms_are_read(turns: list[Any]) -> None:
    row = parse({"conversations": turns})
    assert (row.messages, row.unused) == (TURNS, ())


HINTS = [
    ({"pprompt": "Q", "response": "A"}, "did you mean 'prompt' by 'pprompt'"),
    ({"prompt": "Q", "response": None}, "'response' is null"),
    ({"body": {"messages": TURNS}, "id": 1}, "inside 'body'"),
    ({"user": "Q", "assistant": "A"}, "rename 'user' to 'prompt'"),
    ({"question": "Q", "answers": {"text": ["A"]}}, "one text as 'answer'"),
    ({"role": "user", "content": "Q"}, "under 'messages'"),
    ({"messages": [{"role": "user", "text": "Q"}, ANSWER]}, "no 'content', only the keys"),
]


@pytest.mark.parametrize(("row", "words"), HINTS, ids=range(len(HINTS)))
def test_a_likely_mistake_is_named(row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowFault, match=words):
        parse(row)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{'prompt': 'Q', 'response': 'A'}", "json.dumps"),
        ('{"prompt": "Q", "x": None}', "json.dumps"),
        ('{"prompt": "Q", "response": "A"},', "no comma"),
        ("prompt,response", "call it .csv"),
        ('{"prompt": "Q"', "one complete JSON object"),
    ],
)
def test_a_broken_line_says_what_it_looks_like(line: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=words):
        load_rows(path)


PAIRS = [{"prompt": f"Q{n}", "response": "A"} for n in range(3)]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (json.dumps({"data": PAIRS}), [1, 1, 1]),
        (json.dumps({"version": "1", "data": PAIRS}, indent=1), [4, 8, 12]),
        (json.dumps({"rows": PAIRS, "meta": {"data": [1]}}, indent=1), [3, 7, 11]),
        (json.dumps({"meta": {"rows": [1]}, "rows": PAIRS}, indent=1), [8, 12, 16]),
        (json.dumps({"n": 1, "rows": PAIRS}, indent=1).replace("rows", "r\\u006fws"), [4, 8, 12]),
        ("\n".join(json.dumps(row, indent=1) for row in PAIRS), [1, 5, 9]),
        (json.dumps(PAIRS[0], indent=1) + json.dumps(PAIRS[1]) + "\n" + json.dumps(PAIRS[2]),
         [1, 4, 5]),
        ("\n\n" + "\n".join(json.dumps(row) for row in PAIRS), [3, 4, 5]),
    ],
    ids=range(8),
)  # fmt: skip
def test_json_printed_over_several_lines_is_read(
    text: str, lines: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    rows = load_rows(path)
    assert [row.messages[0]["content"] for row in rows] == ["Q0", "Q1", "Q2"]
    assert [row.line for row in rows] == lines


@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args", "kwargs"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_arguments_are_read_under_every_usual_name(key: str, nested: bool, text: bool) -> None:
    function = {"name": "f", key: json.dumps(ARGUMENTS) if text else ARGUMENTS}
    made = {"function": function, "type": "function"} if nested else function
    row = parse({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [made]}]})
    assert arguments_of(row) == [ARGUMENTS] and row.unused == ()
    assert key == "arguments" or key not in row.messages[1]["tool_calls"][0]["function"]


def test_what_a_call_says_besides_is_reported_and_two_arguments_are_refused() -> None:
    def turn(**function: Any) -> list[Any]:
        calls = [{"name": "f", **function}]
        return [USER, {"role": "assistant", "content": "", "tool_calls": calls}]

    assert parse({"messages": turn(values={"a": 1})}).unused == ("messages[].tool_calls[].values",)
    with pytest.raises(RowFault, match="both 'arguments' and 'input'"):
        parse({"messages": turn(arguments={}, input={"a": 1})})


@pytest.mark.parametrize("form", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize(
    ("key", "value"),
    [("mask", True), ("masked", 0), ("trainable", False), ("train_detail", [{"begin_offset": 0}])],
)
def test_other_names_for_what_is_trained_are_refused(
    form: tuple[str, str], key: str, value: Any
) -> None:
    role, content = form
    turns = [{role: "user", content: "Q"}, {role: "assistant", content: "A", key: value}]
    with pytest.raises(RowFault, match=f'{key}.* with "loss": false'):
        parse({"messages": turns})


@pytest.mark.parametrize("form", [("role", "content"), ("from", "value")])
@pytest.mark.parametrize("names", [("User", "Assistant"), ("Human", "GPT"), ("USER", "Bot")])
def test_speakers_are_known_in_any_case(form: tuple[str, str], names: tuple[str, str]) -> None:
    turns = [{form[0]: names[0], form[1]: "Q"}, {form[0]: names[1], form[1]: "A"}]
    assert parse({"messages": turns}).messages == TURNS


def test_calls_and_their_results_under_names_of_other_trainers() -> None:
    row = parse(
        {
            "conversations": [
                {"from": "user", "value": "Q"},
                {"from": "tool_call", "value": json.dumps({"name": "f", "arguments": ARGUMENTS})},
                {"from": "tool_response", "value": "1"},
                {"from": "assistant", "value": "A"},
            ]
        }
    )
    assert arguments_of(row) == [ARGUMENTS]
    assert [turn["role"] for turn in row.messages] == ["user", "assistant", "tool", "assistant"]
