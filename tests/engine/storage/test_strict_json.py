"""Strict JSON: what is refused, and where the finger points."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.storage import strict_json
from engine.storage.strict_json import JSONFault

REFUSED = [
    ('{"a": NaN}', 6, "NaN"),
    ('{"a": [1, -Infinity]}', 10, "-Infinity"),
    ('{"a": 1e999}', 6, "too large"),
    ('{"a": 1, "b": {"k": 1, "k": 2}}', 23, "second time"),
    ('{"a": 1, "\\u0061": 2}', 9, "second time"),
    ('["\\ud800"]', 1, "surrogate"),
    ('["ok", "\\udc00\\ud800"]', 7, "surrogate"),
    ("[" * 65 + "]" * 65, 64, "nested"),
    ('{"a":' * 2000 + "1" + "}" * 2000, None, "nested"),
    ("[" * 100_000, None, "nested"),
    ("7" * 5000, 0, "digits"),
    ('{"a": 1} {"b": 2}', 9, "follows"),
    ('{"a": }', 6, "expecting value"),
    ('{"a" 1}', 5, "delimiter"),
    ('{"a": "x', 6, "unterminated"),
    ('{"a": "\x01"}', 7, "control character"),
    ("", 0, "expecting value"),
    ("nul", 0, "expecting value"),
]


@pytest.mark.parametrize(("text", "position", "words"), REFUSED, ids=range(len(REFUSED)))
def test_faults_are_named_with_their_position(text: str, position: int | None, words: str) -> None:
    with pytest.raises(JSONFault) as caught:
        strict_json.loads(text)
    assert words in caught.value.message
    if position is not None:
        assert caught.value.position == position


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "NaN, Infinity and \\"k\\": 1e999"}',
        '["\\ud83d\\ude00", "\\u0000"]',
        '{"a": {"k": 1}, "b": {"k": 1}}',
        '["same", "same"]',
        "[" * 64 + "]" * 64,
        '{"code": "' + "{[" * 100 + '"}',
        " \t\r\n[1]\n ",
    ],
)
def test_strict_json_is_read_as_json_reads_it(text: str) -> None:
    assert strict_json.loads(text) == json.loads(text)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(VALUES, st.booleans())
def test_whatever_json_writes_comes_back_the_same(value: object, ascii_only: bool) -> None:
    assert strict_json.loads(json.dumps(value, ensure_ascii=ascii_only)) == value


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_text_is_read_or_refused_but_never_crashes(data: st.DataObject) -> None:
    text = list(
        '{"messages": [{"role": "user", "content": "h\\u00e9 \\ud83d\\ude00"}], "n": -1.5e3}'
    )
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(text) - 1))
        text[index] = data.draw(st.sampled_from(list('{}[]",:\\udNI0-e ')))
    damaged = "".join(text)
    fault: JSONFault | None = None
    try:
        strict_json.loads(damaged)
    except JSONFault as error:
        fault = error
    assert fault is None or (fault.message and 0 <= fault.position <= len(damaged))
