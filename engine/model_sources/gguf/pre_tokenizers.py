"""Pre-tokenizer regexes, keyed by llama.cpp's `tokenizer.ggml.pre`.

A GGUF file does not hold the rule, only its name in `tokenizer.ggml.pre`. Each rule here is the one
in the tokenizer.json of the models it is named after; llama.cpp reproduces the same
(src/llama-vocab.cpp), except for the normalisation that Qwen's own tokenizer does.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITALISED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_TAIL}"
_TEKKEN = rf"{_CAPITALISED}|{_CAPITALS}|\p{{N}}|{_PATH_TAIL}"
_GPT4O = rf"{_CAPITALISED}{_CONTRACTION}?|{_CAPITALS}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_PATH_TAIL}"


@dataclass(frozen=True)
class Splitting:
    """`patterns` are applied in turn, to the pieces that the one before left.

    Every match is a piece of its own, and so is what lies between two matches.
    """

    patterns: tuple[str, ...]
    # Unicode NFC before anything else.
    nfc: bool = False
    # A piece that is itself in the vocabulary is that token, whatever the merges would make of it.
    ignore_merges: bool = False
    # Whether a text starts with the BOS token, where the file does not say.
    add_bos: bool = False


_RULES = (
    (("gpt-2", "default", "phi-2", "olmo", "mpt", "jais", "exaone4"), Splitting((_GPT2,))),
    (
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        Splitting((r"\p{N}", _GPT2)),
    ),
    (
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"),
        Splitting((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    (("dbrx", "smaug-bpe"), Splitting((_LLAMA3,))),
    (("qwen2",), Splitting((_QWEN2,), nfc=True)),
    (("stablelm2", "deepseek-r1-qwen", "megrez"), Splitting((_QWEN2,))),
    (("tekken",), Splitting((_TEKKEN,), ignore_merges=True, add_bos=True)),
    (("gpt-4o",), Splitting((_GPT4O,))),
    (
        ("deepseek-coder",),
        Splitting(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
    ),
)
RULES = {name: rule for names, rule in _RULES for name in names}


def splitting(
    pre: str | None, architecture: str | None, tokens: Collection[str]
) -> Splitting | None:
    """The rule named `pre`, or None if the name is not known.

    Files from before the name existed have none, or "default"; the model tells which rule it is:
    every Qwen 2 and 3 has the one rule, and among Llamas only the third generation has a
    byte-level BPE with `<|begin_of_text|>` in its vocabulary.
    """
    if pre in (None, "default"):
        if architecture in ("qwen2", "qwen3"):
            return RULES["qwen2"]
        return RULES["llama-bpe" if "<|begin_of_text|>" in tokens else "gpt-2"]
    return RULES.get(pre)
