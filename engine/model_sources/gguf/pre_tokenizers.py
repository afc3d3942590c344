"""Pre-tokenizer regexes, keyed by llama.cpp's `tokenizer.ggml.pre`.

A GGUF file does not hold the rule, only its name in `tokenizer.ggml.pre`. Each rule here is the one
in the tokenizer.json of the models it is named after; llama.cpp reproduces the same
(src/llama-vocab.cpp), except for the normalisation that Qwen's own tokenizer does.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_TAIL = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_PATH_TAIL = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITALISED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_HAN_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"
_FINNISH = r" ?[^(\s|.,!?…。，、।۔،)]+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_TEKKEN = rf"{_CAPITALISED}|{_CAPITALS}|\p{{N}}|{_PATH_TAIL}"
_GPT4O = rf"{_CAPITALISED}{_CONTRACTION}?|{_CAPITALS}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_PATH_TAIL}"
_DEEPSEEK3 = (
    rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+|"
    rf" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED_CODER = rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_JAIS2_SPACES = "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4))
_JAIS2 = (
    rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
    rf"{_JAIS2_SPACES}\s{{1,2}}(?!\S)|\s{{1}}"
)
_EXAONE_MOE = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


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


UNNAMED = Splitting(_DEFAULT)
_RULES: tuple[tuple[tuple[str, ...], Splitting], ...] = (
    (
        (
            *("gpt-2", "phi-2", "olmo", "mpt", "jais", "exaone4", "a.x-4.0", "gigachat", "mellum"),
            *("modern-bert", "trillion", "granite-docling", "jina-es", "jina-de"),
            *("jina-v2-es", "jina-v2-de"),
        ),
        Splitting((_GPT2,)),
    ),
    (
        (
            *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
            "mellum2",
        ),
        Splitting((r"\p{N}", _GPT2)),
    ),
    (
        (
            *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
            *("lfm2", "jina-v5-nano"),
        ),
        Splitting((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    (("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), Splitting((_LLAMA3,))),
    (("minicpm5",), Splitting((r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+")), ignore_merges=True)),
    (("jais-2",), Splitting((_JAIS2,))),
    (("qwen2",), Splitting((_QWEN2,), nfc=True)),
    (("qwen35",), Splitting((_QWEN35,), nfc=True)),
    (
        (
            *("stablelm2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2", "hunyuan", "grok-2"),
            "solar-open",
        ),
        Splitting((_QWEN2,)),
    ),
    (("laguna",), Splitting((r"[^\n]+|[\n]+", _QWEN2))),
    (("tekken",), Splitting((_TEKKEN,), ignore_merges=True, add_bos=True)),
    (("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), Splitting((_GPT4O,))),
    (
        ("deepseek-coder",),
        Splitting(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")),
    ),
    (
        ("deepseek-v3", "hunyuan-dense", "joyai-llm"),
        Splitting((r"\p{N}{1,3}", _HAN_KANA, _DEEPSEEK3)),
    ),
    (("falcon",), Splitting((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    (("poro-chat", "bloom", "gpt3-finnish"), Splitting((_FINNISH,))),
    (("viking",), Splitting((_FINNISH, r"\p{N}"))),
    (("bailingmoe", "bailingmoe2", "llada-moe"), Splitting((_BAILING,))),
    (("seed-coder",), Splitting((_SEED_CODER,))),
    (("exaone-moe",), Splitting((_EXAONE_MOE,))),
)
RULES = {name: rule for names, rule in _RULES for name in names}
_QWEN2_ARCHITECTURES = ("qwen2", "qwen2moe", "qwen3", "qwen3moe", "qwen3next")
_QWEN35_ARCHITECTURES = ("qwen35", "qwen35moe")


def splitting(
    pre: str | None, architecture: str | None, tokens: Collection[str]
) -> Splitting | None:
    """The rule named `pre`, or None if the name is not known.

    Files from before the name existed have none, or "default"; the model tells which rule it is:
    every Qwen of a generation has the one rule, among Llamas only the third generation has a
    byte-level BPE with `<|begin_of_text|>`, and the vocabularies of SmolLM and StarCoder share
    `<gh_stars>`. Of others nothing is known, and llama.cpp's own rule for them is taken.
    """
    if pre not in (None, "", "default"):
        return RULES.get(pre)
    if architecture in _QWEN2_ARCHITECTURES:
        return RULES["qwen2"]
    if architecture in _QWEN35_ARCHITECTURES:
        return RULES["qwen35"]
    if "<|begin_of_text|>" in tokens:
        return RULES["llama-bpe"]
    return RULES["smollm"] if "<gh_stars>" in tokens else UNNAMED


def words(rule: Splitting, add_prefix_space: bool = False) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that cuts text by `rule` and writes it in the byte alphabet."""
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns
    ]
    if add_prefix_space:  # before the first piece is cut off, as for a lone ByteLevel
        steps.insert(0, pre_tokenizers.Metaspace(" ", prepend_scheme="always", split=False))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)
