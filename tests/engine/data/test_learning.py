"""What of a row is trained: --train-on, --thinking, documents, token ids, preference pairs."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from engine.data.batches.weights import weighted_rows
from engine.data.examples import Example, build_examples
from engine.data.rendering import Learning
from engine.data.rows import Row, parse_row
from engine.data.rows.fields import RowFault
from engine.errors import DataError
from engine.tokenization.messages import ConversationError
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from tests.support.tiny_model import write_tokenizer
from tests.support.tokenizer_folder import TokenizerFolder

QWEN3 = """\
{%- set last = namespace(user=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- set thought = m.reasoning_content or '' %}{% set text = m.content %}
{%- if '</think>' in text %}
{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > last.user %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- text }}
{%- else %}{{- m.content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
"""Reasoning as Qwen3's template has it: shown after the last question only."""

TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "first", "reasoning_content": "why one"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "<think>\nwhy two\n</think>\n\nsecond"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    plain = load_tokenizer(TokenizerFolder(folder))
    backend = Backend.from_str(plain.serialised())
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(backend, {"eos_token": "<|im_end|>"}, QWEN3)


def learnt(tokenizer: Tokenizer, row: Row, limit: int = 4096, **learning: str) -> tuple[str, str]:
    """The text of a row, and what of it is trained with '|' between the stretches."""
    (example,), _ = build_examples([row], tokenizer, limit, learning=Learning(**learning))
    parts = example.stretches()
    text = tokenizer.decode(example.input_ids, skip_special_tokens=False)
    trained = [tokenizer.decode(ids, skip_special_tokens=False) for on, ids in parts if on]
    return text, "|".join(trained)


def talk() -> Row:
    return parse_row({"messages": TALK}, "d.jsonl", 1)


def test_all_answers_are_trained_or_the_last(tokenizer: Tokenizer) -> None:
    answer = "<think>\nwhy two\n</think>\n\nsecond<|im_end|>"
    text, trained = learnt(tokenizer, talk())
    assert trained == f"first<|im_end|>|{answer}"
    assert learnt(tokenizer, talk(), train_on="last") == (text, answer)
    marked = [*TALK[:3], {**TALK[3], "train": False}]
    row = parse_row({"messages": marked}, "d", 1)
    assert learnt(tokenizer, row, train_on="last")[1] == "first<|im_end|>"


def test_what_follows_a_text_is_trained_to_the_end_of_its_turn(tokenizer: Tokenizer) -> None:
    trained = learnt(tokenizer, talk(), train_on="</think>\n\n")[1]
    assert trained == "second<|im_end|>"
    trained = learnt(tokenizer, talk(), train_on="assistant\n")[1]
    assert trained.startswith("first<|im_end|>|<think>")
    with pytest.raises(ConversationError, match="does not hold '###'"):
        learnt(tokenizer, talk(), train_on="###")
    row = parse_row({"text": "ask this so say that"}, "d", 1)
    assert learnt(tokenizer, row, train_on=" so")[1] == " say that<|im_end|>"


@pytest.mark.parametrize(
    ("thinking", "expected"),
    [
        ("auto", "first<|im_end|>|<think>\nwhy two\n</think>\n\nsecond<|im_end|>"),
        (
            "keep",
            "<think>\nwhy one\n</think>\n\nfirst<|im_end|>"
            "|<think>\nwhy two\n</think>\n\nsecond<|im_end|>",
        ),
        ("strip", "first<|im_end|>|<think>\n\n</think>\n\nsecond<|im_end|>"),
        ("empty", "first<|im_end|>|<think>\n\n</think>\n\nsecond<|im_end|>"),
    ],
)
def test_reasoning_is_kept_stripped_or_emptied(
    thinking: str, expected: str, tokenizer: Tokenizer
) -> None:
    text, trained = learnt(tokenizer, talk(), thinking=thinking)
    assert trained == expected
    assert ("why one" in text) == (thinking == "keep")


def test_an_empty_block_is_written_where_the_template_knows_none(tokenizer: Tokenizer) -> None:
    chatml = Tokenizer(Backend.from_str(tokenizer.serialised()), {"eos_token": "<|im_end|>"})
    assert learnt(chatml, talk(), thinking="empty")[1] == (
        "<think>\n\n</think>\n\nfirst<|im_end|>|<think>\n\n</think>\n\nsecond<|im_end|>"
    )
    assert learnt(chatml, talk(), thinking="strip")[1] == "first<|im_end|>|second<|im_end|>"
    assert "why one" in learnt(chatml, talk(), thinking="keep")[1]


@pytest.mark.parametrize("limit", [2, 3, 7, 64])
@pytest.mark.parametrize("bos", [False, True])
def test_documents_are_divided_with_every_token_trained_once(
    limit: int, bos: bool, tokenizer: Tokenizer
) -> None:
    names = {"eos_token": "<|im_end|>"} | ({"bos_token": "<|im_start|>"} if bos else {})
    own = Tokenizer(Backend.from_str(tokenizer.serialised()), names, QWEN3, add_bos=bos)
    text = "some words of a document " * 5
    row = parse_row({"text": text}, "d", 1)
    pieces, report = build_examples([row], own, limit)
    expected = [*own.prefix_ids, *own.encode(text, add_special_tokens=False)]
    expected.append(own.eos_token_id or 0)
    joined = [*pieces[0].input_ids]
    for before, piece in pairwise(pieces):
        assert piece.input_ids[0] == before.input_ids[-1]
        joined += piece.input_ids[1:]
    assert joined == expected
    assert joined.count(own.token_to_id("<|im_start|>") or -1) == bos
    assert sum(piece.trained_tokens for piece in pieces) == len(expected) - 1
    assert (report.truncated, report.documents) == (0, 1)
    assert max(map(len, pieces)) <= limit


def test_token_ids_are_taken_as_they_are(tokenizer: Tokenizer) -> None:
    raw = {"input_ids": [5, 6, 7, 8, 0], "labels": [-100, -100, 7, 8, -100],
           "attention_mask": [1, 1, 1, 1, 0]}  # fmt: skip
    (example,), _ = build_examples([parse_row(raw, "d", 1)], tokenizer, 64)
    assert example == Example([5, 6, 7, 8], [False, False, True, True], "d:1")
    (example,), _ = build_examples([parse_row({"input_ids": [5, 6]}, "d", 1)], tokenizer, 64)
    assert example.trained == [False, True]
    (example,), report = build_examples([parse_row(raw, "d", 1)], tokenizer, 3)
    assert (example.input_ids, report.truncated) == ([5, 6, 7], 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": [-100, 7, 8]}, "'labels' has 3 numbers"),
        ({"labels": [6, 7, 8, 9]}, "a label is the id at its own position"),
        ({"labels": [5, -100, -100, -100]}, "no token of 'input_ids' is trained"),
        ({"input_ids": [5, 6.0, 7, 8]}, r"input_ids\[1\] is 6.0"),
        ({"input_ids": [5, -1, 7, 8]}, r"input_ids\[1\] is -1"),
        ({"input_ids": "5 6"}, "not JSON"),
    ],
    ids=range(6),
)
def test_token_ids_that_are_none_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RowFault, match=words):
        parse_row({"input_ids": [5, 6, 7, 8]} | change, "d", 1)


