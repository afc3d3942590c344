"""Rebuild a `tokenizers` tokenizer from the metadata of a GGUF file.

`tokenizer.ggml.model` is "gpt2" for a byte-level BPE, which has merges, or "llama" for a
SentencePiece BPE, which has scores. SentencePiece always joins the neighbours whose union has the
best score, so a list of merges sorted by that score does the same. "rwkv" takes the longest token.

Tokens of the type CONTROL become special tokens; those of the type USER_DEFINED are matched whole
in a text as well, but are ordinary text otherwise. A token that the file names as BOS, EOS or
padding is special only if its type does not call it ordinary: converters take these ids from
config.json, where they may point at a quotation mark.

As in llama.cpp, a SentencePiece tokenizer puts a space before every piece of text between special
tokens, also before one that begins with a space.

Where the metadata does not tell how text is cut up, a tokenizer.json can stand in: the one in
`tokenizer.huggingface.json`, or one that lies beside the file, if its tokens are those of the file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
)

from engine.errors import CheckpointError, ConfigError, listing
from engine.model_sources.gguf.longest_match import (
    MOST_TOKENS,
    longest_match,
    unescaped,
)
from engine.model_sources.gguf.pre_tokenizers import RULES, UNNAMED, splitting, words
from engine.model_sources.gguf.stand_in import stand_in

log = logging.getLogger(__name__)

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
# What a file writes for an id it does not have.
_NO_ID = (-1, 2**32 - 1)
# Tokens that end a turn or a document in the models that have them. A file often names only one as
# its end of sequence; llama.cpp stops at all of them.
_STOPS = frozenset(
    (
        "<|im_end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<end_of_turn>",
        "<|end_of_turn|>",
        "<｜end▁of▁sentence｜>",
    )
)


@dataclass(frozen=True)
class GGUFTokenizer:
    """`json` is a tokenizer.json; the other two are the dicts of the files they are named after."""

    json: str
    config: dict[str, Any]
    generation_config: dict[str, Any]

    def files(self, chat_template: str | None) -> dict[str, bytes]:
        """Name -> content of the files that a Hugging Face directory has for this tokenizer."""
        config = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        files = {"tokenizer.json": self.json.encode(), "tokenizer_config.json": config.encode()}
        if chat_template is not None:
            files["chat_template.jinja"] = chat_template.encode()
        return files


def build_tokenizer(
    metadata: Mapping[str, Any], vocab_size: int, source: str, beside: Path | None = None
) -> GGUFTokenizer | None:
    """The tokenizer that `metadata` describes, or None where the file has none.

    `vocab_size` is the number of rows of the embedding, which bounds every id; `beside` is where a
    tokenizer.json may lie. Raises `ConfigError` for a kind of tokenizer that is not known and that
    no tokenizer.json stands in for, and `CheckpointError` for a damaged vocabulary.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    vocabulary = _TokenTable(metadata, vocab_size, source)
    try:
        tokenizer, add_bos = _known_kind(kind, vocabulary)
    except ConfigError:
        other = stand_in(vocabulary.tokens, metadata, beside)
        if other is None:
            raise
        tokenizer, add_bos = other, False
    for special in (True, False):
        tokenizer.add_tokens(vocabulary.added_tokens(special))
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    if tokenizer.post_processor is None or "tokenizer.ggml.add_bos_token" in metadata:
        _set_template(tokenizer, vocabulary, add_bos, add_eos)
    config = {"add_bos_token": add_bos, "add_eos_token": add_eos, **vocabulary.config()}
    return GGUFTokenizer(tokenizer.to_str(), config, vocabulary.generation_config())


