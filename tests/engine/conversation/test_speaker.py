"""A real tiny model talks: with its adapter, without, and stopped in the middle."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import engine
from engine.config.tasks.serving import ChatSettings
from engine.conversation.chat_loop import Terminal
from engine.conversation.prompts import conversation_prompt
from engine.errors import ConfigError
from engine.verbs.models.chat import chat, load_speaker
from tests.support.saved_adapter import write_random_adapter
from tests.support.source_tree import ROOT


def terminal(lines: list[str], shown: list[str], notes: list[str]) -> Terminal:
    left = list(lines)

    def read_line(_: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    return Terminal(read_line, shown.append, notes.append, width=lambda: 100)


def test_answers_are_those_of_generate(tiny_model: Path, tmp_path: Path) -> None:
    adapter = write_random_adapter(tmp_path / "adapter", tiny_model, 3)
    shown: list[str] = []
    settings = ChatSettings(
        model=str(tiny_model), adapter=((str(adapter), 1.0),), max_new_tokens=12, device="cpu"
    )
    chat(settings, terminal(["Hi", "/reset", "/adapter off", "Hi"], shown, []))
    base = engine.generate(tiny_model, "Hi", max_new_tokens=12)
    tuned = engine.generate(tiny_model, "Hi", adapter, max_new_tokens=12)
    assert tuned.text != base.text
    assert "".join(shown) == f"{tuned.text}\n{base.text}\n"


def test_a_comparison_shows_both_answers(tiny_model: Path, tmp_path: Path) -> None:
    adapter = write_random_adapter(tmp_path / "adapter", tiny_model, 3)
    shown: list[str] = []
    settings = ChatSettings(
        model=str(tiny_model), adapter=((str(adapter), 1.0),), max_new_tokens=8, device="cpu"
    )
    talk = chat(settings, terminal(["/compare Hi"], shown, []))
    rows = "".join(shown).splitlines()[2:]
    for side, own in enumerate((None, adapter)):
        column = "".join(row.split(" │ ")[side] for row in rows)
        text = engine.generate(tiny_model, "Hi", own, max_new_tokens=8).text
        assert "".join(column.split()) == "".join(text.split())
    assert talk.history == []


def test_a_stopped_answer_frees_its_slot(tiny_model: Path) -> None:
    settings = ChatSettings(model=str(tiny_model), max_new_tokens=50, device="cpu")
    speaker, tokenizer = load_speaker(settings, terminal([], [], []))
    prompt = conversation_prompt(tokenizer, [{"role": "user", "content": "Hi"}])

    def interrupt(_: int, text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        speaker.answer([(prompt, False), (prompt, False)], interrupt)
    assert (speaker.generator.active, speaker.generator.waiting) == (0, 0)
    pieces: list[str] = []
    (reply,) = speaker.answer([(prompt, False)], lambda _, text: pieces.append(text))
    assert reply.tokens > 0
    assert "".join(pieces) == engine.generate(tiny_model, "Hi", max_new_tokens=50).text


def test_a_conversation_that_is_too_long_is_refused_and_goes_on(tiny_model: Path) -> None:
    shown: list[str] = []
    notes: list[str] = []
    settings = ChatSettings(model=str(tiny_model), max_new_tokens=500, device="cpu")
    talk = chat(settings, terminal(["x" * 400, "Hi"], shown, notes))
    assert "/reset" in notes[0]
    assert [message["content"] for message in talk.history[:1]] == ["Hi"]


def test_the_command_reads_a_pipe(tiny_model: Path) -> None:
    words = ["chat", "--model", str(tiny_model), "--max-new-tokens", "6", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *words], input="Hi\n/nonsense\n/quit\nnever\n",
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = engine.generate(tiny_model, "Hi", max_new_tokens=6).text
    assert done.stdout == f"{said}\n"
    assert "/nonsense" in done.stderr


def test_a_missing_adapter_is_told_before_the_model_loads(tiny_model: Path) -> None:
    settings = ChatSettings(model=str(tiny_model), adapter=(("no/such/adapter/here", 1.0),))
    with pytest.raises(ConfigError, match="no adapter"):
        chat(settings, terminal([], [], []))
