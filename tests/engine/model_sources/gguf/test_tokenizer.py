import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from engine.errors import CheckpointError, ConfigError
from engine.model_sources.gguf.pre_tokenizers import RULES
from engine.model_sources.gguf.source import GGUFSource
from engine.model_sources.gguf.tokenizer import GGUFTokenizer, build_tokenizer

Metadata = dict[str, tuple[int, Any]]
U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def parsed(metadata: Metadata) -> dict[str, Any]:
    """`metadata` as the container gives it: plain values, lists of texts, arrays of numbers."""
    result: dict[str, Any] = {"general.architecture": "llama", "llama.context_length": 256}
    for key, (kind, value) in metadata.items():
        if kind != ARRAY:
            result[key] = value
        elif value[0] == STRING:
            result[key] = list(value[1])
        else:
            result[key] = np.array(value[1])
    return result


def build(metadata: Metadata, **changes: Any) -> tuple[Tokenizer, GGUFTokenizer]:
    values = parsed(metadata)
    for key, value in changes.items():
        full = f"tokenizer.ggml.{key}"
        if value is None:
            values.pop(full)
        else:
            values[full] = value
    built = build_tokenizer(values, 300, "here")
    assert built is not None
    return Tokenizer.from_str(built.json), built


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


def test_merges_and_digits_are_those_of_the_named_rule(tokenizer_metadata: Metadata) -> None:
    tokenizer, _ = build(tokenizer_metadata)
    assert pieces(tokenizer, "the the") == ["t", "he", "Ġthe"]
    assert pieces(tokenizer, "a  12") == ["a", "ĠĠ", "1", "2"]
    plain, _ = build(tokenizer_metadata, pre="gpt-2")
    assert pieces(plain, "a  12") == ["a", "Ġ", "Ġ", "1", "2"]


