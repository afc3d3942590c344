"""`engine data`: check, show, count and make training data."""

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from cli.from_settings import Call, Verb, make_app
from cli.say import say
from cli.tools.check_data import build_rows, load_words, read_chosen_rows, stats, validate
from cli.tools.corpus import convert, decontaminate, dedup, mix, split
from cli.tools.make_rows import extract, pairs, synth, tokenizer
from engine.config.tasks.corpus import (
    ConvertSettings,
    DecontaminateSettings,
    DedupSettings,
    ExtractSettings,
    MixSettings,
    PairsSettings,
    SplitSettings,
    SynthSettings,
    TokenizerSettings,
)
from engine.config.tasks.workflow import (
    DocstringSettings,
    PreviewSettings,
    StatsSettings,
    ValidateSettings,
)
from engine.errors import without_controls

if TYPE_CHECKING:
    from rich.console import Console

    from engine.data.examples import Example
    from engine.data.rows import Row
    from engine.tokenization.tokenizer import Tokenizer


def preview(call: Call) -> None:
    """Show rows as the model will read them; what is trained stands out.

    Without --model the messages are shown as they were read.
    """
    from rich.console import Console

    from engine.errors import DataError

    settings = call.read(PreviewSettings)
    rows, _ = read_chosen_rows(settings)
    first = settings.row - 1
    if first >= len(rows):
        raise DataError(
            f"There is no row {settings.row}; the data has {len(rows)}. Pass a smaller --row."
        )
    chosen = rows[first : first + settings.count]
    console = Console(highlight=False)
    if settings.model is None:
        for item in chosen:
            _print_messages(console, item)
        return
    tokenizer, vocab_size = load_words(settings.model)
    examples, report = build_rows(chosen, tokenizer, vocab_size, settings)
    for example in examples:
        _print_example(console, example, tokenizer)
    for line in report.dropped:
        say(f"dropped {line}")


def docstrings(call: Call) -> None:
    """Make prompt/response rows from the Python standard library's docstrings."""
    from engine.data.corpus.writing import refuse_output
    from engine.data.docstrings import write_docstrings
    from engine.data.origins import write_origins
    from engine.errors import ConfigError
    from engine.storage import durable

    asked = call.read(DocstringSettings)
    names = ("train.jsonl", "heldout.jsonl")
    durable.sweep_leftovers(asked.output_dir / names[0])
    taken = [name for name in names if (asked.output_dir / name).exists()]
    if taken:
        raise ConfigError(
            f"{asked.output_dir} holds {' and '.join(taken)} already, which would be replaced. "
            "Move it away, or choose another --output-dir."
        )
    refuse_output(*(asked.output_dir / name for name in names))
    told = {"python": platform.python_version(), "heldout_fraction": asked.heldout_fraction}

    def describe(file: Path, count: int) -> None:
        write_origins(file, "docstrings", {**told, "limit": asked.limit}, [], {"written": count})

    train, rows, heldout, others = write_docstrings(
        asked.output_dir, asked.limit, asked.heldout_fraction, describe
    )
    say(f"{rows:,} rows in {train}")
    say(f"{others:,} rows in {heldout}, of modules that the first file does not have")


def _print_messages(console: "Console", row: "Row") -> None:
    from rich.text import Text

    head = f"{row.source}  category {row.category}  rating {row.rating}"
    console.print(Text(without_controls(head), style="dim"))
    for message in row.messages:
        console.print(Text(without_controls(f"[{message['role']}] "), style="bold"), end="")
        shown = {key: value for key, value in message.items() if key not in ("role", "content")}
        extra = f" {json.dumps(shown, ensure_ascii=False)}" if shown else ""
        console.print(Text(without_controls(f"{message.get('content') or ''}{extra}")))


def _print_example(console: "Console", example: "Example", tokenizer: "Tokenizer") -> None:
    """Runs of trained and untrained tokens, decoded together so that no character is torn."""
    from rich.text import Text

    head = f"{example.source}  {len(example)} tokens, {example.trained_tokens} trained"
    console.print(Text(without_controls(head), style="dim"))
    text = Text()
    for trained, ids in example.stretches():
        run = tokenizer.decode(ids, skip_special_tokens=False)
        text.append(without_controls(run), style="bold black on green" if trained else "dim")
    console.print(text)
    if not console.is_terminal:
        learnt = [index for trained, ids in example.stretches() if trained for index in ids]
        decoded = tokenizer.decode(learnt, skip_special_tokens=False)
        console.print(Text(f"trained: {decoded!r}"))


app = make_app(
    (Verb("data validate", (ValidateSettings,), words="data"), validate),
    (Verb("data stats", (StatsSettings,), words="data"), stats),
    (Verb("data preview", (PreviewSettings,), words="data", json=False), preview),
    (Verb("data convert", (ConvertSettings,), words="data"), convert),
    (Verb("data split", (SplitSettings,), words="data"), split),
    (Verb("data dedup", (DedupSettings,), words="data"), dedup),
    (Verb("data decontaminate", (DecontaminateSettings,), words="data"), decontaminate),
    (Verb("data mix", (MixSettings,)), mix),
    (Verb("data pairs", (PairsSettings,), words="data"), pairs),
    (Verb("data extract", (ExtractSettings,), words="source"), extract),
    (Verb("data synth", (SynthSettings,)), synth),
    (Verb("data tokenizer", (TokenizerSettings,), words="data"), tokenizer),
    (Verb("data docstrings", (DocstringSettings,), json=False), docstrings),
)
