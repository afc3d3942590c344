"""What is told of the tokens of an answer, piece by piece."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from engine.inference.request import TokenEvent
from engine.tokenization.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class ChosenToken:
    """A token, its log-probability (None for a text's first), and the likeliest and theirs."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class AnswerPiece:
    """What is certain after one more token; `finish` says why the answer ended, if it did."""

    text: str = ""
    tokens: tuple[ChosenToken, ...] = ()
    finish: str | None = None
    completion_tokens: int = 0


class TextPosition:
    """How many characters of a text there are, whose bytes come token by token."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.characters = 0

    def add(self, data: bytes) -> None:
        self.characters += len(self._decoder.decode(data))


class TokenTexts:
    """The text and bytes of single tokens, as OpenAI's interface tells log-probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids
        self._bytes = _byte_table() if '"ByteLevel"' in tokenizer.serialised() else {}
        self.of = lru_cache(maxsize=1 << 16)(self._of)

    def _of(self, index: int) -> tuple[str, bytes]:
        """Text and bytes of an id; a part of a character has bytes that are no text alone."""
        piece = self._tokenizer.id_to_token(index) or ""
        byte = _BYTE.fullmatch(piece)
        if index in self._special:
            data = piece.encode()
        elif byte is not None:
            data = bytes([int(byte[1], 16)])
        elif self._bytes and all(c in self._bytes for c in piece):
            data = bytes(self._bytes[c] for c in piece)
        else:
            data = piece.replace("\u2581", " ").encode()
        return data.decode("utf-8", "replace"), data

    def length(self, index: int) -> int:
        """Bytes that an id adds to an answer's text."""
        return 0 if index in self._special else len(self.of(index)[1])

    def chat(self, tokens: Sequence[ChosenToken]) -> dict[str, Any]:
        """`logprobs` of a chat's choice."""
        return {"content": [self._entry(token) for token in tokens], "refusal": None}

    def _entry(self, token: ChosenToken) -> dict[str, Any]:
        top = [self._plain(index, logprob) for index, logprob in token.top]
        return {**self._plain(token.id, token.logprob), "top_logprobs": top}

    def _plain(self, index: int, logprob: float | None) -> dict[str, Any]:
        text, data = self.of(index)
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    def completion(self, tokens: Sequence[ChosenToken], position: TextPosition) -> dict[str, Any]:
        """`logprobs` of a completion's choice; `position`, where its text begins, moves on.

        Special tokens are told of and are no part of the text.
        """
        offsets = []
        for token in tokens:
            offsets.append(position.characters)
            if token.id not in self._special:
                position.add(self.of(token.id)[1])
        return {
            "tokens": [self._label(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _label(self, index: int) -> str:
        """A name of a token that no other has: its text, or its bytes where they are no text."""
        text, data = self.of(index)
        if not data:
            return f"token_id:{index}"
        if "\ufffd" in text:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return text

    def _top(self, token: ChosenToken) -> Mapping[str, float] | None:
        if token.logprob is None:
            return None
        top = {self._label(index): logprob for index, logprob in token.top}
        return {**top, self._label(token.id): token.logprob}


@dataclass
class AnswerPieces:
    """Makes pieces of a request's events: each token comes with the text that it begins.

    Stop texts, and characters of several tokens, stay back until they are whole, and their tokens
    with them; those of a stop text, and a stop token, are told of to nobody.
    """

    texts: TokenTexts
    stop_ids: frozenset[int]
    logprobs: bool
    _waiting: list[tuple[int, ChosenToken]] = field(default_factory=list)
    _written: int = 0
    _shown: int = 0
    _count: int = 0

    def push(self, event: TokenEvent) -> AnswerPiece:
        """The piece that one more event makes certain."""
        self._count += event.token is not None
        if not self.logprobs:
            return AnswerPiece(event.text, (), event.finish_reason, self._count)
        self._shown += len(event.text.encode())
        stopped = event.token in self.stop_ids
        if event.token is not None and not stopped:
            self._wait(event.token, event)
        ended, cut = event.finish_reason is not None, event.finish_reason == "stop" and not stopped
        ready = [
            token for start, token in self._waiting if start < self._shown or (ended and not cut)
        ]
        self._waiting = self._waiting[len(ready) :]
        return AnswerPiece(event.text, tuple(ready), event.finish_reason, self._count)

    def _wait(self, index: int, event: TokenEvent) -> None:
        told = event.logprobs
        token = ChosenToken(index, told.logprob, told.top) if told else ChosenToken(index)
        self._waiting.append((self._written, token))
        self._written += self.texts.length(index)


def _byte_table() -> dict[str, int]:
    """The characters in which byte-level vocabularies write bytes (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}
