"""SentencePiece files give the ids that the `sentencepiece` library gives."""

import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from engine.errors import CheckpointError
from engine.tokenization.sentencepiece import load_sentencepiece

WORDS = [
    "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "naïve",
    "readers", "count", "to", "ten", "and", "print", "code", "def", "return", "lambda", "yield",
    "東京", "café", "straße", "hello", "world", "value", "index", "error", "string", "number",
]  # fmt: skip
ODD = ["  ", "\n", "\t", "    ", "é", "🙂", "x=1", "(", "):", "ﬁ", "\u00a0", "0x1F", "aaaa"]


def sentences(count: int, seed: int) -> list[str]:
    source = random.Random(seed)
    return [
        source.choice(WORDS)
        + "".join(
            source.choice(WORDS + ODD) + source.choice(["", " ", " "])
            for _ in range(source.randint(1, 14))
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train a small SentencePiece model and return its path."""

    def make(**options: Any) -> Path:
        prefix = tmp_path_factory.mktemp("spm") / "tokenizer"
        defaults: dict[str, Any] = {
            "vocab_size": 420, "byte_fallback": True, "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False, "user_defined_symbols": ["<tool>"],
            "control_symbols": ["<ctl>"], "minloglevel": 2, "hard_vocab_limit": False,
        }  # fmt: skip
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences(400, 1)),
            model_prefix=str(prefix),
            **{**defaults, **options},
        )
        return prefix.with_suffix(".model")

    return make


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe"},
        {"model_type": "unigram"},
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"},
        {"model_type": "bpe", "normalization_rule_name": "nfkc", "byte_fallback": False},
        {"model_type": "bpe", "remove_extra_whitespaces": True},
    ],
    ids=str,
)
def test_ids_equal_those_of_the_library(options: dict[str, Any], train: Any) -> None:
    path = train(**options)
    ours = load_sentencepiece(path, {})
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in sentences(400, 2):
        assert ours.encode(text).ids == list(theirs.encode(text)), text


def test_real_mistral_vocabulary_gives_the_ids_of_the_library() -> None:
    """`mistral-common` carries real models; `make test` installs it, without its dependencies."""
    spec = find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("mistral-common is not installed (pip install --no-deps mistral-common)")
    path = Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
    ours = load_sentencepiece(path, {})
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in [*sentences(1000, 3), "x\n    return 1\n        y  = 2"]:
        assert ours.encode(text).ids == list(theirs.encode(text)), text


def test_special_tokens_are_cut_out_and_bytes_fall_back(train: Any) -> None:
    path = train(model_type="bpe")
    tokenizer = load_sentencepiece(path, {})
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    encoding = tokenizer.encode("<s>hello<tool> 𓀀</s><ctl>")
    tokens = encoding.tokens
    assert [tokens[0], tokens[-2], tokens[-1]] == ["<s>", "</s>", "<ctl>"]
    assert "<tool>" in tokens
    assert [token for token in tokens if token.startswith("<0x")] == [
        "<0xF0>", "<0x93>", "<0x80>", "<0x80>",
    ]  # fmt: skip
    assert library.is_control(encoding.ids[0])
    assert tokenizer.decode(encoding.ids, skip_special_tokens=True) == "hello<tool> 𓀀"


def test_the_space_before_the_text_follows_the_configuration(train: Any) -> None:
    path = train(model_type="bpe")

    def tokens(text: str, **config: Any) -> str:
        return "".join(load_sentencepiece(path, config).encode(text).tokens)

    assert tokens("a</s>b") == "▁a</s>b"
    assert tokens("a</s>b", legacy=False) == "▁a</s>b"
    assert tokens("a</s>b", legacy=True) == "▁a</s>▁b"
    assert tokens("a</s>b", add_prefix_space=False) == "a</s>b"
    assert tokens("<s>a b") == "<s>a▁b"


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"no model at all", None])
def test_a_damaged_file_is_refused(content: bytes | None, train: Any, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    whole = train(model_type="bpe").read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        load_sentencepiece(path, {})


def test_an_algorithm_that_tokenizers_lack_is_refused(train: Any) -> None:
    path = train(model_type="char", vocab_size=80, byte_fallback=False)
    with pytest.raises(CheckpointError, match="word or character"):
        load_sentencepiece(path, {})