def test_any_text_survives_a_round_trip(tokenizer_metadata: Metadata) -> None:
    tokenizer, _ = build(tokenizer_metadata)
    for text in ("", " ", "héllo\n\tworld  ", "日本 🎉 \u200d\u0301", "\x00\x7f\u00a0", "a\r\n b"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_control_tokens_are_special_and_user_defined_ones_are_not(
    tokenizer_metadata: Metadata,
) -> None:
    tokenizer, _ = build(tokenizer_metadata)
    encoding = tokenizer.encode("<|im_start|>a<tool>the", add_special_tokens=False)
    assert encoding.tokens == ["<|im_start|>", "a", "<tool>", "t", "he"]
    assert tokenizer.decode(encoding.ids, skip_special_tokens=True) == "a<tool>the"
    added = json.loads(tokenizer.to_str())["added_tokens"]
    assert {token["content"]: token["special"] for token in added} == {
        "<|endoftext|>": True,
        "<|im_start|>": True,
        "<|im_end|>": True,
        "<tool>": False,
    }


def test_ids_are_those_of_the_file(tokenizer_metadata: Metadata) -> None:
    tokenizer, _ = build(tokenizer_metadata)
    tokens = tokenizer_metadata["tokenizer.ggml.tokens"][1][1]
    assert [tokenizer.id_to_token(number) for number in range(len(tokens))] == tokens
    assert tokenizer.get_vocab_size() == len(tokens)


def test_offsets_cover_the_whole_text(tokenizer_metadata: Metadata) -> None:
    tokenizer, _ = build(tokenizer_metadata)
    text = "<|im_start|> the  x"
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    assert "".join(text[start:stop] for start, stop in offsets) == text


@pytest.mark.parametrize(
    ("add_bos", "add_eos", "expected"),
    [
        (False, False, ["a"]),
        (True, False, ["<|im_start|>", "a"]),
        (True, True, ["<|im_start|>", "a", "<|im_end|>"]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(
    tokenizer_metadata: Metadata, add_bos: bool, add_eos: bool, expected: list[str]
) -> None:
    tokenizer, built = build(tokenizer_metadata, add_bos_token=add_bos, add_eos_token=add_eos)
    assert tokenizer.encode("a").tokens == expected
    assert tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]
    assert (built.config["add_bos_token"], built.config["add_eos_token"]) == (add_bos, add_eos)


def test_without_a_word_llama_3_starts_with_bos(tokenizer_metadata: Metadata) -> None:
    tokenizer, _ = build(tokenizer_metadata, pre="llama-bpe", add_bos_token=None)
    assert tokenizer.encode("a").tokens == ["<|im_start|>", "a"]
    tokenizer, _ = build(tokenizer_metadata, add_bos_token=None)
    assert tokenizer.encode("a").tokens == ["a"]


def test_configuration_and_stop_ids(tokenizer_metadata: Metadata) -> None:
    _, built = build(tokenizer_metadata)
    assert built.config["eos_token"] == "<|im_end|>"
    assert built.config["bos_token"] == "<|im_start|>"
    assert built.config["pad_token"] == "<|im_end|>"
    assert built.config["unk_token"] == "<|endoftext|>"
    assert built.config["model_max_length"] == 256
    assert built.generation_config == {
        "eos_token_id": [2, 0],
        "bos_token_id": 1,
        "pad_token_id": 2,
    }


def test_end_of_turn_ids_of_the_file_stop_too(tokenizer_metadata: Metadata) -> None:
    _, built = build(tokenizer_metadata, eos_token_id=0, eot_token_id=5, eom_token_id=2**32 - 1)
    assert built.generation_config["eos_token_id"] == [0, 5, 2]


def test_nfc_is_applied_for_qwen_only(tokenizer_metadata: Metadata) -> None:
    decomposed = "e\u0301"
    qwen, _ = build(tokenizer_metadata, pre="qwen2")
    smol, _ = build(tokenizer_metadata)
    assert pieces(qwen, decomposed) == pieces(smol, "é")
    assert pieces(smol, decomposed) != pieces(smol, "é")


def test_llama_3_takes_a_whole_word_over_its_merges(tokenizer_metadata: Metadata) -> None:
    tokens = [*tokenizer_metadata["tokenizer.ggml.tokens"][1][1], "abc"]
    kinds = np.array([*tokenizer_metadata["tokenizer.ggml.token_type"][1][1], 1])
    llama, _ = build(tokenizer_metadata, pre="llama-bpe", tokens=tokens, token_type=kinds)
    plain, _ = build(tokenizer_metadata, pre="gpt-2", tokens=tokens, token_type=kinds)
    assert pieces(llama, "abc") == ["abc"]
    assert pieces(plain, "abc") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("rule", "architecture", "first"),
    [
        *(("qwen2", name, "<|endoftext|>") for name in ("qwen2", "qwen3", "qwen2moe")),
        *(("qwen2", name, "<|endoftext|>") for name in ("qwen3moe", "qwen3next")),
        *(("qwen35", name, "<|endoftext|>") for name in ("qwen35", "qwen35moe")),
        ("llama-bpe", "llama", "<|begin_of_text|>"),
        ("llama-bpe", "smollm3", "<|begin_of_text|>"),
        ("smollm", "llama", "<gh_stars>"),
    ],
)
@pytest.mark.parametrize("pre", [None, "", "default"])
def test_files_without_a_rule_are_recognised_by_their_model(
    pre: str | None, rule: str, architecture: str, first: str, tokenizer_metadata: Metadata
) -> None:
    values = parsed(tokenizer_metadata)
    tokens = [first, *values["tokenizer.ggml.tokens"][1:]]
    values |= {"general.architecture": architecture, "tokenizer.ggml.tokens": tokens}
    values |= {"tokenizer.ggml.pre": pre}
    guessed = build_tokenizer(values, 300, "here")
    assert guessed == build_tokenizer(values | {"tokenizer.ggml.pre": rule}, 300, "here")


def test_a_model_that_tells_nothing_gets_the_default_of_llama_cpp_and_a_warning(
    tokenizer_metadata: Metadata, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, _ = build(tokenizer_metadata, pre="default")
    assert tokenizer.pre_tokenizer is not None
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("a=1234 b")]
    assert words == ["a", "=", "123", "4", "Ġb"]
    assert "does not name its pre-tokenizer" in caplog.text


def test_a_named_token_that_its_type_calls_ordinary_stays_ordinary(
    tokenizer_metadata: Metadata,
) -> None:
    values = parsed(tokenizer_metadata)
    quote = values["tokenizer.ggml.tokens"].index('"')
    tokenizer, built = build(tokenizer_metadata, bos_token_id=quote)
    ids = tokenizer.encode('say "the"', add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == 'say "the"'
    assert "bos_token" not in built.config
    assert built.generation_config["bos_token_id"] == quote
    untyped, built = build(tokenizer_metadata, token_type=None)
    assert untyped.encode("a<|im_end|>").tokens == ["a", "<|im_end|>"]
    assert built.config["eos_token"] == "<|im_end|>"


def test_a_tokenizer_json_stands_in_for_an_unknown_rule(
    tokenizer_metadata: Metadata, tmp_path: Path
) -> None:
    known, built = build(tokenizer_metadata, pre="gpt-2")
    values = parsed(tokenizer_metadata) | {"tokenizer.ggml.pre": "somebody's"}
    beside = tmp_path / "tokenizer.json"
    with pytest.raises(ConfigError, match='pre-tokenizer is "somebody\'s"'):
        build_tokenizer(values, 300, "here", beside)
    beside.write_text(built.json)
    inside = values | {"tokenizer.huggingface.json": built.json}
    for result in (
        build_tokenizer(values, 300, "here", beside),
        build_tokenizer(inside, 300, "here"),
        build_tokenizer(values | {"tokenizer.ggml.model": "own"}, 300, "here", beside),
    ):
        assert result is not None
        text = "<|im_start|>the  12 don't<tool>"
        assert Tokenizer.from_str(result.json).encode(text).ids == known.encode(text).ids
        assert result.config == built.config
    swapped = list(values["tokenizer.ggml.tokens"])
    swapped[8], swapped[9] = swapped[9], swapped[8]
    with pytest.raises(ConfigError, match="belongs to another model than this GGUF file: 2 of"):
        build_tokenizer(values | {"tokenizer.ggml.tokens": swapped}, 300, "here", beside)
    beside.write_text("{}")
    with pytest.raises(ConfigError, match="cannot be used as the tokenizer"):
        build_tokenizer(values, 300, "here", beside)


def test_every_rule_is_a_pattern_that_covers_all_text(tokenizer_metadata: Metadata) -> None:
    text = "It's 12345 naïve\u00a0WORDS, path/to \n\n  ÀÉ 日本語!! \t\r\n'LL x_1"
    for name in RULES:
        tokenizer, _ = build(tokenizer_metadata, pre=name)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text, name


def test_a_normal_token_outside_the_byte_alphabet_is_respelled(
    tokenizer_metadata: Metadata,
) -> None:
    tokens = [*tokenizer_metadata["tokenizer.ggml.tokens"][1][1], "日 本"]
    kinds = np.array([*tokenizer_metadata["tokenizer.ggml.token_type"][1][1], 1])
    tokenizer, _ = build(tokenizer_metadata, tokens=tokens, token_type=kinds)
    assert tokenizer.decode([len(tokens) - 1]) == "日 本"


def test_empty_tokens_get_a_name(tokenizer_metadata: Metadata) -> None:
    tokens = [*tokenizer_metadata["tokenizer.ggml.tokens"][1][1], "", ""]
    kinds = np.array([*tokenizer_metadata["tokenizer.ggml.token_type"][1][1], 5, 5])
    tokenizer, _ = build(tokenizer_metadata, tokens=tokens, token_type=kinds)
    assert tokenizer.get_vocab_size() == len(tokens)


@pytest.mark.parametrize("kind", [None, "none", "no_vocab"])
def test_a_file_may_have_no_tokenizer(kind: str | None) -> None:
    assert build_tokenizer({"tokenizer.ggml.model": kind}, 10, "here") is None


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "bert"}, ConfigError, "of the kind 'bert'"),
        ({"model": 3}, ConfigError, "of the kind 3"),
        ({"pre": "unheard-of"}, ConfigError, "'unheard-of', which is not known; known are"),
        ({"tokens": None}, CheckpointError, "has no tokens"),
        ({"tokens": []}, CheckpointError, "has 0 tokens"),
        (
            {"tokens": [str(n) for n in range(301)]},
            CheckpointError,
            "301 tokens, its embedding 300",
        ),
        ({"token_type": np.ones(3)}, CheckpointError, "token_type does not hold one number"),
        ({"token_type": "x"}, CheckpointError, "token_type does not hold one number"),
        ({"merges": None}, CheckpointError, "has no merges"),
        ({"merges": ["a"]}, CheckpointError, "1 merges do not join"),
        ({"merges": ["a b c"]}, CheckpointError, "'a b c'"),
        ({"merges": ["x y"]}, CheckpointError, "'x y'"),
        ({"merges": ["zzz a"]}, CheckpointError, "'zzz a'"),
        ({"eos_token_id": 268}, CheckpointError, "eos_token_id is 268"),
        ({"bos_token_id": "1"}, CheckpointError, "bos_token_id is 1"),
        ({"unknown_token_id": -7}, CheckpointError, "unknown_token_id is -7"),
    ],
)
def test_a_damaged_vocabulary_is_named(
    tokenizer_metadata: Metadata, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match="here") as caught:
        build(tokenizer_metadata, **changes)
    assert words in str(caught.value)


