"""From rows to trained tokens: end tokens are, users are not, nothing is lost without a word."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel as ByteLevelWords
from tokenizers.processors import ByteLevel

from engine.data.examples import Example, build_examples, check_ids
from engine.data.loss_masks import span_mask, trained_mask
from engine.data.rows import Row
from engine.errors import DataError
from engine.tokenization.messages import ConversationError
from engine.tokenization.tokenizer import Tokenizer
from tests.engine.tokenization.turns import FAMILIES, say


def row(*contents: str, line: int = 1) -> Row:
    return Row(say(*contents), line, "d.jsonl")


def learnt(example: Example, tokenizer: Tokenizer) -> str:
    ids = [index for index, mark in zip(example.input_ids, example.trained, strict=True) if mark]
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_their_end_tokens_are_trained_and_the_user_is_not(
    family: str, tokenizers_by_family: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers_by_family[family]
    end = tokenizer.eos_token
    (example,), report = build_examples([row("Ask1", "Say 1", "Ask2", "Say 2")], tokenizer, 512)
    thought = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    assert learnt(example, tokenizer).replace(" Say", "Say") == f"Say 1{end}{thought}Say 2{end}"
    assert report.trained_tokens == example.trained_tokens == sum(example.trained)
    last = [index for index, mark in enumerate(example.trained) if mark][-1]
    assert example.input_ids[last] == tokenizer.eos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_whole_text_with_one_bos(
    family: str, tokenizers_by_family: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers_by_family[family]
    rows = [row("Naïve 🙂 question?\n", " Answer "), row("a", "b", line=2)]
    examples, _ = build_examples(rows, tokenizer, 512)
    for example, source in zip(examples, rows, strict=True):
        text = tokenizer.chat_template.render(source.messages)
        assert example.input_ids == tokenizer.encode(text, add_special_tokens=False)
        assert example.source == source.source
        if family in ("llama3", "mistral"):
            assert example.input_ids.count(tokenizer.bos_token_id or 0) == 1
            assert example.input_ids[0] == tokenizer.bos_token_id


def test_a_tokenizer_that_adds_bos_does_not_add_a_second_one(
    make_tokenizer: Callable[..., Tokenizer],
) -> None:
    for family in ("llama3", "mistral"):
        tokenizer = make_tokenizer(family, add_bos=True, add_eos=True)
        assert tokenizer.encode("x")[0] == tokenizer.bos_token_id
        (example,), _ = build_examples([row("Q", "A")], tokenizer, 64)
        assert example.input_ids.count(tokenizer.bos_token_id or 0) == 1
        assert example.input_ids[-2:] != [tokenizer.eos_token_id] * 2


def test_the_end_token_is_trained_although_it_is_also_the_padding_token(
    tokenizers_by_family: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers_by_family["chatml"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (example,), _ = build_examples([row("Q", "A")], tokenizer, 64)
    pairs = zip(example.input_ids, example.trained, strict=True)
    marks = [mark for index, mark in pairs if index == tokenizer.eos_token_id]
    assert marks == [False, False, True]


def test_a_template_that_writes_the_bos_twice_is_refused(
    make_tokenizer: Callable[..., Tokenizer],
) -> None:
    source = (
        "{{ bos_token + bos_token }}{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}"
    )
    tokenizer = make_tokenizer("mistral", template=source)
    with pytest.raises(DataError, match=r"d\.jsonl:1: the text begins with two BOS tokens"):
        build_examples([row("Q", "A")], tokenizer, 64)


def test_truncation_is_counted_and_keeps_the_beginning(
    tokenizers_by_family: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers_by_family["chatml"]
    rows = [row("Q", "A " * 100), row("Q", "A", line=2)]
    (whole, short), full = build_examples(rows, tokenizer, 1000)
    limit = len(whole) - 30
    (cut, _), report = build_examples(rows, tokenizer, limit)
    assert cut.input_ids == whole.input_ids[:limit]
    assert cut.trained == whole.trained[:limit]
    assert (report.truncated, report.truncated_tokens) == (1, 30)
    assert (full.truncated, full.longest) == (0, len(whole))
    assert report.tokens == limit + len(short)
    assert "1 rows truncated by 30 tokens" in report.describe()


def test_rows_without_a_trained_token_are_dropped_by_name(
    tokenizers_by_family: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers_by_family["chatml"]
    rows = [row("Q", "A"), row("Q " * 200, "A", line=2), row("Q", "B", line=3)]
    examples, report = build_examples(rows, tokenizer, 100)
    assert [example.source for example in examples] == ["d.jsonl:1", "d.jsonl:3"]
    assert report.dropped == ["d.jsonl:2: the answer begins beyond the first 100 tokens"]
    assert (report.rows, report.examples) == (3, 2)


def test_a_data_set_that_would_lose_most_of_its_rows_is_refused(
    tokenizers_by_family: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers_by_family["chatml"]
    rows = [row("Q", "A"), row("Q " * 200, "A", line=2), row("Q " * 200, "B", line=3)]
    with pytest.raises(DataError, match=r"2 of 3 rows have no trained token.*d\.jsonl:2"):
        build_examples(rows, tokenizer, 100)
    with pytest.raises(DataError, match="1 of 1 rows"):
        build_examples(rows[1:2], tokenizer, 100)


def test_a_row_that_does_not_fit_the_template_stops_or_is_dropped(
    make_tokenizer: Callable[..., Tokenizer],
) -> None:
    source = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}"
        "{% endif %}{{ m.content + '</s>' }}{% endfor %}"
    )
    tokenizer = make_tokenizer("mistral", template=source)
    rows = [row("Q", "A"), row("no", "A", line=2), row("Q", "B", line=3)]
    with pytest.raises(ConversationError, match=r"^d\.jsonl:2: .*not this"):
        build_examples(rows, tokenizer, 64)
    examples, report = build_examples(rows, tokenizer, 64, bad_rows="skip")
    assert len(examples) == 2
    assert "not this" in report.dropped[0]


def test_template_variables_reach_the_template(
    tokenizers_by_family: dict[str, Tokenizer], make_tokenizer: Callable[..., Tokenizer]
) -> None:
    source = "{{ mood }}{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}"
    tokenizer = make_tokenizer("mistral", template=source)
    (example,), _ = build_examples([row("Q", "A")], tokenizer, 64, template_kwargs={"mood": "glad"})
    assert tokenizer.decode(example.input_ids).startswith("glad")


def test_many_rows_come_back_in_order(tokenizers_by_family: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_family["chatml"]
    rows = [row(f"Q{number}", f"A{number}", line=number) for number in range(1, 601)]
    examples, report = build_examples(rows, tokenizer, 128)
    assert [example.source for example in examples] == [item.source for item in rows]
    assert all(f"A{n}<|im_end|>" in learnt(examples[n - 1], tokenizer) for n in (1, 256, 257, 600))
    assert report.tokens == sum(len(example) for example in examples)


def test_ids_beyond_the_vocabulary_are_refused_with_the_row(
    tokenizers_by_family: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers_by_family["chatml"]
    examples, _ = build_examples([row("Q", "A"), row("Q", "ABC", line=2)], tokenizer, 64)
    check_ids(examples, tokenizer.vocab_size)
    largest = max(examples[0].input_ids)
    examples[1].ids[3] = largest + 1
    check_ids(examples, largest + 2)
    with pytest.raises(DataError, match=rf"d\.jsonl:2: the token id {largest + 1} is beyond"):
        check_ids(examples, largest + 1)
    with pytest.raises(DataError, match="token id -1 "):
        check_ids([Example([1, -1], [False, True], "x")], 10)


def test_trimmed_offsets_do_not_lose_white_space_inside_an_answer(backend_json: str) -> None:
    """GPT-2's post-processor gives a token of spaces no characters, only a place."""
    backend = Backend.from_str(backend_json)
    text = "user:\n  yes  \n\n  no<|im_end|>\n  "
    plain = backend.encode(text)
    backend.post_processor = ByteLevel(trim_offsets=True)
    trimmed = backend.encode(text)
    assert plain.ids == trimmed.ids
    assert any(start == end for start, end in trimmed.offsets)
    span = (text.index("yes"), text.index("<|im_end|>") + 10)
    expected = trained_mask(plain.offsets, [span])
    assert trained_mask(trimmed.offsets, [span]).tolist() == expected.tolist()
    assert expected.any()
    assert not expected.all()


