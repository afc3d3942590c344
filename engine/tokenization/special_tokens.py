"""Read special and added tokens from all files of a tokenizer.

Five places declare tokens, and they contradict each other in published models: `added_tokens` in
tokenizer.json, `added_tokens_decoder` and the named tokens in tokenizer_config.json,
special_tokens_map.json, and added_tokens.json. The order is that of transformers 5:

- With an `added_tokens_decoder`, special_tokens_map.json and added_tokens.json are not read.
  Without one, the former wins over tokenizer_config.json.
- A token that is declared again gets the flags of the last declaration: `added_tokens_decoder`
  over tokenizer.json, tokenizer.json over added_tokens.json.
- A named token keeps the flags it was declared with. One that was never declared is special and
  matched in the text as it stands.
- `additional_special_tokens` is the older name of `extra_special_tokens`, which may be a list of
  tokens or a mapping of names.
- An id that is declared for a token the vocabulary lacks must be the one it gets; transformers
  gives it the next free one in silence, which no trained embedding row belongs to.

transformers 4.57 differs in four points, in which release 5 is followed because published
tokenizers are written for it: names that a model gives to its own tokens (`image_token`) make
them special only in release 5; a list of `extra_special_tokens` is an error in release 4; a token
listed as special and declared as ordinary is hidden by `skip_special_tokens` only in release 4;
and release 4 replaces `add_prefix_space` of a lone ByteLevel pre-tokenizer by the value in
tokenizer_config.json, false where there is none. In one point release 4 is followed: a
tokenizer.json is used as it is written, where release 5 rebuilds those of some classes
(`LlamaTokenizer`, `GPT2Tokenizer`, `Qwen2Tokenizer`) by the class's own rules, so that a digit
rule or a normalizer of the file is lost.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from engine.errors import CheckpointError
from engine.storage.strict_json import parse_object
from engine.tokenization.vocabularies.limits import refuse_long
from engine.tokenization.vocabularies.switches import switch

log = logging.getLogger(__name__)

NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass
class DeclaredTokens:
    """What the files of a tokenizer say about its tokens.

    Attributes:
        added: id -> token, of all files that give ids.
        named: name such as `bos_token` -> token, in transformers' order.
        extra: further special tokens, without names.
        splits_special: special tokens in a text are cut up like any other text.
    """

    added: dict[int, AddedToken] = field(default_factory=dict)
    named: dict[str, AddedToken] = field(default_factory=dict)
    extra: list[AddedToken] = field(default_factory=list)
    splits_special: bool = False

    @property
    def names(self) -> dict[str, str]:
        """Name -> text of the named special tokens."""
        return {name: token.content for name, token in self.named.items()}


def read_declared(
    config: Mapping[str, Any], files: Mapping[str, bytes], backend: Backend, where: str
) -> DeclaredTokens:
    """The tokens of a model's files.

    Args:
        config: tokenizer_config.json.
        files: name -> content; special_tokens_map.json and added_tokens.json are used.
        backend: the tokenizer as its vocabulary file gives it, with the tokens added there.
        where: what errors call the model.

    Raises:
        CheckpointError: a file declares something that is no token.
    """
    try:
        return _read_declared(config, files, backend)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _read_declared(
    config: Mapping[str, Any], files: Mapping[str, bytes], backend: Backend
) -> DeclaredTokens:
    settings = dict(config)
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings["additional_special_tokens"]
    result = DeclaredTokens(splits_special=switch(settings, "split_special_tokens"))
    named = {key: value for key, value in settings.items() if _is_own_name(key, value)}
    further = settings.get("extra_special_tokens")
    if isinstance(further, dict):
        named |= further
        settings["extra_special_tokens"] = settings.get("additional_special_tokens")
        if settings["extra_special_tokens"] is None:
            del settings["extra_special_tokens"]
    if settings.get("added_tokens_decoder") is not None:
        for key, entry in _object(settings["added_tokens_decoder"]).items():
            where = f"added_tokens_decoder, entry {key}"
            result.added[_index(key, where)] = _token(entry, where)
    else:
        overruling = _read_json(files, "special_tokens_map.json")
        named |= _merge_map(settings, overruling)
        special = _texts(settings)
        for text, index in _read_json(files, "added_tokens.json").items():
            hidden = text in special
            number = _index(index, f"{text!r} in added_tokens.json")
            result.added[number] = AddedToken(text, normalized=not hidden, special=hidden)
        result.added |= backend.get_added_tokens_decoder()
        older = overruling.get("additional_special_tokens")
        if "extra_special_tokens" not in settings and isinstance(older, list):
            settings["extra_special_tokens"] = older
    if backend.padding is not None:
        settings.setdefault("pad_token", backend.padding["pad_token"])
    _set_names(settings, named, result)
    return result


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(
            f"the tokenizer's files hold a {type(value).__name__} as added_tokens_decoder; "
            "expected an object that names tokens by their ids"
        )
    return value


def _index(value: Any, where: str) -> int:
    """The id of a token, a number or its digits."""
    digits = str(value)
    if isinstance(value, bool) or not (digits.isascii() and digits.isdecimal()):
        raise CheckpointError(
            f"the tokenizer's files give {digits[:80]!r} as the id of {where[:120]}; expected a "
            "whole number. Fetch the tokenizer's files again."
        )
    return int(digits)


def matched_as_written(declared: DeclaredTokens, backend: Backend) -> DeclaredTokens:
    """`declared`, matched in the text as it stands, as SentencePiece tokenizers of old did it.

    Their normalizer puts a space before every text, a token's own included, which would then only
    be recognised behind a space. Only those that `backend` itself matches in normalised text, the
    user-defined pieces of its vocabulary file, stay so.
    """
    present = backend.get_added_tokens_decoder().values()
    normalised = {token.content for token in present if token.normalized}

    def raw(token: AddedToken) -> AddedToken:
        flags = {flag: getattr(token, flag) for flag in _FLAGS}
        return AddedToken(token.content, **{**flags, "normalized": token.content in normalised})

    return DeclaredTokens(
        {index: raw(token) for index, token in declared.added.items()},
        {name: raw(token) for name, token in declared.named.items()},
        [raw(token) for token in declared.extra],
        declared.splits_special,
    )


def add_declared(backend: Backend, declared: DeclaredTokens, where: str) -> None:
    """Give `backend` the declared tokens and flags; `where` names the model in errors.

    Raises:
        CheckpointError: a token that the vocabulary lacks would not get its declared id.
    """
    vocabulary = backend.get_vocab(with_added_tokens=True)
    ordered = [declared.added[index] for index in sorted(declared.added)]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    known |= {token.content for token in ordered}
    names = set(declared.names.values())
    # Of two spellings of one token both are given: the flags of the later one hold.
    for group in (declared.named.values(), declared.extra):
        further = {repr(token): token for token in group if token.content not in known}
        ordered += further.values()
    for token in ordered:
        token.special = token.special or token.content in names
    refuse_long((token.content for token in ordered), where)
    backend.add_tokens([token for token in ordered if token.content])
    backend.encode_special_tokens = declared.splits_special
    _check_ids(backend, declared, vocabulary, where)


def _check_ids(
    backend: Backend, declared: DeclaredTokens, before: Mapping[str, int], where: str
) -> None:
    others = 0
    seen = set()
    for index in sorted(declared.added):
        text = declared.added[index].content
        got = backend.token_to_id(text)
        if got == index or text in seen or not text:
            continue
        seen.add(text)
        if text in before:
            others += 1
            continue
        raise CheckpointError(
            f"{where}: the token {text!r} is declared with the id {index}, but the "
            f"vocabulary gives it {got}; the tokenizer's files do not belong together. Fetch "
            "all of them again."
        )
    if others:
        log.warning(
            "%s: %d added tokens are declared with other ids than the vocabulary gives them; the "
            "vocabulary's are used, as in transformers.",
            where,
            others,
        )


def _is_own_name(key: str, value: Any) -> bool:
    """Whether `key` is a name that the model gave to a special token, such as `image_token`."""
    if not key.endswith("_token") or key in NAMES:
        return False
    spelled_out = isinstance(value, dict) and "__type" in value
    return spelled_out or isinstance(value, str | AddedToken)


def _merge_map(settings: dict[str, Any], overruling: Mapping[str, Any]) -> dict[str, Any]:
    """Let special_tokens_map.json overrule `settings`; return what it names further tokens."""
    named: dict[str, Any] = {}
    for key, value in overruling.items():
        if key == "extra_special_tokens" and isinstance(value, dict):
            settings.pop(key, None)
            named = value
        elif key == "extra_special_tokens" and isinstance(value, list):
            present = settings.get(key) or []
            settings[key] = [*present, *(item for item in value if item not in present)]
        elif key != "additional_special_tokens":
            full = isinstance(value, dict)
            settings[key] = _token({**value, "special": True}, key) if full else value
    return named


def _set_names(
    settings: Mapping[str, Any], named: Mapping[str, Any], result: DeclaredTokens
) -> None:
    """Set the named and the further special tokens, with the flags they were declared with."""
    declared = {token.content: token for token in result.added.values()}
    values = {name: settings.get(name) for name in NAMES}
    values |= {key: value for key, value in settings.items() if _is_own_name(key, value)}
    for name, value in {**values, **named}.items():
        if value not in (None, ""):
            token = _token(value, name)
            result.named[name] = declared.get(token.content, token)
    further = settings.get("extra_special_tokens")
    for value in further if isinstance(further, list) else ():
        token = _token(value, "extra_special_tokens")
        token.special = token.special or (isinstance(value, dict) and "special" not in value)
        result.extra.append(token)


def _texts(settings: Mapping[str, Any]) -> set[str]:
    """Texts that `settings` names as special; not those it spells out as objects."""
    further = settings.get("extra_special_tokens")
    values = [settings.get(name) for name in NAMES]
    values += further if isinstance(further, list) else []
    return {str(getattr(v, "content", v)) for v in values if isinstance(v, str | AddedToken)}


def _token(value: Any, what: str) -> AddedToken:
    """A token as JSON spells it: its text, or an object with `content` and flags."""
    if isinstance(value, AddedToken):
        return value
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str):
        raise CheckpointError(
            f"the tokenizer's files give {str(value)[:80]!r} for {what}; expected a text, or an "
            "object with a text under 'content'. Fetch the tokenizer's files again."
        )
    flags = {f: switch(value, f, of=what) for f in _FLAGS if value.get(f) is not None}
    return AddedToken(content, **flags)


def _read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return parse_object(files[name], name) if name in files else {}