def test_two_tokens_spelled_alike_are_an_error(tokenizer_metadata: Metadata) -> None:
    tokens = list(tokenizer_metadata["tokenizer.ggml.tokens"][1][1])
    tokens[50] = tokens[51]
    with pytest.raises(CheckpointError, match="stand there twice"):
        build(tokenizer_metadata, tokens=tokens)


SENTENCEPIECE: Metadata = {
    "tokenizer.ggml.model": (STRING, "llama"),
    "tokenizer.ggml.tokens": (
        ARRAY,
        (
            STRING,
            [
                *("<unk>", "<s>", "</s>"),
                *(f"<0x{byte:02X}>" for byte in range(256)),
                *("▁a", "bc", "▁ab", "▁abc", "▁", "a", "b", "c"),
            ],
        ),
    ),
    "tokenizer.ggml.scores": (
        ARRAY,
        (F32, [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0]),
    ),
    "tokenizer.ggml.token_type": (ARRAY, (5, [2, 3, 3] + [6] * 256 + [1] * 8)),
    "tokenizer.ggml.bos_token_id": (U32, 1),
    "tokenizer.ggml.eos_token_id": (U32, 2),
    "tokenizer.ggml.unknown_token_id": (U32, 0),
}


def test_sentencepiece_joins_by_score() -> None:
    tokenizer, built = build(SENTENCEPIECE)
    assert pieces(tokenizer, "abc") == ["▁abc"]
    assert pieces(tokenizer, "ab b") == ["▁ab", "▁", "b"]
    assert tokenizer.encode("abc").tokens == ["<s>", "▁abc"]
    assert built.config["add_bos_token"] is True