def test_spans_mark_every_token_they_touch() -> None:
    offsets = [(0, 2), (2, 5), (5, 5), (5, 6), (6, 6), (6, 9), (6, 9)]
    assert trained_mask(offsets, [(3, 6)]).tolist() == [False, True, True, True, True, False, False]
    assert trained_mask(offsets, [(0, 1), (8, 9)]).tolist() == [True] + [False] * 4 + [True] * 2
    assert trained_mask([], [(0, 1)]).shape == (0,)


def test_the_first_token_of_an_example_is_never_trained() -> None:
    example = Example([5, 6], [True, True], "x")
    assert example.trained == [False, True]
    assert example == Example(np.array([5, 6]), [False, True], "x")
    assert example != Example([5, 6], [False, True], "y")
    with pytest.raises(ValueError):
        Example([1, 2], [True], "x")


@settings(max_examples=150, deadline=None)
@given(
    st.text(st.sampled_from("ab \n\té日🚀e\u0301x"), min_size=1, max_size=30),
    st.lists(st.integers(0, 30), min_size=2, max_size=6, unique=True),
    st.booleans(),
)
def test_the_edges_of_spans_tell_the_whole_mask(text: str, bounds: list[int], trims: bool) -> None:
    ends = sorted({min(bound, len(text)) for bound in bounds})
    spans = list(zip(ends[::2], ends[1::2], strict=False))
    letters = {letter: index for index, letter in enumerate(ByteLevelWords.alphabet())}
    backend = Backend(BPE(letters | {"Ġa": 256, "Ġb": 257}, [("Ġ", "a"), ("Ġ", "b")]))
    backend.pre_tokenizer = ByteLevelWords(add_prefix_space=False)
    if trims:
        backend.post_processor = ByteLevel(trim_offsets=True)
    encoding = backend.encode(text)
    expected = trained_mask(encoding.offsets, spans)
    assert span_mask(encoding, spans).tolist() == expected.tolist()
