"""Text comes while tokens do, whole characters only, and ends before a stop string."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import engine
from cli import main as cli
from engine.inference.generation import complete
from engine.inference.streaming import TextStream
from engine.model_sources.load_model import load_model
from engine.model_sources.open import open_model_source
from engine.tokenization.tokenizer import load_tokenizer


def of_bytes(ids: Sequence[int]) -> str:
    """A tokenizer with a token per byte, as byte-level vocabularies have for rare characters."""
    return bytes(ids).decode("utf-8", errors="replace")


TEXTS = [
    "",
    "plain",
    "naïve café — “quotes” ",
    "日本語とемодзи 👩\u200d👧 done",
    "aab\nab\n\naabb",
    "\ufffd odd",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_together_the_text(text: str) -> None:
    stream = TextStream(of_bytes)
    pieces = [stream.push(byte) for byte in text.encode()]
    pieces.append(stream.finish(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.parametrize("seed", range(200))
def test_nothing_of_a_stop_string_is_shown(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choice("ab<") for _ in range(60))
    stop = ["".join(draw.choice("ab<") for _ in range(draw.randint(2, 6))) for _ in range(2)]
    stream, shown, ended = TextStream(of_bytes, stop), "", False
    for byte in text.encode():
        shown += stream.push(byte)
        if stream.stopped():
            ended = True
            break
    # The first mark to be complete ends the text.
    read = next((text[:n] for n in range(61) if any(mark in text[:n] for mark in stop)), text)
    wanted = text[: min((read.find(mark) for mark in stop if mark in read), default=len(text))]
    assert wanted.startswith(shown)
    assert ended is any(mark in text for mark in stop)
    assert shown + stream.finish(stream.text if ended else text) == wanted


def test_only_the_last_ids_are_decoded_again() -> None:
    lengths = []

    def decode(ids: Sequence[int]) -> str:
        lengths.append(len(ids))
        return of_bytes(ids)

    stream = TextStream(decode)
    for byte in b"word " * 400:
        stream.push(byte)
    assert max(lengths) <= 4


def test_an_answer_streams_to_what_it_is(tiny_model: Path) -> None:
    source = open_model_source(str(tiny_model))
    tokenizer = load_tokenizer(source)
    model = load_model(tiny_model)
    pieces: list[str] = []
    result = complete(
        model, tokenizer, tokenizer.encode("Hi"), max_new_tokens=40, stop_ids=frozenset(),
        on_text=pieces.append,
    )  # fmt: skip
    assert "".join(pieces) == result.text
    assert len(pieces) > 3
    mark = result.text[5:7]
    pieces.clear()
    cut = complete(
        model, tokenizer, tokenizer.encode("Hi"), max_new_tokens=40, stop_ids=frozenset(),
        stop=(mark,), on_text=pieces.append,
    )  # fmt: skip
    assert cut.finish_reason == "stop"
    assert "".join(pieces) == cut.text == result.text[: result.text.index(mark)]


def test_the_command_says_why_an_answer_ended(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--model", str(tiny_model), "--prompt", "Hi", "--max-new-tokens", "6"]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert out == engine.generate(str(tiny_model), "Hi", max_new_tokens=6).text + "\n"
    assert "cut after 6 tokens; --max-new-tokens 24" in err


def test_what_was_written_before_an_interrupt_stays(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(settings: object, on_text: Callable[[str], None]) -> None:
        on_text("half an ")
        on_text("answer")
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.verbs.models.generate.answer", interrupted)
    words = ["generate", "--model", str(tiny_model), "--prompt", "Hi"]
    assert cli.main(words) == 130
    assert capsys.readouterr().out == "half an answer\n"
    assert cli.main([*words, "--json"]) == 130
    assert '"text": "half an answer"' in capsys.readouterr().out
