"""Reasoning is parted from the answer, whatever the pieces in which the text comes."""

import random

import pytest

from engine.conversation.reasoning import ReasoningStream, opened_by, reasons


def parted(pieces: list[str], opened: str | None = None, enabled: bool = True) -> tuple[str, str]:
    stream = ReasoningStream(opened, enabled=enabled)
    parts = [part for piece in pieces for part in stream.push(piece)] + stream.finish()
    assert all(part.text for part in parts)
    return (
        "".join(part.text for part in parts if part.part == "reasoning"),
        "".join(part.text for part in parts if part.part == "content"),
    )


def cuts(text: str, seed: int) -> list[str]:
    """The text in random pieces."""
    generator = random.Random(seed)
    ends = sorted(generator.choices(range(len(text) + 1), k=generator.randint(0, len(text))))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nIt is 4.\n</think>\n\nFour.\n", None, "It is 4.", "Four.\n"),
        ("\nIt is\n\n 4.\n</think>\n\nFour.", "<think>", "It is\n\n 4.", "Four."),
        ("<think>\n\n</think>\n\nFour.", None, "", "Four."),
        ("  Four <think>x</think>", None, "", "  Four <think>x</think>"),
        ("[THINK]a[/THINK]b", None, "a", "b"),
        ("<think>never ends ", None, "never ends", ""),
        ("<think>a < b </thin </think>c", None, "a < b </thin", "c"),
        ("<thin", None, "", "<thin"),
        ("", None, "", ""),
        ("no end", "<think>", "no end", ""),
        ("<think>a</think>b<think>c</think>", None, "a", "b<think>c</think>"),
    ],
)
def test_reasoning_is_parted_at_every_cut(
    text: str, opened: str | None, reasoning: str, content: str
) -> None:
    for seed in range(60):
        assert parted(cuts(text, seed), opened) == (reasoning, content)


def test_a_model_that_does_not_reason_may_write_the_tags() -> None:
    assert parted(["<think>a</th", "ink>"], enabled=False) == ("", "<think>a</think>")


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    stream = ReasoningStream()
    shown = [
        "".join(p.text for p in stream.push(piece)) for piece in ("<think>", "\nab", " c<", "d")
    ]
    assert shown == ["", "ab", " c", "<d"]


def test_what_prompts_and_templates_say_of_reasoning() -> None:
    assert opened_by("<|im_start|>assistant\n<think>\n") == "<think>"
    assert opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n") is None
    assert reasons("{{ '<think>' + x + '</think>' }}")
    assert not reasons("{{ message['content'] }}")
