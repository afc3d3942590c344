"""Mistral's own pre-tokenizer in place of one that was published by mistake."""

from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from engine.model_sources.gguf.pre_tokenizers import RULES

_MODELS = ("mistral", "mistral3", "voxtral", "ministral", "pixtral")
_SMALLEST = 100_000
_FIXED_SINCE = 5


def fix_mistral_words(backend: Tokenizer, raw_config: Mapping[str, Any]) -> None:
    """What transformers does where tokenizer_config.json says `fix_mistral_regex: true`.

    Some tokenizer.json of Mistral's models with the Tekken vocabulary were converted with the rule
    of Llama 3. Files saved by transformers 5 are not touched.
    """
    version = str(raw_config.get("transformers_version") or "0").partition(".")[0]
    fixed = version.isascii() and version[:9].isdecimal() and int(version[:9]) >= _FIXED_SINCE
    others = raw_config.get("model_type") not in (None, *_MODELS)
    if fixed or others or backend.get_vocab_size() <= _SMALLEST or backend.pre_tokenizer is None:
        return
    (pattern,) = RULES["tekken"].patterns
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    present = backend.pre_tokenizer
    if isinstance(present, pre_tokenizers.Sequence):
        present[0] = split
        backend.pre_tokenizer = present
        return
    if isinstance(present, pre_tokenizers.Metaspace):
        present = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, present])
