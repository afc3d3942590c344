"""One tokenizer for every model, from any of the usual files.

Ids equal those of transformers: `special_tokens` reads what the other files add; what stands
around a text is decided by the post-processor of a tokenizer.json, and by `add_bos_token` and
`add_eos_token` of tokenizer_config.json for the files that have none: a SentencePiece
tokenizer.model, or vocab.json and merges.txt. What the tokenizer puts before and after a text is
separate from the encoding itself, so that a rendered chat, which brings its own BOS token, never
gets a second one.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Encoding
from tokenizers import Tokenizer as Backend

from engine.errors import CheckpointError, DataError
from engine.storage.safe_files import not_shown
from engine.tokenization.chat_template import DEFAULT, TOOL_USE, ChatTemplate, default_template
from engine.tokenization.special_tokens import (
    add_declared,
    matched_as_written,
    read_declared,
)
from engine.tokenization.vocabularies.backend import library_faults, open_backend
from engine.tokenization.vocabularies.limits import longest_quick_text, refuse_long
from engine.tokenization.vocabularies.mistral_words import fix_mistral_words
from engine.tokenization.vocabularies.switches import switch
from engine.tokenization.vocabularies.tokenizer_process import TokenizerProcess

if TYPE_CHECKING:
    from engine.model_sources.interface.model_source import TokenizerSource

# Vocabularies of mistral-common and tiktoken.
_UNREAD = ("tekken.json", "qwen.tiktoken", "tiktoken.model")
Offsets = list[tuple[int, int]]
_MOST_AROUND = 1000
_MOST_IDS = 2**31 - 1
_TOKEN = 16
"""Characters that a token has at most, all but a few."""

_HALF = re.compile("[\ud800-\udfff]")


class Tokenizer:
    """Text to ids and back, with the model's chat template.

    Attributes:
        special_tokens: named special tokens, such as `bos_token`, with their texts.
        chat_template: renders conversations; a documented default where the model has none.
        has_own_template: whether the model brought the template.
        prefix_ids, suffix_ids: what `encode` puts before and after a text.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str],
        template: str | Mapping[str, str] | None = None,
        *,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        name: str = "the model",
        now: str | None = None,
    ) -> None:
        """Wrap a `tokenizers` object, which this tokenizer then owns.

        Args:
            backend: the tokenizer; its truncation, padding and post-processor are removed.
            special_tokens: named special tokens.
            template: the chat template's source, or sources by name, or None.
            add_bos, add_eos: put these tokens around a text; None leaves it to the backend's
                post-processor.
            name: what errors call the model.
            now: date and time, in ISO form, that the template takes for the present.

        Raises:
            CheckpointError: the backend cannot encode at all.
        """
        self.special_tokens = dict(special_tokens)
        self._backend, self._name = backend, name
        refuse_long(self.special_tokens.values(), name)
        self._longest = longest_quick_text(backend, name)
        self._add_missing()
        backend.no_truncation()
        backend.no_padding()
        self._process = self._apart()
        self._vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        if self.vocab_size > _MOST_IDS:
            raise CheckpointError(
                f"{name}: its tokenizer has the id {self.vocab_size - 1}; a model has at most "
                f"{_MOST_IDS} rows. Fetch the tokenizer's files again."
            )
        self.prefix_ids, self.suffix_ids = self._surroundings(add_bos, add_eos)
        backend.post_processor = None
        self._process = self._apart()
        named = {DEFAULT: template} if isinstance(template, str) else dict(template or {})
        self.has_own_template = DEFAULT in named
        bos = self.bos_token_id
        has_bos = bos is not None and self.prefix_ids[:1] == [bos]
        self.chat_template = ChatTemplate(
            named[DEFAULT]
            if self.has_own_template
            else default_template(self._vocabulary, has_bos),
            self.special_tokens,
            end_tokens=self._end_tokens(),
            name=f"The chat template of {name}",
            now=now,
            for_tools=named.get(TOOL_USE),
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; with the tokens that the model expects around it unless told otherwise."""
        ids: list[int] = self._encoding(text, False).ids
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_special_tokens else ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], Offsets]:
        """Ids and the characters [start, end) that each came from; nothing is added."""
        encoding = self._encoding(text, False)
        return encoding.ids, encoding.offsets

    def encode_batch_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
        """`encode_with_offsets` of many texts, on all cores."""
        return [(encoding.ids, encoding.offsets) for encoding in self.encodings(texts)]

    def encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """What `tokenizers` knows of many texts: ids, and the characters behind each."""
        return self._encoded(texts)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on all cores; nothing is added."""
        return [encoding.ids for encoding in self._encoded(texts, offsets=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        plain = [int(index) for index in ids]
        with library_faults(self._name):
            if slow := self._process_for(len(plain) * _TOKEN):
                return slow.decode(plain, skip_special_tokens)
            return str(self._backend.decode(plain, skip_special_tokens=skip_special_tokens))

    def _apart(self) -> TokenizerProcess | None:
        """The tokenizer as it stands, for texts that may take long; started when one comes."""
        if self._longest is None:
            return None
        return TokenizerProcess(self._backend.to_str(), self._name)

    def _process_for(self, characters: int) -> TokenizerProcess | None:
        """The process, where the longest text has so many characters that it may take long."""
        return self._process if characters > (self._longest or 0) else None

    def _encoding(self, text: str, add_special_tokens: bool) -> Encoding:
        with library_faults(self._name), _whole_characters([text]):
            if slow := self._process_for(len(text)):
                return slow.encode([text], add_special_tokens)[0]
            return self._backend.encode(text, add_special_tokens=add_special_tokens)

    def _encoded(self, texts: Sequence[str], offsets: bool = True) -> list[Encoding]:
        """Texts without what stands around them."""
        with library_faults(self._name), _whole_characters(texts):
            if slow := self._process_for(max(map(len, texts), default=0)):
                return slow.encode(texts, False)
            batch = self._backend.encode_batch if offsets else self._backend.encode_batch_fast
            return batch(list(texts), add_special_tokens=False)

    def serialised(self) -> str:
        """The tokenizer as `tokenizers` saves it, without what is put around a text."""
        return str(self._backend.to_str())

    def token_to_id(self, token: str) -> int | None:
        """Id of one token's text, or None."""
        return self._vocabulary.get(token)

    def id_to_token(self, index: int) -> str | None:
        """Text of one id, or None."""
        token = self._backend.id_to_token(index)
        return None if token is None else str(token)

    def vocabulary(self) -> dict[str, int]:
        """Id of every token's text."""
        return dict(self._vocabulary)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model needs at least as many embedding rows."""
        return max(self._vocabulary.values(), default=-1) + 1

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.special_tokens.get("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    def around_document(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """What goes before and behind a whole document, where it does not have it already."""
        before = [] if ids[: len(self.prefix_ids)] == self.prefix_ids else self.prefix_ids
        eos = self.eos_token_id
        return before, [eos] if eos is not None and ids[-1:] != [eos] else []

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad_token")

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are never plain text."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._vocabulary.get(token)

    def _add_missing(self) -> None:
        """Named special tokens are cut out of every text, even where the file forgot to say so.

        Those that are there already keep their flags.
        """
        present = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        named = [
            AddedToken(text, special=True, normalized=False)
            for text in dict.fromkeys(self.special_tokens.values())
            if text not in present
        ]
        self._backend.add_special_tokens(named)

    def _surroundings(
        self, add_bos: bool | None, add_eos: bool | None
    ) -> tuple[list[int], list[int]]:
        if add_bos is not None or add_eos is not None:
            bos, eos = self.bos_token_id, self.eos_token_id
            return (
                [bos] if add_bos and bos is not None else [],
                [eos] if add_eos and eos is not None else [],
            )
        encoding = self._encoding("a", True)
        if len(encoding.ids) > _MOST_AROUND:
            raise CheckpointError(
                f"{self._name}: its tokenizer puts {len(encoding.ids) - 1} tokens around a text; "
                "no model has such a tokenizer. Take another one."
            )
        text = [index for index, added in enumerate(encoding.special_tokens_mask) if not added]
        if not text:
            return list(encoding.ids), []
        return list(encoding.ids[: text[0]]), list(encoding.ids[text[-1] + 1 :])

    def _end_tokens(self) -> list[str]:
        added = self._backend.get_added_tokens_decoder().values()
        texts = {token.content for token in added if token.special}
        texts |= set(self.special_tokens.values())
        if self.bos_token is not None and self.bos_token != self.eos_token:
            texts.discard(self.bos_token)
        return sorted(texts)


@contextmanager
def _whole_characters(texts: Sequence[str]) -> Iterator[None]:
    """Around encoding: half a character raises `DataError`, where the library says TypeError."""
    try:
        yield
    except TypeError as error:
        half = next((match for text in texts if (match := _HALF.search(text))), None)
        if half is None:
            raise
        raise DataError(
            f"A text holds half a character, {half[0]!a} at {half.start()}: a byte that is no "
            "UTF-8, or one of a pair of surrogates alone. Write the text in UTF-8."
        ) from error


def load_tokenizer(source: "TokenizerSource", now: str | None = None) -> Tokenizer:
    """The tokenizer of a model; `now` is what its chat template takes for the present (ISO form).

    Raises:
        CheckpointError: the model has no tokenizer, or its files are damaged.
    """
    files = source.tokenizer_files()
    where = str(source.path)
    with not_shown(*(source.path / name for name in files)), library_faults(where):
        return _load(source, files, where, now)


def _load(
    source: "TokenizerSource", files: Mapping[str, bytes], where: str, now: str | None
) -> Tokenizer:
    backend, config, from_pieces = _open_backend(source, files, where)
    around: tuple[bool, bool] | tuple[None, None] = (None, None)
    if source.tokenizer_json() is None:
        around = switch(config, "add_bos_token"), switch(config, "add_eos_token")
    declared = read_declared(config, files, backend, where)
    if from_pieces:
        declared = matched_as_written(declared, backend)
    add_declared(backend, declared, where)
    return Tokenizer(
        backend,
        declared.names,
        _templates(source),
        add_bos=around[0],
        add_eos=around[1],
        name=where,
        now=now,
    )


def _open_backend(
    source: "TokenizerSource", files: Mapping[str, bytes], where: str
) -> tuple[Backend, dict[str, Any], bool]:
    """The tokenizer of the vocabulary file there is; tokenizer_config.json; if it is SentencePiece.

    The configuration is completed by what vocabulary file or tokenizer class say themselves.
    """
    config = source.tokenizer_config()
    serialised = source.tokenizer_json()
    if serialised is not None:
        backend = open_backend(serialised, where)
        if config.get("fix_mistral_regex") is True:
            fix_mistral_words(backend, source.raw_config)
        return backend, config, False
    model_file = source.tokenizer_model()
    if model_file is not None:
        from engine.tokenization.vocabularies.sentencepiece import load_sentencepiece

        pieces = load_sentencepiece(model_file, config)
        own = {**pieces.special_tokens, "add_bos_token": pieces.adds_bos}
        given = {k: v for k, v in config.items() if k != "add_bos_token" or v is not None}
        return pieces.backend, {**own, **given}, True
    if {"vocab.json", "merges.txt"} <= files.keys():
        from engine.tokenization.vocabularies.vocab_merges import load_vocab_merges

        made = load_vocab_merges(files, config, source.raw_config.get("model_type"), where)
        return made.backend, {**made.special_tokens, **config}, False
    named = [name for name in _UNREAD if (source.path / name).exists()]
    also = f" Its {' and '.join(named)} is in a form that is not read." if named else ""
    raise CheckpointError(
        f"{where}: the model has no tokenizer; expected a tokenizer.json, a SentencePiece "
        "tokenizer.model, or vocab.json and merges.txt in the folder of the weights. Copy it "
        f"from the model it was made from.{also}"
    )


def _templates(source: "TokenizerSource") -> dict[str, str]:
    """The chat templates of a model that are used here, by name."""
    named = {name: source.chat_template(name) for name in (DEFAULT, TOOL_USE)}
    return {name: text for name, text in named.items() if text is not None}
