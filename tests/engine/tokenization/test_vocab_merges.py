"""vocab.json and merges.txt without a tokenizer.json: read by class or model type, else refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError
from engine.tokenization.tokenizer import Tokenizer
from tests.support.tokenizer_folder import TokenizerFolder


@pytest.fixture
def folder(backend_json: str, tmp_path: Path) -> Path:
    """The files of a byte-level BPE, without special tokens in its vocabulary."""
    model = json.loads(backend_json)["model"]
    texts = [text for text in sorted(model["vocab"], key=model["vocab"].get) if "<|" not in text]
    vocabulary = {text: index for index, text in enumerate(texts)}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return tmp_path


def load(folder: Path, model_type: str | None = None, **config: Any) -> Tokenizer:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return TokenizerFolder(folder).load()


@pytest.mark.parametrize(
    ("model_type", "name", "rule"),
    [
        (None, "Qwen2Tokenizer", "qwen2"),
        ("llama", "Qwen2TokenizerFast", "qwen2"),
        ("qwen3_moe", None, "qwen2"),
        ("qwen3_5_moe_text", None, "qwen35"),
        (None, "GPT2TokenizerFast", "gpt-2"),
    ],
)
def test_class_or_model_type_tells_how_text_is_cut(
    folder: Path, model_type: str | None, name: str | None, rule: str
) -> None:
    tokenizer = load(folder, model_type, **({"tokenizer_class": name} if name else {}))
    text = "12 e\u0301\n\n  x"
    whole = tokenizer.encode(text)
    assert tokenizer.decode(whole) == (text if rule == "gpt-2" else "12 \u00e9\n\n  x")
    digits = [tokenizer.decode([index]) for index in tokenizer.encode("1234")]
    assert "".join(digits) == "1234"


def test_declared_tokens_follow_the_vocabulary(folder: Path) -> None:
    size = max(json.loads((folder / "vocab.json").read_text()).values()) + 1
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    declared = {str(size + n): {"content": text, "special": True} for n, text in enumerate(names)}
    tokenizer = load(
        folder, "qwen2", added_tokens_decoder=declared, eos_token="<|im_end|>", add_bos_token=True
    )
    assert tokenizer.encode("<|im_start|>a") == [size + 1, *tokenizer.encode("a")]
    assert tokenizer.special_tokens == {
        "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
    }  # fmt: skip
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ([], [])
    assert load(folder, "gpt2", add_bos_token=True).prefix_ids == [size]


def test_what_nothing_tells_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"class 'OwnTokenizer' nor the model type 'llama'"):
        load(folder, "llama", tokenizer_class="OwnTokenizer")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", '{"a": "x"}', r"does not give every token an id of its own \('a'\)"),
        ("vocab.json", '{"a": 1, "b": 1}', "does not give every token an id of its own"),
        ("vocab.json", "[]", "expected an object"),
        ("merges.txt", "#version: 0.2\na b c\n", "1 lines of merges.txt do not join"),
        ("merges.txt", "zz y", "1 lines of merges.txt do not join"),
    ],
)
def test_damaged_files_are_refused(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load(folder, "qwen2")
