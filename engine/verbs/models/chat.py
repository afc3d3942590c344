"""`engine chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from engine.config.tasks.serving import ChatSettings
from engine.conversation.chat_input import ReadLine
from engine.conversation.chat_loop import Chat, Terminal
from engine.conversation.speaker import ModelSpeaker
from engine.device import resolve_device
from engine.errors import ConfigError
from engine.inference.batched import BatchedGenerator
from engine.inference.generation import stop_ids_of
from engine.inference.loading import load_decoder, require_same_words, say_bases
from engine.inference.request import RequestSettings
from engine.inference.sampling import resolve_sampling
from engine.model_sources.adapter_path import adapter_path
from engine.model_sources.open import open_model_source
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from engine.training.determinism import deterministic

_ADAPTER = "adapter"
_LONGEST_LINE = 1 << 24


def chat(settings: ChatSettings, terminal: Terminal | None = None) -> Chat:
    """Talk with the model of `settings` until the input ends; returns the chat as it ended.

    Raises `ConfigError` or `CheckpointError` for a model or adapter that cannot be used.
    """
    terminal = terminal or own_terminal()
    device = resolve_device(settings.device)  # refused before any file is read
    with deterministic(device, settings.deterministic):
        speaker, tokenizer = load_speaker(settings, terminal)
        talk = Chat(
            speaker,
            tokenizer,
            terminal,
            system=settings.system,
            template_kwargs=settings.chat_template_kwargs,
        )
        if terminal.interactive:
            terminal.note("/help lists the commands, Ctrl-D ends.")
        with interrupts_raise():
            talk.run()
    return talk


def load_speaker(settings: ChatSettings, terminal: Terminal) -> tuple[ModelSpeaker, Tokenizer]:
    """The model of `settings`, ready to answer, and its tokenizer. Raises as above."""
    adapters = [adapter_path(path) for path, _ in settings.adapter]
    source = open_model_source(settings.model)
    tokenizer = load_tokenizer(source)
    require_same_words(tokenizer, adapters)
    sampling, line = resolve_sampling(settings, source.generation_config, str(source.path))
    if line is not None and terminal.interactive:
        terminal.note(line)
    model = load_decoder(source, settings.model_copy(update={"adapter": ()}))
    generator = BatchedGenerator(model, tokenizer, slots=2)
    if adapters:
        say_bases(adapters, source, settings.quantize)
        generator.add_adapter(_ADAPTER, settings.adapter, source)
    speaker = ModelSpeaker(
        generator,
        RequestSettings(settings.max_new_tokens, sampling, stop=settings.stop),
        stop_ids_of(source, tokenizer),
        stop_ids_of(source, tokenizer, *adapters),
        _ADAPTER if adapters else None,
    )
    return speaker, tokenizer


def own_terminal() -> Terminal:
    """The process's own input and output; prompts and colours only where a person sits there."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with suppress(ImportError):  # not on this system
            import readline  # noqa: F401 - gives `input` editing and a history of lines

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    read: ReadLine = input if interactive else _read_line
    return Terminal(read, write, note, interactive, lambda: shutil.get_terminal_size().columns)


def _read_line(prompt: str) -> str:
    line = sys.stdin.readline(_LONGEST_LINE + 1)
    if not line:
        raise EOFError
    if len(line) > _LONGEST_LINE:
        raise ConfigError(
            f"A line of standard input has more than {_LONGEST_LINE >> 20} million characters, "
            "where a message was expected. Look at what is given to the chat."
        )
    return line.removesuffix("\n")


@contextmanager
def interrupts_raise() -> Iterator[None]:
    """Inside the block every Ctrl-C raises `KeyboardInterrupt`, however often it comes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