def test_sentencepiece_falls_back_to_bytes() -> None:
    tokenizer, _ = build(SENTENCEPIECE)
    assert pieces(tokenizer, "é") == ["▁", "<0xC3>", "<0xA9>"]
    for text in ("é", "a  b", " a", "🎉\n日本"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        assert decoded.strip() == text.strip()


def test_the_prefix_space_can_be_switched_off() -> None:
    tokenizer, _ = build(SENTENCEPIECE, add_space_prefix=False)
    assert pieces(tokenizer, "abc") == ["a", "bc"]


def test_a_checkpoint_offers_its_tokenizer_files(
    write_gguf: Callable[..., Path], tmp_path: Path, tokenizer_metadata: Metadata
) -> None:
    short = dict(tokenizer_metadata)
    tokens = ["<|endoftext|>", "<|im_end|>", *map(chr, range(0x21, 0x7F)), "Ġ", "ab"]
    short["tokenizer.ggml.tokens"] = (ARRAY, (STRING, tokens))
    short["tokenizer.ggml.token_type"] = (ARRAY, (5, [3, 3] + [1] * 96))
    short["tokenizer.ggml.merges"] = (ARRAY, (STRING, ["a b"]))
    path = write_gguf(tmp_path / "m.gguf", "llama", short)
    checkpoint = GGUFSource(path)
    text = checkpoint.tokenizer_json()
    assert text is not None
    assert pieces(Tokenizer.from_str(text), "ab c") == ["ab", "Ġ", "c"]
    files = checkpoint.tokenizer_files()
    assert sorted(files) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert files["chat_template.jinja"] == b"{{ messages[0]['content'] }}"
    assert checkpoint.chat_template() == "{{ messages[0]['content'] }}"
    config = files["tokenizer_config.json"]
    assert isinstance(config, bytes)
    assert checkpoint.tokenizer_config() == json.loads(config)
    assert checkpoint.generation_config["eos_token_id"] == [2, 0, 1]
