"""Tokenizers rebuilt from GGUF files against llama.cpp, transformers and SentencePiece.

llama.cpp reproduces the token ids of the tokenizers that models were trained with, and is the
reference for SmolLM2. transformers 5 rebuilds the same tokenizer from a GGUF file without the rule
that digits stand alone (`tokenizer.ggml.pre` = "smollm"), so its ids for text with several spaces
before a number are others; on text without numbers the two must agree.
"""

import inspect
import json
import random
import unicodedata
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer

from engine.model_sources.gguf.pre_tokenizers import RULES, UNNAMED
from engine.model_sources.gguf.source import GGUFSource
from engine.model_sources.interface.model_source import ModelDescription, ModelSource
from engine.model_sources.open import open_model_source
from engine.tokenization.tokenizer import load_tokenizer
from tests.support.llama_cpp import differences, write_vocabulary

pytestmark = pytest.mark.interop

ALPHABET = " \n\t  aA0é9漢字한🎉\u0301\u200d²½ⅧßñЖ،।'s\u00a0\u3000\"\r.,_/-#{}()=<>"
WORDS = (
    *("the", "The", "don't", "I'LL", "HelloWorld", "naïve", "Straße", "日本語", "한국어", "привет"),
    *("12345", "3.14", "0x5B", "1e-5", "٣٤", "½", "path/to/file.py", "__init__", "==", "!=", "->"),
    *(" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "        ", "\u00a0", "...", "?!", "🎉👩‍💻"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start", "im_end|>", "<repo_name>"),
)


def rebuilt(source: ModelDescription) -> Tokenizer:
    """The tokenizer that a GGUF file is read as."""
    text = source.tokenizer_json()
    assert text is not None
    return Tokenizer.from_str(text)


def encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Gives the ids of a text with nothing put around it."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return encode


def mixed_strings(count: int) -> list[str]:
    """Random letters, random words with special tokens among them, and pieces of source code."""
    rng = random.Random(5)
    source = inspect.getsource(inspect) + inspect.getsource(random) + inspect.getsource(json)
    strings = [
        "",
        " ",
        "\n",
        "a",
        "  12  34",
        "x =\n\n        3) y",
        "<|im_start|>user\nhi<|im_end|>\n",
    ]
    while len(strings) < count:
        kind = len(strings) % 3
        if kind == 0:
            strings.append("".join(rng.choices(ALPHABET, k=rng.randint(1, 40))))
        elif kind == 1:
            strings.append(rng.choice(("", " ")).join(rng.choices(WORDS, k=rng.randint(1, 25))))
        else:
            start = rng.randrange(len(source) - 300)
            strings.append(source[start : start + rng.randint(1, 300)])
    return strings


@pytest.fixture(scope="module")
def strings() -> list[str]:
    return mixed_strings(5000)


@pytest.fixture(scope="module")
def checkpoint(smollm2_gguf: Path) -> ModelSource:
    return open_model_source(smollm2_gguf)


@pytest.fixture(scope="module")
def ours(checkpoint: ModelSource) -> Tokenizer:
    return rebuilt(checkpoint)


def test_ids_equal_llama_cpp(ours: Tokenizer, smollm2_gguf: Path, strings: list[str]) -> None:
    encode = encoder(ours)
    assert differences(encode, smollm2_gguf, strings) == []


def test_ids_equal_transformers_on_text_without_numbers(
    ours: Tokenizer, smollm2_gguf: Path, strings: list[str]
) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    plain = [text for text in strings if not any(letter.isnumeric() for letter in text)]
    assert len(plain) > 1000
    for text in plain:
        assert ours.encode(text).ids == theirs(text).input_ids, repr(text)


