"""The tokenizer of a model as the metadata of a GGUF file.

llama.cpp has tokenizers of its own, which a file chooses by name: "gpt2" is a byte-level BPE whose
rule for cutting a text is named in `tokenizer.ggml.pre`, "llama" a SentencePiece BPE, and "rwkv"
takes the longest token at every position. The name of the rule is found by trying all that are
known on awkward texts.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer as Backend

from engine.errors import ConfigError
from engine.model_sources.gguf.longest_match import escaped, is_longest_match
from engine.model_sources.gguf.pre_tokenizers import RULES, words
from engine.model_sources.interface.model_source import ModelDescription
from engine.model_sources.interface.stops import GENERATION_CONFIG, listed_stops
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_PREFERRED = ("llama-bpe", "qwen2", "qwen35", "smollm", "gpt-2", "tekken", "gpt-4o")
_PROBE = (
    "Hello world's DON'T we'LL 3 33 333 3333 1234567 x_1\n\n \n\t  tabs   and  spaces \r\n "
    "ÀÉ naïve e\u0301 日本語とかな 한국어 русский 🚀🇫🇮 👩\u200d💻 $€¥ ... ?! (a)[b]{c} "
    "http://a.b/c?d=e#f #include <x> a+=b; //--==>> 'quoted' “quoted” İI ŉ ﬁ ٣٤٥ १२३\u00a0end  "
)


def vocabulary(source: ModelDescription) -> dict[str, Any]:
    """Key -> value of everything under `tokenizer.`, and nothing for a model without tokenizer.

    Raises `ConfigError` for a tokenizer that llama.cpp has no counterpart of.
    """
    if source.tokenizer_json() is None and source.tokenizer_model() is None:
        return {}
    tokenizer = load_tokenizer(source)
    backend = Backend.from_str(tokenizer.serialised())
    state = json.loads(tokenizer.serialised())
    model = state["model"]
    if is_longest_match(state):
        return _by_longest_match(source, tokenizer, state, backend)
    if model.get("type") != "BPE":
        raise ConfigError(
            f"{source.path}: its tokenizer is a {model.get('type')}; llama.cpp's are BPE, with "
            "bytes (gpt2) or SentencePiece's rules (llama), or take the longest match (rwkv)."
        )
    rows = source.config.vocab_size
    tokens, types = _tokens(state, backend, rows)
    keys: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": types}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        keys |= {"ggml.model": "llama", "ggml.pre": "default"}
        keys["ggml.scores"] = _scores(tokens, merges)
        keys["ggml.add_space_prefix"] = "Prepend" in json.dumps(state["normalizer"]) or (
            '"prepend_scheme": "first"' in json.dumps(state["pre_tokenizer"])
            or '"prepend_scheme": "always"' in json.dumps(state["pre_tokenizer"])
        )
    else:
        keys |= {"ggml.model": "gpt2", "ggml.pre": rule_name(backend, source)}
        if not merges:
            raise ConfigError(
                f"{source.path}: its byte-level tokenizer has no merges, and llama.cpp reads no "
                "such vocabulary."
            )
        keys["ggml.merges"] = merges
    return keys | _special(source, tokenizer)


def _by_longest_match(
    source: ModelDescription, tokenizer: Tokenizer, state: dict[str, Any], backend: Backend
) -> dict[str, Any]:
    """The keys of a tokenizer that takes the longest token at every position."""
    tokens, types = _tokens(state, backend, source.config.vocab_size)
    matched = (_CONTROL, _UNKNOWN, _USER_DEFINED)  # these are compared as they stand
    spelled = [t if kind in matched else escaped(t) for t, kind in zip(tokens, types, strict=True)]
    keys = {"ggml.model": "rwkv", "ggml.pre": "default", "ggml.token_type": types}
    return keys | {"ggml.tokens": spelled} | _special(source, tokenizer)


def _tokens(state: dict[str, Any], backend: Backend, rows: int) -> tuple[list[str], list[int]]:
    """Spelling and type of every id below the rows of the embedding."""
    added = {token["id"]: token for token in state["added_tokens"]}
    spelled = {number: text for text, number in backend.get_vocab(True).items()}
    unknown = state["model"].get("unk_token")
    tokens, types = [], []
    for number in range(rows):
        text = spelled.get(number)
        if text is None:
            tokens.append(f"[PAD{number}]")
            types.append(_UNUSED)
            continue
        tokens.append(text)
        if text == unknown:
            types.append(_UNKNOWN)
        elif number in added:
            types.append(_CONTROL if added[number]["special"] else _USER_DEFINED)
        elif state["model"].get("byte_fallback") and text.startswith("<0x") and len(text) == 6:
            types.append(_BYTE)
        else:
            types.append(_NORMAL)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """A score per token: the earlier its first merge, the higher, as SentencePiece joins them."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), number)
    worst = len(merges)
    return [float(-rank.get(token, worst)) for token in tokens]


def rule_name(backend: Backend, source: ModelDescription) -> str:
    """The name of the rule that cuts a text as this tokenizer does. Raises `ConfigError`."""
    if backend.pre_tokenizer is None:
        raise ConfigError(f"{source.path}: its tokenizer does not cut texts into words.")
    wanted = backend.pre_tokenizer.pre_tokenize_str(_PROBE)
    nfc = backend.normalizer is not None and "NFC" in str(backend.normalizer)
    ignores = bool(json.loads(backend.to_str())["model"].get("ignore_merges"))
    names = (*_PREFERRED, *(name for name in RULES if name not in _PREFERRED))
    matching = [name for name in names if words(RULES[name]).pre_tokenize_str(_PROBE) == wanted]
    exact = [
        name for name in matching
        if (RULES[name].nfc, RULES[name].ignore_merges) == (nfc, ignores)
    ]  # fmt: skip
    for name in exact + [name for name in matching if RULES[name].ignore_merges == ignores]:
        return name
    raise ConfigError(
        f"{source.path}: llama.cpp has no rule that cuts a text into words as this model's "
        "tokenizer does. Its adapter can still be exported for the base model's own GGUF file: "
        "engine export gguf --adapter."
    )


def _special(source: ModelDescription, tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids that begin and end a text or a turn, whether they are added, and the chat template."""
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "padding": tokenizer.pad_token_id,
    }
    keys = {f"ggml.{name}_token_id": number for name, number in ids.items() if number is not None}
    stops = listed_stops(source.generation_config, source.path / GENERATION_CONFIG)
    others = [number for number in stops if number != ids["eos"]]
    if others:
        keys["ggml.eot_token_id"] = others[0]
    unknown = tokenizer.special_tokens.get("unk_token")
    number = None if unknown is None else tokenizer.token_to_id(unknown)
    if number is not None:
        keys["ggml.unknown_token_id"] = number
    keys["ggml.add_bos_token"] = ids["bos"] in tokenizer.prefix_ids
    keys["ggml.add_eos_token"] = ids["eos"] in tokenizer.suffix_ids
    template = source.chat_template()
    return keys if template is None else keys | {"chat_template": template}
