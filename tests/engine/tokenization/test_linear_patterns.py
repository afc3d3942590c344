"""Expressions that cut a text in a time in proportion to its length are told from the others."""

import time

import pytest
from tokenizers import Regex
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, WordPiece
from tokenizers.pre_tokenizers import PreTokenizer, Split, Whitespace

from engine.errors import CheckpointError
from engine.model_sources.gguf.pre_tokenizers import RULES
from engine.tokenization.tokenizer import Tokenizer
from engine.tokenization.vocabularies import tokenizer_process
from engine.tokenization.vocabularies.linear_patterns import takes_linear_time

LINEAR = [
    r"\p{L}+", " {2,}", "[^\\n]+|[\\n]+", r"a+|b*c?", r"\s+(?!\S)|\s+", r"a+(?=b)|a+",
    r"\s*[\r\n]|\s+(?!\S)|\s+", "x[a-z]*y|[a-z]+", r"[A-Z]*[a-z]+|[A-Z]+[a-z]*", "(?:a|b)+", "",
    r"[[:alpha:]]+",
]  # fmt: skip
SQUARE = [
    r"[a-z]+\d", r"\s+$", "(?:ab)+c", "a*a*b|a+", "a+y|a+?", "a+y|a|a+", "a+y|b+", "a+y|ba+",
    r"(?:a+)", "a(?i)+b", r"[a&&[^b]]+c|.+", r"(?~a)", r"(a)\1", "a{900}b|" * 30 + "c",
    "a++y", "a{3,}b|a{3,}", "[ab]+c|[ba]+", "(a{1,900}){1,900}", r"\X+", "a+y|(?=b)a+", "a+b|a+c",
]  # fmt: skip
SLOW_MODELS = {"jais-2", "exaone-moe"}


@pytest.mark.parametrize("pattern", LINEAR)
def test_expressions_that_take_a_time_in_proportion(pattern: str) -> None:
    assert takes_linear_time(pattern)


@pytest.mark.parametrize("pattern", SQUARE)
def test_expressions_that_may_take_longer(pattern: str) -> None:
    assert not takes_linear_time(pattern)


def test_those_of_real_models_take_a_time_in_proportion() -> None:
    linear = {
        name: all(takes_linear_time(pattern) for pattern in rule.patterns)
        for name, rule in RULES.items()
    }
    assert {name for name, holds in linear.items() if not holds} == SLOW_MODELS


@pytest.mark.parametrize("pattern", LINEAR)
def test_texts_ten_times_as_long_take_no_hundred_times_as_long(pattern: str) -> None:
    """Of an expression that takes the square, one of these texts alone takes seconds."""
    split, size = Split(Regex(pattern), "isolated"), 40_000
    begun = time.process_time()
    for text in ("a", "x", "ab", " ", "A", "\n"):
        split.pre_tokenize_str(text * (size // len(text)))
    assert time.process_time() - begun < 2


def letters(split: PreTokenizer) -> Backend:
    made = Backend(BPE({text: index for index, text in enumerate("abcxyz 1")}, []))
    made.pre_tokenizer = split
    return made


def words_without_end() -> Backend:
    vocabulary = {"[UNK]": 0, "a": 1, "##a": 2}
    made = Backend(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=10**9))
    made.pre_tokenizer = Whitespace()
    return made


@pytest.mark.parametrize("slow", ["expression", "words"])
def test_a_long_text_that_takes_the_square_of_its_length_is_ended(
    slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_process, "_SECONDS", 0.5)
    monkeypatch.setattr(tokenizer_process, "_RATE", 1e9)
    square = Split(Regex(r"[a-z]+\d"), "isolated")
    tokenizer = Tokenizer(letters(square) if slow == "expression" else words_without_end(), {})
    assert len(tokenizer.encode("aaa")) == 3
    with pytest.raises(CheckpointError, match=r"its tokenizer needs more than .* s"):
        tokenizer.encode("a" * 400_000)


def test_long_texts_get_the_ids_that_the_library_gives() -> None:
    plain = letters(Split(Regex("[a-z]+1|[ ]"), "isolated"))
    text = "abc abc1 zz 1" * 2000
    expected = plain.encode(text)
    tokenizer = Tokenizer(letters(Split(Regex("[a-z]+1|[ ]"), "isolated")), {})
    assert tokenizer.encode_with_offsets(text) == (expected.ids, expected.offsets)
    assert tokenizer.encode_batch(["ab", text]) == [[0, 1], expected.ids]
    assert tokenizer.decode(expected.ids) == plain.decode(expected.ids)
