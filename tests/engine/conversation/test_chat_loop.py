"""The chat's commands, history and ends, without a terminal or a model."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from engine.conversation.chat_input import Command, read_entry
from engine.conversation.chat_loop import Chat, Reply, Terminal
from engine.conversation.columns import TwoColumns, cells, wrapped
from engine.conversation.prompts import Prompt
from engine.tokenization.tokenizer import Tokenizer

Tokenizers = dict[str, Tokenizer]
INTERRUPT = "^C"


class Parrot:
    """Answers from a list, whose entries may be interrupted; remembers what it was asked."""

    def __init__(self, tokenizer: Tokenizer, answers: Sequence[str], adapter: bool = True) -> None:
        self._tokenizer, self._answers = tokenizer, list(answers)
        self.has_adapter = adapter
        self.asked: list[tuple[str, bool]] = []

    def answer(
        self, prompts: Sequence[tuple[Prompt, bool]], on_text: Callable[[int, str], None]
    ) -> list[Reply]:
        replies = []
        for number, (prompt, tuned) in enumerate(prompts):
            self.asked.append((self._tokenizer.decode(prompt.ids, False), tuned))
            text = self._answers.pop(0)
            for piece in text.removesuffix(INTERRUPT).partition(" "):
                on_text(number, piece)
            if text.endswith(INTERRUPT):
                raise KeyboardInterrupt
            replies.append(Reply("length" if text.endswith("…") else "stop", len(text)))
        return replies


class Session:
    """A chat of typed lines: what was shown, noted and asked."""

    def __init__(
        self, tokenizer: Tokenizer, lines: Sequence[str], answers: Sequence[str], **options: Any
    ) -> None:
        left, self.shown, self.notes = list(lines), list[str](), list[str]()

        def read_line(prompt: str) -> str:
            self.shown.append(prompt)
            if not left:
                raise EOFError
            if left[0] == INTERRUPT:
                left.pop(0)
                raise KeyboardInterrupt
            return left.pop(0)

        interactive = options.pop("interactive", False)
        parrot = Parrot(tokenizer, answers, options.pop("adapter", True))
        terminal = Terminal(read_line, self.shown.append, self.notes.append, interactive)
        self.chat = Chat(parrot, tokenizer, terminal, **options)
        self.chat.run()
        self.asked, self.left = parrot.asked, left

    @property
    def text(self) -> str:
        return "".join(self.shown)


@pytest.fixture
def chatml(tokenizers_by_family: Tokenizers) -> Tokenizer:
    return tokenizers_by_family["chatml"]


def test_answers_are_remembered(chatml: Tokenizer) -> None:
    session = Session(chatml, ["Hi.", "And?"], ["Hello you.", "So."])
    assert session.text == "Hello you.\nSo.\n"
    assert "Hello you." not in session.asked[0][0]
    assert "Hello you." in session.asked[1][0]
    assert session.asked[1][0].endswith("<|im_start|>assistant\n")
    assert [m["role"] for m in session.chat.history] == ["user", "assistant"] * 2


def test_reset_forgets_and_system_stays(chatml: Tokenizer) -> None:
    lines = ["/system Rhyme.", "Hi.", "/reset", "Again.", "/system", "Last."]
    asked = Session(chatml, lines, ["A", "B", "C"]).asked
    assert "Rhyme." in asked[0][0]
    assert "Hi." not in asked[1][0]
    assert "Rhyme." in asked[1][0]
    assert "Rhyme." not in asked[2][0]


def test_the_adapter_is_turned_off_and_on(chatml: Tokenizer) -> None:
    lines = ["a", "/adapter off", "b", "/adapter on", "c", "/adapter perhaps"]
    session = Session(chatml, lines, ["1", "2", "3"])
    assert [tuned for _, tuned in session.asked] == [True, False, True]
    assert session.notes[-1] == "/adapter takes on or off."


def test_compare_shows_both_and_changes_nothing(chatml: Tokenizer) -> None:
    lines = ["Hi.", "/compare", "/compare Why?", "Next."]
    session = Session(chatml, lines, ["1", "base one", "tuned one", "b", "t", "2"])
    assert [tuned for _, tuned in session.asked] == [True, False, True, False, True, True]
    assert session.asked[1][0] == session.asked[2][0] == session.asked[0][0]
    assert "Why?" in session.asked[3][0]
    assert "Why?" not in session.asked[5][0]
    rows = [row.split("│") for row in session.text.splitlines() if "│" in row]
    assert [[cell.strip() for cell in row] for row in rows[:3:2]] == [
        ["base", "with the adapter"], ["base one", "tuned one"],
    ]  # fmt: skip


def test_compare_before_any_message_waits_for_the_next(chatml: Tokenizer) -> None:
    session = Session(chatml, ["/compare", "Hi.", "Go."], ["b", "t", "1"])
    assert [tuned for _, tuned in session.asked] == [False, True, True]
    assert len(session.chat.history) == 2


def test_without_an_adapter_the_commands_say_so(chatml: Tokenizer) -> None:
    session = Session(chatml, ["/compare", "/adapter off", "a"], ["1"], adapter=False)
    assert [note.partition(":")[0] for note in session.notes] == ["There is no adapter"] * 2
    assert session.asked[0][1] is False


def test_ctrl_c_stops_an_answer_and_not_the_chat(chatml: Tokenizer) -> None:
    session = Session(chatml, ["Hi.", INTERRUPT, "On."], ["One two" + INTERRUPT, "Three"])
    assert session.notes[0] == "Stopped."
    assert "/quit" in session.notes[1]
    assert "One two" in session.asked[1][0]
    # An answer of which nothing came leaves no turn.
    assert Session(chatml, ["Hi."], [INTERRUPT]).chat.history == []


def test_reasoning_is_shown_and_left_to_the_template(tokenizers_by_family: Tokenizers) -> None:
    qwen = tokenizers_by_family["qwen3"]
    session = Session(
        qwen, ["Hi.", "/think off", "More."], ["<think>\nHm hm.\n</think>\n\nYes.", "No."],
        interactive=True,
    )  # fmt: skip
    assert "\x1b[2mHm\x1b[0m" in session.text
    assert "</think>" not in session.text
    assert "Hm hm." not in session.asked[1][0]
    assert "Yes." in session.asked[1][0]
    assert session.asked[1][0].endswith("<think>\n\n</think>\n\n")


def test_a_template_that_cannot_reason_says_so(chatml: Tokenizer) -> None:
    assert "nothing changes" in Session(chatml, ["/think on"], []).notes[0]


def test_what_the_template_refuses_ends_no_chat(tokenizers_by_family: Tokenizers) -> None:
    strict = "{{ raise_exception('no system') if messages[0].role == 'system' else 'x' }}"
    base = tokenizers_by_family["chatml"]
    tokenizer = Tokenizer.__new__(Tokenizer)
    vars(tokenizer).update(vars(base))
    tokenizer.chat_template = type(base.chat_template)(strict, base.special_tokens)
    session = Session(tokenizer, ["/system S", "Hi.", "/system", "Hi."], ["ok"])
    assert "no system" in session.notes[1]
    assert session.text == "ok\n"


def test_commands_end_the_chat_and_unknown_ones_do_not(chatml: Tokenizer) -> None:
    session = Session(chatml, ["/hello", "/help", "/quit", "never"], [])
    assert session.left == ["never"]
    assert "/hello" in session.notes[0]
    assert "/compare" in session.notes[1]


def test_an_answer_that_was_cut_is_told(chatml: Tokenizer) -> None:
    assert "--max-new-tokens" in Session(chatml, ["Hi."], ["So…"]).notes[0]


@pytest.mark.parametrize(
    ("lines", "entry"),
    [
        (["plain"], "plain"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (["one\\"], "one\n"),
        (['"""', "a", "", "b", '"""'], "a\n\nb"),
        (['"""a', 'b"""'], "a\nb"),
        (['"""a"""'], "a"),
        (['"""a'], "a"),
        (["//etc is a path"], "/etc is a path"),
        (["/System  Be kind. "], Command("system", "Be kind.")),
        (["/"], Command("", "")),
    ],
)
def test_entries_of_several_lines_are_read(lines: list[str], entry: str | Command) -> None:
    left = list(lines)

    def read_line(_: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    assert read_entry(read_line, "", "") == entry
    assert left == []


def test_columns_write_rows_that_both_have() -> None:
    shown: list[str] = []
    columns = TwoColumns(shown.append, ("a", "b"), 80)
    columns.add(0, "first\nsecond\n")
    assert len(shown) == 2  # titles and a line
    columns.add(1, "eins\nzwei")
    assert [row.split() for row in shown[2:]] == [["first", "│", "eins"]]
    columns.end(0)
    columns.add(1, "\ndrei\n")
    columns.end(1)
    assert [row.split("│")[1].strip() for row in shown[2:]] == ["eins", "zwei", "drei", ""]
    assert all(cells(row.partition("│")[0]) == 39 for row in shown[2:])


def test_a_narrow_terminal_has_one_text_below_the_other() -> None:
    shown: list[str] = []
    columns = TwoColumns(shown.append, ("a", "b"), 40)
    columns.add(1, "two")
    columns.add(0, "one")
    columns.end(1)
    columns.end(0)
    assert "".join(shown) == "[a]\none\n\n[b]\ntwo\n\n"


def test_wide_characters_take_two_cells() -> None:
    assert wrapped("日本語日本語", 6) == ["日本語", "日本語"]
    assert cells("日本 a") == 6
    assert wrapped("", 10) == [""]
    assert "".join(wrapped("a word and  another one", 8)) == "a word and  another one"
