"""The loop of a chat: messages, answers, commands and history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.conversation.chat_input import Command, ReadLine, read_entry
from engine.conversation.columns import TwoColumns
from engine.conversation.prompts import Prompt, conversation_prompt
from engine.conversation.reasoning import ReasoningStream, TextPart, reasons
from engine.errors import EngineError, without_controls
from engine.tokenization.tokenizer import Tokenizer

HELP = """\
/help             this list
/reset            forget the conversation; system message and settings stay
/system TEXT      set the system message; without TEXT there is none
/think on|off     ask the model to reason first, or not to
/adapter on|off   answer with the adapter, or with the base model alone
/compare [TEXT]   base and tuned side by side, for TEXT or for the last message
/quit             end, as Ctrl-D does
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one; lines between two lines
of \"\"\" are one message. // begins a message with a slash.
"""


@dataclass(frozen=True)
class Reply:
    """How an answer ended: `stop`, `length`, or `stopped` by the person; and its new tokens."""

    finish: str
    tokens: int


class Speaker(Protocol):
    """A model that answers prompts."""

    @property
    def has_adapter(self) -> bool: ...

    def answer(
        self, prompts: Sequence[tuple[Prompt, bool]], on_text: Callable[[int, str], None]
    ) -> list[Reply]:
        """Answer every prompt, with the adapter where its flag says so, all at once.

        `on_text` takes the number of a prompt and the next piece of its answer. Raises
        `KeyboardInterrupt` at Ctrl-C, after which the speaker can answer again.
        """
        ...


@dataclass(frozen=True)
class Terminal:
    """What the loop reads from and writes to.

    `interactive` shows a prompt before the cursor and colours; `width` is that of the lines.
    """

    read_line: ReadLine
    write: Callable[[str], None]
    note: Callable[[str], None]
    interactive: bool = False
    width: Callable[[], int] = lambda: 80


@dataclass
class Chat:
    """One chat. `run` reads until the input ends or the person does.

    Attributes:
        history: the messages, without the system's.
        system: the system message, if any.
        tuned: whether the adapter is on.
        template_kwargs: further variables of the template.
    """

    speaker: Speaker
    tokenizer: Tokenizer
    terminal: Terminal
    system: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    tuned: bool = False
    _compare_next: bool = False

    def __post_init__(self) -> None:
        self.tuned = self.speaker.has_adapter
        self._reasons = reasons(self.tokenizer.chat_template.source)

    def run(self) -> None:
        """Read and answer until the end."""
        shown = self.terminal.interactive
        while True:
            try:
                entry = read_entry(
                    self.terminal.read_line, ">>> " if shown else "", "... " if shown else ""
                )
            except EOFError:
                self.terminal.write("\n" if shown else "")
                return
            except KeyboardInterrupt:
                self.terminal.write("\n")
                self.terminal.note("/quit or Ctrl-D ends the chat; /help lists the commands.")
                continue
            if isinstance(entry, Command):
                if not self._command(entry):
                    return
            elif entry.strip():
                self._message(entry)

    def _message(self, text: str) -> None:
        try:
            if self._compare_next:
                self._compare_next = False
                self._compare([*self.history, {"role": "user", "content": text}])
            else:
                self._turn(text)
        except EngineError as error:
            self.terminal.note(str(error))

    def _turn(self, text: str) -> None:
        """Answer a message, and remember both."""
        messages = [*self.history, {"role": "user", "content": text}]
        prompt = self._prompt(messages)
        said: dict[str, str] = {"reasoning": "", "content": ""}
        stream = ReasoningStream(prompt.opened, enabled=self._reasons)

        def show(parts: Sequence[TextPart]) -> None:
            for part in parts:
                if part.part == "content" and said["reasoning"] and not said["content"]:
                    self.terminal.write("\n\n")
                said[part.part] += part.text
                self.terminal.write(self._dimmed(part))

        try:
            (reply,) = self.speaker.answer(
                [(prompt, self.tuned)], lambda _, piece: show(stream.push(piece))
            )
        except KeyboardInterrupt:
            reply = Reply("stopped", 0)
        show(stream.finish())
        self.terminal.write("\n")
        if reply.finish == "length":
            self.terminal.note(
                f"The answer was cut after {reply.tokens} tokens; --max-new-tokens allows more."
            )
        if reply.finish == "stopped":
            self.terminal.note("Stopped.")
        if said["content"] or said["reasoning"]:
            answer = {"role": "assistant", "content": said["content"]}
            if said["reasoning"]:
                answer["reasoning_content"] = said["reasoning"]
            self.history = [*messages, answer]

    def _dimmed(self, part: TextPart) -> str:
        dim = part.part == "reasoning" and self.terminal.interactive
        text = without_controls(part.text) if self.terminal.interactive else part.text
        return f"\x1b[2m{text}\x1b[0m" if dim else text

    def _prompt(self, messages: Sequence[dict[str, Any]]) -> Prompt:
        whole = [*([{"role": "system", "content": self.system}] if self.system else []), *messages]
        return conversation_prompt(self.tokenizer, whole, template_kwargs=self.template_kwargs)

    def _compare(self, messages: Sequence[dict[str, Any]]) -> None:
        """Show both answers to the last of the messages; the conversation stays as it was."""
        prompt = self._prompt(messages)
        columns = TwoColumns(
            self.terminal.write, ("base", "with the adapter"), self.terminal.width()
        )
        try:
            self.speaker.answer([(prompt, False), (prompt, True)], columns.add)
        except KeyboardInterrupt:
            self.terminal.note("Stopped.")
        columns.end(0)
        columns.end(1)

    def _command(self, command: Command) -> bool:
        """Obey a command; whether the chat goes on."""
        if command.name in ("quit", "exit", "bye", "q"):
            return False
        obeyed = _COMMANDS.get(command.name)
        if obeyed is None:
            self.terminal.note(
                f"There is no command /{command.name}; /help lists them. // begins a message with "
                "a slash."
            )
            return True
        try:
            obeyed(self, command.rest)
        except EngineError as error:
            self.terminal.note(str(error))
        return True

    def help(self, rest: str) -> None:
        self.terminal.note(HELP)

    def reset(self, rest: str) -> None:
        self.history = []
        self.terminal.note("The conversation is forgotten.")

    def set_system(self, rest: str) -> None:
        self.system = rest or None
        self.terminal.note("The system message is set." if rest else "There is no system message.")

    def think(self, rest: str) -> None:
        wanted = self._on_or_off("think", rest)
        if wanted is None:
            return
        self.template_kwargs = {**self.template_kwargs, "enable_thinking": wanted}
        known = "enable_thinking" in "".join(self.tokenizer.chat_template.sources)
        self.terminal.note(
            f"The model is asked {'to reason first' if wanted else 'not to reason'}."
            if known
            else "This model's chat template knows no enable_thinking: nothing changes."
        )

    def set_adapter(self, rest: str) -> None:
        if not self.speaker.has_adapter:
            self.terminal.note(_NO_ADAPTER)
            return
        wanted = self._on_or_off("adapter", rest)
        if wanted is not None:
            self.tuned = wanted
            self.terminal.note(f"Answers come {'with' if wanted else 'without'} the adapter.")

    def compare(self, rest: str) -> None:
        if not self.speaker.has_adapter:
            self.terminal.note(_NO_ADAPTER)
            return
        if rest:
            self._compare([*self.history, {"role": "user", "content": rest}])
            return
        last = max((i for i, m in enumerate(self.history) if m["role"] == "user"), default=None)
        if last is None:
            self._compare_next = True
            self.terminal.note("The next message is answered by both.")
            return
        self._compare(self.history[: last + 1])

    def _on_or_off(self, name: str, rest: str) -> bool | None:
        if rest.lower() in ("on", "off"):
            return rest.lower() == "on"
        self.terminal.note(f"/{name} takes on or off.")
        return None


_NO_ADAPTER = "There is no adapter: start the chat with --adapter to have one."
_COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "help": Chat.help,
    "?": Chat.help,
    "reset": Chat.reset,
    "clear": Chat.reset,
    "system": Chat.set_system,
    "think": Chat.think,
    "adapter": Chat.set_adapter,
    "compare": Chat.compare,
}
