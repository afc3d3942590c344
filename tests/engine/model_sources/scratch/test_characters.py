"""The character tokenizer reads the longest token first, and gives every text back."""

from __future__ import annotations

import json
import string

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.model_sources.gguf.longest_match import (
    escaped,
    is_longest_match,
    longest_match,
    unescaped,
)
from engine.model_sources.scratch.characters import (
    COMPOUNDS,
    SPECIAL,
    TOKENS,
    UNKNOWN,
    CharacterTokenizer,
)
from engine.tokenization.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(CharacterTokenizer())
KNOWN = "".join(map(chr, range(32, 127))) + "\n\t"
WORDS = st.lists(
    st.one_of(st.sampled_from(TOKENS), st.text(KNOWN, max_size=4), st.sampled_from("éß日\r\0😀"))
).map("".join)


def greedy(text: str) -> list[int]:
    """The longest token at every position, written down without a library."""
    ids, start = [], 0
    while start < len(text):
        fitting = [t for t in TOKENS if text.startswith(t, start)]
        longest = max(fitting, key=len, default=None)
        ids.append(TOKENS.index(UNKNOWN if longest is None else longest))
        start += 1 if longest is None else len(longest)
    return ids


def test_the_ids_are_those_of_the_sources() -> None:
    assert len(TOKENS) == len(set(TOKENS)) == TOKENIZER.vocab_size == 133
    assert TOKENS[:3] == ("[PAD]", "[UNK]", "[EOS]")
    assert "".join(TOKENS[3:98]) == string.printable[:0] + "".join(map(chr, range(32, 127)))
    assert len(COMPOUNDS) == 35
    assert TOKENIZER.token_to_id("<|im_end|>") == 99
    assert TOKENIZER.encode("<|im_end|>") == [99]
    assert (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (2, 0)
    assert TOKENIZER.special_ids == {TOKENS.index(token) for token in SPECIAL}
    assert TOKENIZER.prefix_ids == TOKENIZER.suffix_ids == []


@settings(max_examples=300, deadline=None)
@given(WORDS)
def test_the_longest_token_comes_first(text: str) -> None:
    assert TOKENIZER.encode(text) == greedy(text)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(KNOWN), st.lists(st.sampled_from(TOKENS[3:])).map("".join)))
def test_a_text_comes_back_to_the_character(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=False) == text


def test_other_characters_are_unknown_one_by_one() -> None:
    assert TOKENIZER.encode("aé日b") == [TOKENS.index(t) for t in ("a", UNKNOWN, UNKNOWN, "b")]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab\\\n\t\rxé"), min_size=1, max_size=5), unique=True))
def test_spellings_of_gguf_files_are_read_back(tokens: list[str]) -> None:
    assert unescaped(map(escaped, tokens)) == tokens
    assert unescaped([r"\xe6\x97\xa5"]) == ["日"]
    assert unescaped([r"\xe6"]) is None


def test_only_the_longest_match_is_taken_for_one() -> None:
    state = json.loads(longest_match(["?", "a", "ab"], "?").to_str())
    assert is_longest_match(state)
    assert not is_longest_match(state | {"pre_tokenizer": {"type": "Whitespace"}})
    assert not is_longest_match(state | {"model": state["model"] | {"type": "WordPiece"}})
