"""Tokenizers rebuilt from GGUF files against llama.cpp, transformers and SentencePiece.

llama.cpp reproduces the token ids of the tokenizers that models were trained with, and is the
reference for SmolLM2. transformers 5 rebuilds the same tokenizer from a GGUF file without the rule
that digits stand alone (`tokenizer.ggml.pre` = "smollm"), so its ids for text with several spaces
before a number are others; on text without numbers the two must agree.
"""

import http.client
import inspect
import json
import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
import sentencepiece
import xllamacpp
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from transformers.integrations.gguf import convert_gguf_tokenizer

from engine.model_sources.gguf.tokenizer import build_tokenizer
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import open_model_source

pytestmark = pytest.mark.interop

ALPHABET = " \n\t  aA0é9漢字한🎉\u0301\u200d²½ⅧßñЖ،।'s\u00a0\u3000\"\r.,_/-#{}()=<>"
WORDS = (
    *("the", "The", "don't", "I'LL", "HelloWorld", "naïve", "Straße", "日本語", "한국어", "привет"),
    *("12345", "3.14", "0x5B", "1e-5", "٣٤", "½", "path/to/file.py", "__init__", "==", "!=", "->"),
    *(" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "        ", "\u00a0", "...", "?!", "🎉👩‍💻"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start", "im_end|>", "<repo_name>"),
)


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
    text = checkpoint.tokenizer_json()
    assert text is not None
    return Tokenizer.from_str(text)


@pytest.fixture(scope="module")
def llama_cpp(smollm2_gguf: Path) -> Iterator[http.client.HTTPConnection]:
    """A connection to llama.cpp's own server with the model, on this machine."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(smollm2_gguf)
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)
    address = urlparse(server.listening_address)
    connection = http.client.HTTPConnection(str(address.hostname), address.port)
    yield connection
    connection.close()
    del server


def post(connection: http.client.HTTPConnection, path: str, body: object) -> dict[str, object]:
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    assert isinstance(answer, dict)
    return answer


def test_ids_equal_llama_cpp(
    ours: Tokenizer, llama_cpp: http.client.HTTPConnection, strings: list[str]
) -> None:
    for text in strings:
        body = {"content": text, "add_special": False, "parse_special": True}
        theirs = post(llama_cpp, "/tokenize", body)["tokens"]
        assert ours.encode(text, add_special_tokens=False).ids == theirs, repr(text)


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


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
)
def test_a_sentencepiece_vocabulary_equals_transformers_and_sentencepiece(
    name: str, strings: list[str]
) -> None:
    spec = find_spec("mistral_common")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(
            "needs the vocabularies in mistral-common: pip install --no-deps mistral-common"
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / name
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    count = model.get_piece_size()
    kinds = [
        2 if model.is_unknown(n) else 3 if model.is_control(n) else 6 if model.is_byte(n) else 1
        for n in range(count)
    ]
    tokens = [model.id_to_piece(n) for n in range(count)]
    scores = np.array([model.get_score(n) for n in range(count)], dtype=np.float32)
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": np.array(kinds),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }
    built = build_tokenizer(metadata, count, name)
    assert built is not None
    ours = Tokenizer.from_str(built.json)
    theirs, _ = convert_gguf_tokenizer(
        "llama",
        {
            "tokenizer_type": "llama",
            "tokens": tokens,
            "scores": scores.tolist(),
            "token_type": kinds,
        },
    )
    compared = 0
    for text in strings:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        # transformers, unlike SentencePiece, puts no space before a text that starts with one.
        if text and not text[0].isspace():
            assert ids == model.encode(text), repr(text)
            compared += 1
    assert compared > 2000
