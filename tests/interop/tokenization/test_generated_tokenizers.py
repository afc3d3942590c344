"""2,000 generated tokenizers, whose files contradict each other, give transformers' ids and texts.

Every seed makes a vocabulary (byte-level BPE, WordPiece, Unigram, word level), tokens with flags in
the files that may declare them, and a post-processor; then texts in which those tokens stand
against letters, spaces and line ends.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import PreTrainedTokenizerFast

from tests.support.tokenizer_folder import TokenizerFolder

pytestmark = pytest.mark.interop

BATCHES, EACH, TEXTS = 8, 250, 12
SPECIAL = [
    *("<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|end|>", "[INST]"),
    *("<CALL>", "<tool>", "[MASK]", "abc", "the", "é", "<a b>", "<|x", "x|>", "▁▁", "<0x0A>"),
]
WORDS = [
    "the",
    "The",
    "abc",
    "abcd",
    "a",
    "b",
    "xabc",
    "é",
    "E\u0301",
    "12",
    "?",
    "ab c",
    "<",
    "|>",
]
GAPS = ["", "", " ", "  ", "\n", "\t", " \n ", ".", "▁", "\u00a0"]
NAMES = [f"{name}_token" for name in ("bos", "eos", "unk", "pad", "cls", "sep", "mask")]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def make_backend(source: random.Random) -> Tokenizer:
    kind = source.choice(["bytes", "bytes", "unigram", "wordpiece", "words", "metaspace"])
    letters = sorted({*"abcdehtxABCDETHX12?.<>|[]_ NSIMKOLTsintmkolpu/\n\té", "\u0301", "▁"})
    pieces = ["th", "the", "ab", "abc", "▁a", "▁the", "cd", "##b", "##c"]
    if kind == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [("t", "h"), ("th", "e"), ("a", "b"), ("ab", "c"), ("Ġ", "the"), ("<", "|")]
        whole = [*alphabet, *("".join(pair) for pair in merges)]
        backend = Tokenizer(BPE({text: index for index, text in enumerate(whole)}, merges))
        prefix = source.random() < 0.3
        rule = r"\s?\p{L}+|\p{N}{1,3}|[^\s\p{L}\p{N}]+|\s+"
        backend.pre_tokenizer = source.choice(
            [
                pre_tokenizers.ByteLevel(add_prefix_space=prefix),
                pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Split(Regex(rule), behavior="isolated"),
                        pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
                    ]
                ),
            ]
        )
        backend.decoder = decoders.ByteLevel()
    elif kind == "unigram":
        whole = ["<unk>", *letters, *pieces]
        backend = Tokenizer(Unigram([(text, -float(n)) for n, text in enumerate(whole)], 0, False))
        scheme = source.choice(["first", "always", "never"])
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    elif kind == "metaspace":
        vocab = {text: index for index, text in enumerate(["<unk>", *letters, "th", "the", "▁a"])}
        merges = [("t", "h"), ("th", "e"), ("▁", "a")]
        backend = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        vocab = {text: index for index, text in enumerate(["[UNK]", *letters, *pieces])}
        model = WordPiece if kind == "wordpiece" else WordLevel
        backend = Tokenizer(model(vocab, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        if kind == "wordpiece":
            backend.decoder = decoders.WordPiece()
    if backend.normalizer is None and source.random() < 0.4:
        backend.normalizer = source.choice(
            [normalizers.Lowercase(), normalizers.NFC(), normalizers.NFKC(), normalizers.Strip()]
        )
    return backend


def make_flags(source: random.Random, special: bool) -> dict[str, bool]:
    flags = {name: source.random() < 0.25 for name in FLAGS}
    return {**flags, "special": special}


def surround(backend: Tokenizer, source: random.Random) -> None:
    """A post-processor as Llama 3, BERT or nobody has it."""
    ids = {token: backend.token_to_id(token) for token in ("<s>", "</s>")}
    known = [(token, index) for token, index in ids.items() if index is not None]
    kind = source.choice(["none", "template", "sequence", "bytes"])
    if kind == "bytes":
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    elif kind != "none" and len(known) == 2:
        single = source.choice(["<s> $A", "<s> $A </s>", "$A </s>", "<s> <s> $A </s>"])
        template = processors.TemplateProcessing(single=single, special_tokens=known)
        whole = [processors.ByteLevel(trim_offsets=True), template]
        backend.post_processor = processors.Sequence(whole) if kind == "sequence" else template


def spelled(source: random.Random, text: str) -> Any:
    if source.random() < 0.6:
        return text
    flags = make_flags(source, source.random() < 0.7)
    return {"__type": "AddedToken", "content": text, **flags}


def write(folder: Path, source: random.Random) -> None:
    """Write a tokenizer's files; what they declare agrees or not, as the seed will have it."""
    backend = make_backend(source)
    for text in source.sample(SPECIAL, source.randint(0, 8)):
        special = source.random() < 0.6
        backend.add_tokens([AddedToken(text, **make_flags(source, special))])
    surround(backend, source)
    if source.random() < 0.1:
        backend.enable_padding(pad_token=source.choice(SPECIAL), length=7)
    if source.random() < 0.1:
        backend.enable_truncation(5)
    backend.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in source.sample(NAMES, source.randint(0, 4)):
        config[name] = spelled(source, source.choice(SPECIAL)) if source.random() < 0.9 else None
    if source.random() < 0.3:
        config["image_token"] = spelled(source, source.choice(SPECIAL))
    further = [spelled(source, text) for text in source.sample(SPECIAL, source.randint(0, 3))]
    where = source.choice(["", "additional_special_tokens", "extra_special_tokens", "named"])
    if where == "named":
        config["extra_special_tokens"] = {f"own{n}_token": t for n, t in enumerate(further)}
    elif where:
        config[where] = further
    for flag in ("add_bos_token", "add_eos_token"):
        if source.random() < 0.3:
            config[flag] = source.random() < 0.5
    for flag in ("split_special_tokens", "add_prefix_space", "legacy"):
        if source.random() < 0.1:
            config[flag] = source.random() < 0.5
    size = len(backend.get_vocab(with_added_tokens=True))
    if source.random() < 0.5:
        present = backend.get_added_tokens_decoder()
        declared = {
            str(index): {"content": token.content, **make_flags(source, token.special)}
            for index, token in present.items()
            if source.random() < 0.8
        }
        absent = [text for text in SPECIAL if backend.token_to_id(text) is None]
        for number, text in enumerate(
            source.sample(absent, min(len(absent), source.randint(0, 3)))
        ):
            special = source.random() < 0.5
            declared[str(size + number)] = {"content": text, **make_flags(source, special)}
        config["added_tokens_decoder"] = declared
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if source.random() < 0.5:
        names = source.sample(NAMES, source.randint(0, 4))
        named: dict[str, Any] = {name: source.choice(SPECIAL) for name in names}
        for name in names:
            if source.random() < 0.4:
                flags = {flag: source.random() < 0.25 for flag in FLAGS}
                named[name] = {"content": named[name], **flags}
        if source.random() < 0.5:
            key = source.choice(["additional_special_tokens", "extra_special_tokens"])
            named[key] = source.sample(SPECIAL, source.randint(0, 3))
        (folder / "special_tokens_map.json").write_text(json.dumps(named))
    if source.random() < 0.3:
        texts = source.sample(SPECIAL, source.randint(1, 3))
        ids = {text: backend.token_to_id(text) for text in texts}
        free = iter(range(size, size + 9))
        numbers = {text: next(free) if index is None else index for text, index in ids.items()}
        (folder / "added_tokens.json").write_text(json.dumps(numbers))