def test_the_exported_tokenizer_is_the_same_in_transformers(
    ours: Tokenizer, checkpoint: ModelSource, smollm2_directory: Path, strings: list[str]
) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2_directory)
    for text in strings:
        assert ours.encode(text).ids == theirs(text).input_ids, repr(text)
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
    assert (theirs.bos_token, theirs.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (theirs.pad_token, theirs.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert theirs.chat_template == checkpoint.chat_template()
    assert len(theirs) == ours.get_vocab_size() == checkpoint.config.vocab_size


def sentencepiece_metadata(
    name: str,
) -> tuple[dict[str, Any], sentencepiece.SentencePieceProcessor]:
    """The metadata that llama.cpp's converter writes for a real SentencePiece vocabulary."""
    spec = find_spec("mistral_common")
    assert spec is not None, "install it with: pip install --no-deps mistral-common"
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "data" / name
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    count = model.get_piece_size()
    kinds = [
        2 if model.is_unknown(n) else 3 if model.is_control(n) else 6 if model.is_byte(n) else 1
        for n in range(count)
    ]
    metadata = {
        "model": "llama",
        "tokens": [model.id_to_piece(n) for n in range(count)],
        "scores": [model.get_score(n) for n in range(count)],
        "token_type": kinds,
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        "unknown_token_id": model.unk_id(),
    }
    return metadata, model


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
)
@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_equals_llama_cpp_and_sentencepiece(
    name: str, prefix: bool, strings: list[str], tmp_path: Path
) -> None:
    metadata, model = sentencepiece_metadata(name)
    metadata["add_space_prefix"] = prefix
    path = write_vocabulary(tmp_path / "model.gguf", metadata, len(metadata["tokens"]))
    ours = rebuilt(GGUFSource(path))
    leading = random.Random(8)
    starts = ["", "", " ", "▁", "  ", "<s>", "</s> ", "<s>[INST] ", " </s>"]
    texts = [*starts, "<s>[INST] hi [/INST]", "</s>x"]
    texts += [leading.choice(starts) + text for text in strings[:2000]]
    encode = encoder(ours)
    assert differences(encode, path, texts) == []
    if prefix:
        control = ("<s>", "</s>", "<unk>", "[INST]", "[/INST]")
        plain = [text for text in texts if not any(token in text for token in control)]
        assert [text for text in plain if encode(text) != model.encode(text)] == []
        assert len(plain) > 800


# Texts in which the rules differ: words, contractions, case, numbers, spaces, line ends, marks.
PARTS = (
    *("don't", "I'M", "we'LL", "'re ", "x'd", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n"),
    *(
        " \n",
        "a",
        "Abc",
        "ABC",
        "aBC",
        "12",
        "1",
        "1234567",
        " 12",
        "3.14",
        "$5",
        "+=",
        "==",
        "...",
    ),
    *(
        "...",
        "?!",
        "/",
        "//",
        "\\",
        " (",
        "(a",
        "[b]",
        "#",
        "_x_",
        "--",
        "`c`",
        "|",
        "~",
        "^",
        "<>",
        "@a",
    ),
)
# llama.cpp's regexes of these are its own approximations, of case and of combining marks in the
# first five and of U+3000 in the last; the models' own are used here.
APPROXIMATED = ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2", "tekken", "deepseek-coder")


@pytest.fixture(scope="module")
def crossing(strings: list[str]) -> dict[str, Any]:
    """A byte-level BPE whose merges cross all borders, so that every split shows in the ids."""
    rng = random.Random(3)
    ascii_texts = ["".join(rng.choices(PARTS, k=rng.randint(1, 10))) for _ in range(400)]
    plain = [text for text in strings[:800] if "<|" not in text]
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2500, show_progress=False, initial_alphabet=alphabet, max_token_length=12
    )
    trained.train_from_iterator([*ascii_texts, *plain], trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<|endoftext|>", "<|im_end|>"]
    metadata = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": [*[1] * (len(tokens) - 2), 3, 3],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": len(tokens) - 2,
        "eos_token_id": len(tokens) - 1,
    }
    normal = [text for text in plain if unicodedata.is_normalized("NFC", text)]
    return {"metadata": metadata, "ascii": ascii_texts, "unicode": normal[:400]}


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_splits_as_llama_cpp(
    name: str, crossing: dict[str, Any], tmp_path: Path
) -> None:
    metadata = crossing["metadata"] | {"pre": name}
    path = write_vocabulary(tmp_path / "model.gguf", metadata, len(metadata["tokens"]))
    ours = rebuilt(GGUFSource(path))
    texts = crossing["ascii"] + ([] if name in APPROXIMATED else crossing["unicode"])
    encode = encoder(ours)
    assert differences(encode, path, texts) == []


def test_a_file_without_a_rule_splits_as_llama_cpp(
    crossing: dict[str, Any], tmp_path: Path
) -> None:
    metadata = crossing["metadata"] | {"pre": "default"}
    path = write_vocabulary(tmp_path / "model.gguf", metadata, len(metadata["tokens"]))
    ours = rebuilt(GGUFSource(path))
    pre_tokenizer = json.loads(ours.to_str())["pre_tokenizer"]
    assert len(pre_tokenizer["pretokenizers"]) == len(UNNAMED.patterns) + 1
    texts = crossing["ascii"] + crossing["unicode"]
    encode = encoder(ours)
    assert differences(encode, path, texts) == []


def test_named_tokens_of_an_ordinary_type_are_ordinary_as_in_llama_cpp(
    crossing: dict[str, Any], tmp_path: Path
) -> None:
    tokens = crossing["metadata"]["tokens"]
    metadata = crossing["metadata"] | {"pre": "qwen2", "bos_token_id": tokens.index('"')}
    path = write_vocabulary(tmp_path / "model.gguf", metadata, len(tokens))
    ours = load_tokenizer(GGUFSource(path))
    texts = [f'"{text}" "' for text in crossing["ascii"]]
    encode = partial(ours.encode, add_special_tokens=False)
    assert differences(encode, path, texts) == []
    assert all(ours.decode(encode(text)) == text for text in texts)


ADDED = ("<a>", "[q]", "<|c|>", "{d}", "<e f>", "é!", "the~", "    @", "#g", "<|eot_id|>")


@pytest.mark.parametrize("seed", range(8))
def test_tokens_of_every_type_are_matched_as_in_llama_cpp(
    seed: int, crossing: dict[str, Any], tmp_path: Path
) -> None:
    """Ordinary, control, user-defined and unused tokens, any of which may be named BOS or EOS."""
    rng = random.Random(seed)
    added = rng.sample(ADDED, 8)
    types = [rng.choice([1, 3, 3, 4, 4, 5]) for _ in added]
    if seed % 2:
        metadata, _ = sentencepiece_metadata("tokenizer.model.v1")
        metadata["scores"] = [*metadata["scores"], *[-1e6] * 8]
    else:
        metadata = crossing["metadata"] | {"pre": rng.choice(["qwen2", "gpt-2", "llama-bpe"])}
    metadata |= {
        "tokens": [*metadata["tokens"], *added],
        "token_type": [*metadata["token_type"], *types],
    }
    first = len(metadata["tokens"]) - 8
    for name in ("bos", "eos", "padding"):
        metadata[f"{name}_token_id"] = first + rng.randrange(8)
    path = write_vocabulary(tmp_path / "model.gguf", metadata, len(metadata["tokens"]))
    ours = load_tokenizer(GGUFSource(path))
    words = [text[:20] for text in crossing["unicode"]]
    pieces = [*added, *added, "a", " ", "  ", "\n"]
    drawn = [
        "".join(
            rng.choice([rng.choice(pieces), rng.choice(words)]) for _ in range(rng.randint(1, 8))
        )
        for _ in range(150)
    ]
    texts = [text for text in drawn if unicodedata.is_normalized("NFC", text)]
    encode = partial(ours.encode, add_special_tokens=False)
    assert differences(encode, path, texts) == []