def test_preference_pairs_are_recognised_and_refused_by_training(tokenizer: Tokenizer) -> None:
    ask = {"role": "user", "content": "Q"}
    good, bad = ({"role": "assistant", "content": word} for word in ("yes", "no"))
    rows = [
        {"prompt": "Q", "chosen": "yes", "rejected": "no"},
        {"prompt": [ask], "chosen": [good], "rejected": [bad]},
        {"chosen": [ask, good], "rejected": [ask, bad]},
        {"prompt": "Q", "chosen": [ask, good], "rejected": [ask, bad]},
    ]
    for raw in rows:
        row = parse_row(raw, "d", 1)
        assert (row.messages, row.rejected, row.unused) == ([ask, good], [ask, bad], ())
        with pytest.raises(DataError, match="--map"):
            build_examples([row], tokenizer, 64)
    taken = parse_row(rows[0], "d", 1, {"prompt": "prompt", "response": "chosen"})
    assert (taken.messages, taken.rejected) == ([ask, good], None)
    for wrong, words in (
        ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "are equal"),
        ({"chosen": [ask, good], "rejected": [{**ask, "content": "R"}, bad]}, "different prompts"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"chosen": [ask, good], "rejected": [ask]}, "ends with a message of role 'user'"),
    ):
        with pytest.raises(RowFault, match=words):
            parse_row(wrong, "d", 1)


def test_weights_repeat_whole_rows_and_choose_the_rest(tmp_path: Path) -> None:
    def row(line: int, origin: int, weight: float) -> Row:
        return Row([], line, f"{origin}", origin=(origin, weight))

    rows = [row(n, 0, 0.3) for n in range(10)] + [row(n, 1, 2.5) for n in range(4)]
    made = weighted_rows(rows, seed=3)
    first = [r.line for r in made if r.origin[0] == 0]
    second = [r.line for r in made if r.origin[0] == 1]
    assert (len(first), len(set(first)), len(second)) == (3, 3, 10)
    assert sorted(second.count(n) for n in range(4)) == [2, 2, 3, 3]
    assert made == weighted_rows(rows, seed=3) != weighted_rows(rows, seed=4)


TURNS = st.lists(
    st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=3
).map(lambda pairs: [m for q, a in pairs for m in (
    {"role": "user", "content": q}, {"role": "assistant", "content": a})])  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(TURNS, st.sampled_from(["all", "last"]), st.sampled_from(["auto", "keep", "strip", "empty"]))
def test_no_row_is_without_labels_and_every_stretch_ends_its_turn(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], train_on: str, thinking: str
) -> None:
    try:
        row = parse_row({"messages": messages}, "d", 1)
        examples, report = build_examples(
            [row], tokenizer, 4096, learning=Learning(train_on, thinking)
        )
    except (DataError, RowFault):
        return
    for example in examples:
        assert example.trained_tokens
        for index, (on, ids) in enumerate(example.stretches()):
            if on and index:
                assert ids[-1] == tokenizer.eos_token_id
    assert report.examples + len(report.dropped) == 1