def make_texts(source: random.Random) -> list[str]:
    def piece() -> str:
        return source.choice(SPECIAL if source.random() < 0.5 else WORDS) + source.choice(GAPS)

    made = ["".join(piece() for _ in range(source.randint(1, 9))) for _ in range(TEXTS - 2)]
    return ["", " ", *made]


def compare(folder: Path, source: random.Random) -> int:
    """The number of texts that gave the same ids, texts and names."""
    peer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    ours = TokenizerFolder(folder).load()
    texts = make_texts(source)
    for text in texts:
        assert ours.encode(text) == peer(text, truncation=False, padding=False)["input_ids"], text
        bare = peer(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False) == bare, text
        for skip in (False, True):
            decoded = peer.decode(bare, skip_special_tokens=skip)
            assert ours.decode(bare, skip_special_tokens=skip) == decoded, text
    named = {
        name: token for name, token in peer.special_tokens_map.items() if isinstance(token, str)
    }
    assert ours.special_tokens == {name: str(token) for name, token in named.items()}
    assert ours.eos_token_id == peer.eos_token_id
    return len(texts)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_ids_texts_and_names_equal_transformers(batch: int, tmp_path: Path) -> None:
    compared = 0
    for number in range(EACH):
        seed = batch * EACH + number
        folder = tmp_path / str(seed)
        folder.mkdir()
        source = random.Random(seed)
        write(folder, source)
        compared += compare(folder, source)
    assert compared == EACH * TEXTS