def _known_kind(kind: Any, vocabulary: _TokenTable) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether a text starts with BOS unless the file says otherwise."""
    if kind == "gpt2":
        return _byte_level(vocabulary)
    if kind == "llama":
        return _sentencepiece(vocabulary), True
    if kind == "rwkv":
        return _longest_match(vocabulary), False
    raise ConfigError(
        f"{vocabulary.source}: its tokenizer is of the kind {kind!r}; 'gpt2', 'llama' "
        "and 'rwkv' are known. Put the model's tokenizer.json beside the file."
    )


class _TokenTable:
    """Tokens, their types and the special ids of the metadata, checked."""

    def __init__(self, metadata: Mapping[str, Any], vocab_size: int, source: str) -> None:
        self.metadata = metadata
        self.source = source
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not 1 <= len(tokens) <= vocab_size:
            count = len(tokens) if isinstance(tokens, list) else "no"
            raise CheckpointError(
                f"{source}: its tokenizer has {count} tokens, its embedding {vocab_size} rows; "
                "expected at least one token and at most as many as rows."
            )
        if metadata.get("tokenizer.ggml.model") == "rwkv":
            tokens = unescaped(tokens) or tokens
        self.tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
        self.types = self.array("token_type", _NORMAL)
        self._typed = "tokenizer.ggml.token_type" in metadata
        self.ids = {
            name: self._special_id(key)
            for name, key in (
                ("bos_token", "bos"),
                ("eos_token", "eos"),
                ("unk_token", "unknown"),
                ("pad_token", "padding"),
            )
        }

    def array(self, key: str, default: float) -> np.ndarray[Any, Any]:
        """The array of one number per token under `key`."""
        values = self.metadata.get(f"tokenizer.ggml.{key}", np.full(len(self.tokens), default))
        if not isinstance(values, np.ndarray) or len(values) != len(self.tokens):
            raise CheckpointError(
                f"{self.source}: tokenizer.ggml.{key} does not hold one number for each of the "
                f"{len(self.tokens)} tokens."
            )
        return values

    def merges(self, vocab: Mapping[str, int]) -> list[tuple[str, str]] | None:
        """The merges of the file, each checked to join two tokens into a third, or None."""
        lines = self.metadata.get("tokenizer.ggml.merges")
        if lines is None:
            return None
        pairs = [tuple(str(line).split(" ")) for line in lines]
        bad = [
            line
            for line, pair in zip(lines, pairs, strict=True)
            if len(pair) != 2 or not (vocab.keys() >= {*pair, "".join(pair)})
        ]
        if bad:
            raise CheckpointError(
                f"{self.source}: {len(bad)} merges do not join two tokens of the vocabulary into "
                f"a third: {listing(repr(line) for line in bad)}."
            )
        return [(pair[0], pair[1]) for pair in pairs]

    def mapping(self, spellings: list[str]) -> dict[str, int]:
        """Spelling -> id; two tokens that are spelled alike are an error."""
        vocab = {spelling: number for number, spelling in enumerate(spellings)}
        if len(vocab) != len(spellings):
            twice = [text for number, text in enumerate(spellings) if vocab[text] != number]
            raise CheckpointError(
                f"{self.source}: {len(twice)} tokens of its vocabulary stand there twice: "
                f"{listing(repr(text) for text in twice)}."
            )
        return vocab

    def added_tokens(self, special: bool) -> list[AddedToken]:
        """The tokens to match whole in a text: control tokens if `special`, else user-defined."""
        return [
            AddedToken(text, normalized=False, special=special)
            for number, text in enumerate(self.tokens)
            if (
                self._is_special(number)
                if special
                else self.types[number] == _USER_DEFINED and not self._is_special(number)
            )
        ]

    def _is_special(self, number: int) -> bool:
        """Whether the file says so, by type or, if the type does not call it ordinary, by name."""
        kind = self.types[number]
        if kind in (_CONTROL, _UNKNOWN) or self.tokens[number] in _STOPS:
            return True
        ordinary = self._typed and kind in (_NORMAL, _UNUSED, _BYTE)
        return not ordinary and number in self.ids.values()

    def config(self) -> dict[str, Any]:
        """What tokenizer_config.json holds in addition to the flags for BOS and EOS."""
        architecture = self.metadata.get("general.architecture")
        named = {
            name: self.tokens[number]
            for name, number in self.ids.items()
            if number is not None and self._is_special(number)
        }
        length = self.metadata.get(f"{architecture}.context_length")
        return {
            "clean_up_tokenization_spaces": False,
            "model_max_length": length,
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
        }

    def generation_config(self) -> dict[str, Any]:
        """The ids that start, pad and end a text; ends are those named and those known by text."""
        named = [self.ids["eos_token"], self._special_id("eot"), self._special_id("eom")]
        known = [number for number, text in enumerate(self.tokens) if text in _STOPS]
        stops = list(dict.fromkeys(number for number in (*named, *known) if number is not None))
        result: dict[str, Any] = {"eos_token_id": stops} if stops else {}
        for name in ("bos", "pad"):
            if self.ids[f"{name}_token"] is not None:
                result[f"{name}_token_id"] = self.ids[f"{name}_token"]
        return result

    def _special_id(self, key: str) -> int | None:
        number = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is None or number in _NO_ID:
            return None
        if not isinstance(number, int) or not 0 <= number < len(self.tokens):
            raise CheckpointError(
                f"{self.source}: tokenizer.ggml.{key}_token_id is {number}, and the vocabulary has "
                f"{len(self.tokens)} tokens."
            )
        return number


def _longest_match(vocabulary: _TokenTable) -> Tokenizer:
    """The tokenizer that takes the longest token at every position."""
    unknown = vocabulary.ids["unk_token"]
    readable = unescaped(vocabulary.metadata["tokenizer.ggml.tokens"])
    if readable is None or unknown is None or len(vocabulary.tokens) > MOST_TOKENS:
        raise ConfigError(
            f"{vocabulary.source}: its tokenizer takes the longest of {len(vocabulary.tokens)} "
            f"tokens; up to {MOST_TOKENS} that are text are read, with one for what is unknown. "
            "Put the model's tokenizer.json beside the file."
        )
    vocabulary.mapping(vocabulary.tokens)
    return longest_match(vocabulary.tokens, vocabulary.tokens[unknown])


def _byte_level(vocabulary: _TokenTable) -> tuple[Tokenizer, bool]:
    """A byte-level BPE, and whether a text starts with BOS unless the file says otherwise."""
    pre = vocabulary.metadata.get("tokenizer.ggml.pre")
    architecture = vocabulary.metadata.get("general.architecture")
    rule = splitting(pre, architecture, vocabulary.tokens)
    if rule is None:
        raise ConfigError(
            f"{vocabulary.source}: its pre-tokenizer is {pre!r}, which is not known; "
            f"known are {', '.join(sorted(RULES))}. Put the model's tokenizer.json beside the "
            "file, or use its Hugging Face directory."
        )
    if rule is UNNAMED:
        log.warning(
            "%s: the file does not name its pre-tokenizer, and nothing else tells it; llama.cpp's "
            "default is used, which may not be what the model was trained with.",
            vocabulary.source,
        )
    vocab = vocabulary.mapping(_spellings(vocabulary))
    merges = vocabulary.merges(vocab)
    if merges is None:
        raise CheckpointError(f"{vocabulary.source}: its byte-level BPE tokenizer has no merges.")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=rule.ignore_merges))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = words(rule)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.add_bos


def _spellings(vocabulary: _TokenTable) -> list[str]:
    """The tokens in the byte alphabet; tokens that are matched whole keep their own letters."""
    letters = _byte_letters()
    alphabet = set(letters)
    return [
        text
        if set(text) <= alphabet or vocabulary.types[number] != _NORMAL
        else "".join(letters[byte] for byte in text.encode())
        for number, text in enumerate(vocabulary.tokens)
    ]


def _byte_letters() -> list[str]:
    """The printable letter that GPT-2's byte-level BPE writes for each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _sentencepiece(vocabulary: _TokenTable) -> Tokenizer:
    vocab = vocabulary.mapping(vocabulary.tokens)
    merges = vocabulary.merges(vocab)
    if merges is None:
        merges = _merges_by_score(vocabulary, vocab)
    unknown = vocabulary.ids["unk_token"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            merges,
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(vocabulary.metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if prefix:
        spaces.insert(0, normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_by_score(vocabulary: _TokenTable, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a third, the best score first.

    Ties go to the longer left part, then to the longer right part, then to the lower ids.
    """
    scores = vocabulary.array("scores", 0.0)
    made = (_NORMAL, _USER_DEFINED, _UNUSED)
    merges = [
        (-float(scores[number]), -cut, cut - len(text), vocab[text[:cut]], vocab[text[cut:]], text)
        for text, number in vocab.items()
        if vocabulary.types[number] in made
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    return [(text[:-left], text[-left:]) for _, left, _, _, _, text in sorted(merges)]


def _set_template(
    tokenizer: Tokenizer, vocabulary: _TokenTable, add_bos: bool, add_eos: bool
) -> None:
    """Let the tokenizer put BOS before a text and EOS behind it, where that is asked for."""
    bos, eos = vocabulary.ids["bos_token"], vocabulary.ids["eos_token"]
    before = [vocabulary.tokens[bos]] if add_bos and bos is not None else []
    behind = [vocabulary.tokens[eos]] if add_eos and eos is not None else []
    if not before and not behind:
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[
            *before,
            "$A",
            *behind,
            *(f"{token}:1" for token in before),
            "$B:1",
            *(f"{token}:1" for token in behind),
        ],
        special_tokens=[(token, vocabulary.tokens.index(token)) for token in {*before, *behind}],
    )
