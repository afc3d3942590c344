"""Texts and bytes of tokens, and the pieces in which an answer comes."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE

from engine.inference.request import Answer, RequestSettings, TokenEvent, TokenLogprobs
from engine.serving.openai.answers import AnswerPieces, ChosenToken, TextPosition, TokenTexts
from engine.tokenization.tokenizer import Tokenizer

TEXT = "Zoë said: 日本 🎉 and <|im_end|>"


def test_bytes_of_byte_level_tokens_are_those_of_the_text(
    tokenizers_by_family: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers_by_family["qwen3"]
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(texts.of(index)[1] for index in ids) == TEXT.encode()
    assert texts.length(ids[-1]) == 0


def test_bytes_of_sentencepiece_tokens_are_those_of_the_text() -> None:
    vocab = {"<0xC3>": 0, "<0xAB>": 1, "\u2581Zo": 2, "\u2581is": 3}
    backend = Backend(BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback()])
    texts = TokenTexts(Tokenizer(backend, {}))
    assert b"".join(texts.of(index)[1] for index in (2, 0, 1, 3)) == " Zoë is".encode()
    assert texts.of(0)[0] == "\ufffd"


def test_offsets_count_characters(tokenizers_by_family: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_by_family["qwen3"]
    texts, position = TokenTexts(tokenizer), TextPosition()
    ids = tokenizer.encode("🎉ab", add_special_tokens=False)
    told = texts.completion([ChosenToken(index, -1.0) for index in ids], position)
    assert told["text_offset"][0] == 0
    assert told["text_offset"][-1] == 2
    assert position.characters == 3
    assert told["tokens"][0].startswith("bytes:\\x")
    # A label belongs to one token alone, or the table of the likeliest would lose some.
    labels = [texts.completion([ChosenToken(i)], TextPosition())["tokens"][0] for i in range(500)]
    assert len(set(labels)) == 500


@pytest.mark.parametrize("stop", [(), ("nowhere",), (" dog",), ("ox jum",), ("The",)])
def test_tokens_come_with_the_text_they_begin(
    tokenizers_by_family: dict[str, Tokenizer], stop: tuple[str, ...]
) -> None:
    tokenizer = tokenizers_by_family["qwen3"]
    texts, text = TokenTexts(tokenizer), "The ë quick fox jumps over the 日本 dog."
    settings = RequestSettings(100, stop_ids=frozenset({2}), stop=stop)
    answer = Answer(tokenizer, settings)
    pieces = AnswerPieces(texts, settings.stop_ids, logprobs=True)
    shown, told = "", b""
    for token in [*tokenizer.encode(text, add_special_tokens=False), 2]:
        more = answer.push(token)
        piece = pieces.push(
            TokenEvent(0, token, more, TokenLogprobs(token, -1.0), answer.finish_reason)
        )
        shown += piece.text
        told += b"".join(texts.of(entry.id)[1] for entry in piece.tokens)
        assert not shown or told  # no text without the token that it began with
        if piece.finish:
            break
    cut = min([text.find(s) for s in stop if s in text], default=len(text))
    assert shown == text[:cut]
    # The token in which a stop text begins may have text before it, and no more.
    assert told.decode().startswith(shown)
    assert len(told.decode()) - len(shown) < 6
