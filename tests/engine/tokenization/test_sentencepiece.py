"""SentencePiece files give the ids that the `sentencepiece` library gives."""

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from engine.errors import CheckpointError
from engine.tokenization.vocabularies.sentencepiece import load_sentencepiece
from tests.support.tokenizer_folder import TokenizerFolder

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


def at_the_ends(texts: list[str]) -> list[str]:
    """The texts, each with spaces, marks or a user-defined piece before or behind it."""
    rng = random.Random(7)
    pieces = [" ", "  ", "▁", " ▁", "\n", "\t ", "<tool>", " <tool>", "<tool> "]
    ends = [rng.choice(pieces) + text for text in texts]
    return ["", " ", "   ", "▁", "\n", *texts, *ends, *(t + rng.choice(pieces) for t in texts)]


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
@pytest.mark.parametrize("merges_spaces", [False, True])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("prefix", [False, True])
def test_spaces_at_both_ends_are_those_of_the_library(
    algorithm: str, merges_spaces: bool, rule: str, prefix: bool, train: Any
) -> None:
    path = train(
        model_type=algorithm,
        remove_extra_whitespaces=merges_spaces,
        normalization_rule_name=rule,
        add_dummy_prefix=prefix,
    )
    ours = load_sentencepiece(path, {}).backend
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in at_the_ends(sentences(120, 4)):
        assert ours.encode(text).ids == list(theirs.encode(text)), text


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
    ours = load_sentencepiece(path, {}).backend
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in sentences(400, 2):
        assert ours.encode(text).ids == list(theirs.encode(text)), text


def test_real_mistral_vocabulary_gives_the_ids_of_the_library() -> None:
    """`mistral-common` carries real models; `make test` installs it, without its dependencies."""
    spec = find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("mistral-common is not installed (pip install --no-deps mistral-common)")
    path = Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
    ours = load_sentencepiece(path, {}).backend
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in at_the_ends([*sentences(600, 3), "x\n    return 1\n        y  = 2"]):
        assert ours.encode(text).ids == list(theirs.encode(text)), text


def test_special_tokens_are_cut_out_and_bytes_fall_back(train: Any) -> None:
    path = train(model_type="bpe")
    tokenizer = load_sentencepiece(path, {}).backend
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
        return "".join(load_sentencepiece(path, config).backend.encode(text).tokens)

    assert tokens("a</s>b") == tokens("a</s>b", legacy=True) == "▁a</s>▁b"
    assert tokens("a</s>b", legacy=False) == "▁a</s>b"
    assert tokens("a</s>b", add_prefix_space=False) == "a</s>b"
    assert tokens("<s>a b") == "<s>▁a▁b"
    assert tokens("<s>a b", legacy=False) == "<s>a▁b"
    assert tokens(" a</s> b") == "▁▁a</s>▁▁b"
    assert tokens(" a</s> b", legacy=False) == "▁a</s>▁b"


def test_the_file_alone_names_its_control_pieces_and_puts_bos_before_a_text(
    train: Any, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(model_type="bpe").read_bytes())
    tokenizer = TokenizerFolder(tmp_path).load()
    assert tokenizer.special_tokens == {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    }  # fmt: skip
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == 1
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert TokenizerFolder(tmp_path).load().encode("a") == tokenizer.encode("a")[1:]
    (tmp_path / "tokenizer.model").write_bytes(train(model_type="unigram").read_bytes())
    (tmp_path / "tokenizer_config.json").unlink()
    assert TokenizerFolder(tmp_path).load().prefix_ids == []


def test_control_pieces_are_matched_whatever_their_flags_say(train: Any, tmp_path: Path) -> None:
    """As `normalized: true` in the configurations of Llama 1 and its first fine-tunings."""
    (tmp_path / "tokenizer.model").write_bytes(train(model_type="bpe").read_bytes())
    plain = TokenizerFolder(tmp_path).load()
    token = {"__type": "AddedToken", "content": "</s>", "normalized": True}
    decoder = {"2": {"content": "</s>", "normalized": True}}
    for config in ({"eos_token": token}, {"added_tokens_decoder": decoder, "eos_token": token}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        for text in ("a</s>b", "</s>", " </s> <tool>a"):
            assert TokenizerFolder(tmp_path).load().encode(text) == plain.encode(text), text


def test_a_tiktoken_vocabulary_under_that_name_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(CheckpointError, match=r"a vocabulary of tiktoken.*tokenizer\.json"):
        TokenizerFolder(tmp_path).load()


def test_added_tokens_are_matched_wherever_they_stand(train: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(model_type="bpe").read_bytes())
    plain = TokenizerFolder(tmp_path).load()
    size = plain.vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": size}))
    for flags in ({}, {"added_tokens_decoder": {str(size): {"content": "<|end|>"}}}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(flags))
        tokenizer = TokenizerFolder(tmp_path).load()
        a = plain.encode("a")[1:]
        assert tokenizer.encode("a<|end|>a") == [1, *a, size, *a]


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
