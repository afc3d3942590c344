"""`engine data`: check, show, count and make training data."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cli.from_settings import Call, Verb, make_app
from engine.config.tasks.workflow import (
    DataSettings,
    DocstringSettings,
    PreviewSettings,
    ValidateSettings,
)

if TYPE_CHECKING:
    from rich.console import Console

    from engine.data.dataset import ReadReport
    from engine.data.example_report import ExampleReport
    from engine.data.examples import Example
    from engine.data.rows import Row
    from engine.tokenization.tokenizer import Tokenizer


def validate(call: Call) -> None:
    """Read every row as training would, and tell what would be left out."""
    settings = call.read(ValidateSettings)
    rows, read = _read(settings)
    report = None
    if settings.model is not None:
        report = _build(rows, *_tokenizer(settings.model), settings)[1]
    if not call.print_json({"read": dataclasses.asdict(read), "examples": _asdict(report)}):
        _print_findings(rows, read, report)
    if settings.strict:
        _refuse_losses(read, report)


def _refuse_losses(read: "ReadReport", report: "ExampleReport | None") -> None:
    """What `--strict` refuses: anything of a row that training would not use."""
    from engine.errors import DataError

    losses = read.notes()
    if read.skipped:
        losses.append(f"{len(read.skipped):,} rows are bad.")
    if report is not None:
        losses += report.notes()
        if report.dropped:
            losses.append(f"{len(report.dropped):,} rows are dropped.")
        if report.truncated:
            losses.append(f"{report.truncated:,} rows are truncated.")
    if losses:
        raise DataError(f"Not all of the data would be used (--strict): {' '.join(losses)}")


def _print_findings(rows: list["Row"], read: "ReadReport", report: "ExampleReport | None") -> None:
    for line in read.skipped:
        print(f"skipped {line}")
    print(
        f"{len(rows):,} of {read.read:,} rows are good: {len(read.skipped)} bad, "
        f"{read.below_rating} rated too low, {read.unrated} without a rating, "
        f"{read.other_category} of another category."
    )
    if report is not None:
        for line in report.dropped:
            print(f"dropped {line}")
        print(f"{report.describe()}.")


def stats(call: Call) -> None:
    """Count rows, turns, categories and ratings; with --model also tokens."""
    settings = call.read(DataSettings)
    rows, read = _read(settings)
    figures: dict[str, Any] = {
        "rows": len(rows),
        "left_out": len(read.skipped) + read.filtered,
        "messages": sum(len(row.messages) for row in rows),
        "categories": dict(Counter(row.category or "none" for row in rows).most_common()),
        "ratings": _counted(row.rating for row in rows),
        "schema_versions": _counted(row.schema_version for row in rows),
        "characters": _spread([_characters(row) for row in rows]),
    }
    if settings.model is not None:
        examples, report = _build(rows, *_tokenizer(settings.model), settings)
        figures["tokens"] = _spread([len(example) for example in examples])
        figures["trained_tokens"] = report.trained_tokens
        figures["all_tokens"] = report.tokens
        figures["truncated"] = report.truncated
        figures["dropped"] = len(report.dropped)
    if not call.print_json(figures):
        _print_table(figures)


def preview(call: Call) -> None:
    """Show rows as the model will read them; what is trained stands out.

    Without --model the messages are shown as they were read.
    """
    from rich.console import Console

    from engine.errors import DataError

    settings = call.read(PreviewSettings)
    rows, _ = _read(settings)
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
    tokenizer, vocab_size = _tokenizer(settings.model)
    examples, report = _build(chosen, tokenizer, vocab_size, settings)
    for example in examples:
        _print_example(console, example, tokenizer)
    for line in report.dropped:
        print(f"dropped {line}")


def docstrings(call: Call) -> None:
    """Make prompt/response rows from the Python standard library's docstrings."""
    from engine.data.docstrings import write_docstrings
    from engine.errors import ConfigError

    asked = call.read(DocstringSettings)
    names = ("train.jsonl", "heldout.jsonl")
    taken = [name for name in names if (asked.output_dir / name).exists()]
    if taken:
        raise ConfigError(
            f"{asked.output_dir} holds {' and '.join(taken)} already, which would be replaced. "
            "Move it away, or choose another --output-dir."
        )
    train, rows, heldout, others = write_docstrings(
        asked.output_dir, asked.limit, asked.heldout_fraction
    )
    print(f"{rows:,} rows in {train}")
    print(f"{others:,} rows in {heldout}, of modules that the first file does not have")


