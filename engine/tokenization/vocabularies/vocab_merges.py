"""Build a byte-level BPE from `vocab.json` and `merges.txt`.

The two files hold vocabulary and merges, and not how text is cut into words before: that is the
rule of a tokenizer class in transformers, so the class named in tokenizer_config.json decides, or
else the kind of model. SmolLM's and StarCoder's vocabularies name the class of GPT-2 but cut digits
apart, by the tokenizer.json that they are published with; they are told by a token of theirs.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from engine.errors import CheckpointError, listing
from engine.model_sources.gguf.pre_tokenizers import RULES, words
from engine.storage.strict_json import parse_object
from engine.tokenization.vocabularies.switches import switch

log = logging.getLogger(__name__)

_END = "<|endoftext|>"
_OF_CLASS = {"Qwen2Tokenizer": "qwen2", "Qwen3_5Tokenizer": "qwen35", "GPT2Tokenizer": "gpt-2"}
_OF_MODEL = {
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen2",
    "qwen3_next": "qwen2",
    "qwen3_5": "qwen35",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe": "qwen35",
    "qwen3_5_moe_text": "qwen35",
    "gpt2": "gpt-2",
}
_DIGITS_APART = "<gh_stars>"


@dataclass(frozen=True)
class VocabMergesTokenizer:
    """A tokenizer, and the special tokens that its class names where the configuration does not."""

    backend: Tokenizer
    special_tokens: dict[str, str]


def load_vocab_merges(
    files: Mapping[str, bytes], config: Mapping[str, Any], model_type: str | None, where: str
) -> VocabMergesTokenizer:
    """Build the tokenizer of the two files.

    Args:
        files: name -> content; `vocab.json` and `merges.txt` must be there.
        config: tokenizer_config.json (`tokenizer_class` and `add_prefix_space` are used here).
        model_type: of config.json, where known.
        where: what errors call the model.

    Raises:
        CheckpointError: a file is damaged, or nothing tells how text is cut into words.
    """
    vocabulary = _vocabulary(files["vocab.json"], where)
    merges = _merges(files["merges.txt"], vocabulary, where)
    name = _rule_name(config, model_type, vocabulary)
    if name is None:
        raise CheckpointError(
            f"{where}: vocab.json and merges.txt do not say how text is cut into words, and "
            f"neither does the tokenizer class {config.get('tokenizer_class')!r} nor the model "
            f"type {model_type!r}; known are {', '.join(_OF_CLASS)}. Add the model's "
            "tokenizer.json."
        )
    if name == "smollm":
        log.warning(
            "%s: digits are cut apart, as in the tokenizer.json of SmolLM and StarCoder; "
            "transformers goes by the class GPT2Tokenizer here, and would not do it.",
            where,
        )
    rule = RULES[name]
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = words(rule, switch(config, "add_prefix_space"))
    tokenizer.decoder = decoders.ByteLevel()
    names = ("unk", "eos", "bos" if name in ("gpt-2", "smollm") else "pad")
    return VocabMergesTokenizer(tokenizer, {f"{key}_token": _END for key in names})


def _rule_name(
    config: Mapping[str, Any], model_type: str | None, vocabulary: Mapping[str, int]
) -> str | None:
    given = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    name = _OF_CLASS.get(given) or _OF_MODEL.get(model_type or "")
    return "smollm" if name == "gpt-2" and _DIGITS_APART in vocabulary else name


def _vocabulary(content: bytes, where: str) -> dict[str, int]:
    vocabulary = parse_object(content, f"{where}: vocab.json")
    bad = [text for text, index in vocabulary.items() if type(index) is not int or index < 0]
    if bad or len(set(vocabulary.values())) != len(vocabulary):
        raise CheckpointError(
            f"{where}: vocab.json does not give every token an id of its own"
            f"{f' ({listing(map(repr, bad))})' if bad else ''}. Fetch it again."
        )
    return vocabulary


def _merges(content: bytes, vocabulary: Mapping[str, int], where: str) -> list[tuple[str, str]]:
    """The pairs of merges.txt, whose first line may name a version."""
    lines = content.decode(errors="replace").split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    pairs = [tuple(line.split(" ")) for line in (line.rstrip("\r") for line in lines) if line]
    bad = [
        " ".join(pair)
        for pair in pairs
        if len(pair) != 2 or not vocabulary.keys() >= {*pair, "".join(pair)}
    ]
    if bad:
        raise CheckpointError(
            f"{where}: {len(bad)} lines of merges.txt do not join two tokens of vocab.json into a "
            f"third: {listing(map(repr, bad))}. Fetch both files again, from one revision."
        )
    return [(pair[0], pair[1]) for pair in pairs]