def _read(settings: DataSettings) -> tuple[list["Row"], "ReadReport"]:
    from engine.data.dataset import RowChoice, read_chosen

    return read_chosen(settings.data, RowChoice.of(settings, settings.category))


def _tokenizer(model: str) -> tuple["Tokenizer", int]:
    from engine.model_sources.open import describe_model
    from engine.tokenization.tokenizer import load_tokenizer

    source = describe_model(model)
    return load_tokenizer(source), source.config.vocab_size


def _build(
    rows: Sequence["Row"],
    tokenizer: "Tokenizer",
    vocab_size: int,
    settings: DataSettings,
) -> tuple[list["Example"], "ExampleReport"]:
    from engine.data.examples import build_examples, check_ids
    from engine.data.rendering import Learning

    examples, report = build_examples(
        rows,
        tokenizer,
        settings.max_length,
        template_kwargs=settings.chat_template_kwargs,
        bad_rows=settings.bad_lines,
        learning=Learning.of(settings),
    )
    check_ids(examples, vocab_size)
    return examples, report


def _asdict(report: "ExampleReport | None") -> dict[str, Any] | None:
    return None if report is None else dataclasses.asdict(report)


def _counted(values: Any) -> dict[str, int]:
    counts = Counter("none" if value is None else str(value) for value in values)
    return dict(sorted(counts.items()))


def _characters(row: "Row") -> int:
    return sum(len(str(message.get("content") or "")) for message in row.messages)


def _spread(values: list[int]) -> dict[str, int]:
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "shortest": ordered[0],
        "median": ordered[last // 2],
        "90 %": ordered[last * 9 // 10],
        "longest": ordered[-1],
    }


def _print_table(figures: dict[str, Any]) -> None:
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number:,}" for key, number in value.items())
        else:
            value = f"{value:,}"
        print(f"{name.replace('_', ' '):<{width}}  {value}")


def _print_messages(console: "Console", row: "Row") -> None:
    from rich.text import Text

    console.print(Text(f"{row.source}  category {row.category}  rating {row.rating}", style="dim"))
    for message in row.messages:
        console.print(Text(f"[{message['role']}] ", style="bold"), end="")
        shown = {key: value for key, value in message.items() if key not in ("role", "content")}
        extra = f" {json.dumps(shown, ensure_ascii=False)}" if shown else ""
        console.print(Text(f"{message.get('content') or ''}{extra}"))


def _print_example(console: "Console", example: "Example", tokenizer: "Tokenizer") -> None:
    """Runs of trained and untrained tokens, decoded together so that no character is torn."""
    from rich.text import Text

    head = f"{example.source}  {len(example)} tokens, {example.trained_tokens} trained"
    console.print(Text(head, style="dim"))
    text = Text()
    for trained, ids in example.stretches():
        run = tokenizer.decode(ids, skip_special_tokens=False)
        text.append(run, style="bold black on green" if trained else "dim")
    console.print(text)
    if not console.is_terminal:
        learnt = [index for trained, ids in example.stretches() if trained for index in ids]
        decoded = tokenizer.decode(learnt, skip_special_tokens=False)
        console.print(Text(f"trained: {decoded!r}"))


app = make_app(
    (Verb("data validate", (ValidateSettings,), words="data"), validate),
    (Verb("data stats", (DataSettings,), words="data"), stats),
    (Verb("data preview", (PreviewSettings,), words="data", json=False), preview),
    (Verb("data docstrings", (DocstringSettings,), json=False), docstrings),
)
