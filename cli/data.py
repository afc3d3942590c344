"""`engine data`: check, show, count and make training data."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Json, TemplateKwargs, template_kwargs

if TYPE_CHECKING:
    from rich.console import Console

    from engine.data.dataset import ReadReport
    from engine.data.examples import Example, Report
    from engine.data.rows import Row
    from engine.tokenization.tokenizer import Tokenizer

app = typer.Typer(add_completion=False, no_args_is_help=True)

Files = Annotated[
    list[Path] | None, typer.Argument(help="Data files, or a folder with a train.jsonl.")
]
Data = Annotated[
    list[Path] | None, typer.Option("--data", help="The same as naming the files; may repeat.")
]
Model = Annotated[str | None, typer.Option(help="Also render and tokenise as for this model.")]
MaxLength = Annotated[int, typer.Option(min=2, help="Longest row in tokens.")]
MinRating = Annotated[
    int | None, typer.Option(min=1, max=5, help="Leave out rows rated lower, or not at all.")
]
Category = Annotated[list[str] | None, typer.Option(help="Only rows of this category; may repeat.")]
BadLines = Annotated[
    str, typer.Option(help="fail: stop at a bad row; skip, or skip:5%: leave it out and count it.")
]


@app.command()
def validate(
    files: Files = None,
    data: Data = None,
    model: Model = None,
    max_length: MaxLength = 2048,
    min_rating: MinRating = None,
    category: Category = None,
    bad_lines: BadLines = "fail",
    as_json: Json = False,
) -> None:
    """Read every row as training would, and tell what would be left out."""
    rows, read = _read(files, data, min_rating, category, bad_lines)
    report = None
    if model is not None:
        tokenizer, vocab_size = _tokenizer(model)
        report = _build(rows, tokenizer, vocab_size, max_length, bad_lines)[1]
    if as_json:
        print(json.dumps({"read": dataclasses.asdict(read), "examples": _asdict(report)}))
        return
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


@app.command()
def stats(
    files: Files = None,
    data: Data = None,
    model: Model = None,
    max_length: MaxLength = 2048,
    min_rating: MinRating = None,
    category: Category = None,
    bad_lines: BadLines = "fail",
    as_json: Json = False,
) -> None:
    """Count rows, turns, categories and ratings; with --model also tokens."""
    rows, read = _read(files, data, min_rating, category, bad_lines)
    figures: dict[str, Any] = {
        "rows": len(rows),
        "left_out": len(read.skipped) + read.filtered,
        "messages": sum(len(row.messages) for row in rows),
        "categories": dict(Counter(row.category or "none" for row in rows).most_common()),
        "ratings": _counted(row.rating for row in rows),
        "schema_versions": _counted(row.schema_version for row in rows),
        "characters": _spread([_characters(row) for row in rows]),
    }
    if model is not None:
        tokenizer, vocab_size = _tokenizer(model)
        examples, report = _build(rows, tokenizer, vocab_size, max_length, bad_lines)
        figures["tokens"] = _spread([len(example) for example in examples])
        figures["trained_tokens"] = report.trained_tokens
        figures["all_tokens"] = report.tokens
        figures["truncated"] = report.truncated
        figures["dropped"] = len(report.dropped)
    if as_json:
        print(json.dumps(figures))
    else:
        _print_table(figures)


@app.command()
def preview(
    files: Files = None,
    data: Data = None,
    model: Model = None,
    row: Annotated[int, typer.Option(min=1, help="The first row to show, counted from 1.")] = 1,
    count: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 1,
    max_length: MaxLength = 2048,
    min_rating: MinRating = None,
    category: Category = None,
    bad_lines: BadLines = "fail",
    chat_template_kwargs: TemplateKwargs = None,
) -> None:
    """Show rows as the model will read them; what is trained stands out.

    Without --model the messages are shown as they were read.
    """
    from rich.console import Console

    from engine.errors import DataError

    rows, _ = _read(files, data, min_rating, category, bad_lines)
    if row > len(rows):
        raise DataError(f"There is no row {row}; the data has {len(rows)}. Pass a smaller --row.")
    chosen = rows[row - 1 : row - 1 + count]
    console = Console(highlight=False)
    if model is None:
        for item in chosen:
            _print_messages(console, item)
        return
    tokenizer, vocab_size = _tokenizer(model)
    kwargs = template_kwargs(chat_template_kwargs)
    examples, report = _build(chosen, tokenizer, vocab_size, max_length, bad_lines, kwargs)
    for example in examples:
        _print_example(console, example, tokenizer)
    for line in report.dropped:
        print(f"dropped {line}")


@app.command()
def docstrings(
    output_dir: Annotated[Path, typer.Option(help="Where train.jsonl and heldout.jsonl go.")],
    limit: Annotated[int | None, typer.Option(min=2, help="Most rows of both together.")] = None,
    heldout_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of modules to hold out.")
    ] = 0.15,
) -> None:
    """Make prompt/response rows from the Python standard library's docstrings."""
    from engine.data.docstrings import write_docstrings

    train, trained, heldout, held = write_docstrings(output_dir, limit, heldout_fraction)
    print(f"{trained:,} rows in {train}")
    print(f"{held:,} rows in {heldout}, of modules that the first file does not have")


def _read(
    files: list[Path] | None,
    data: list[Path] | None,
    min_rating: int | None,
    category: list[str] | None,
    bad_lines: str,
) -> tuple[list["Row"], "ReadReport"]:
    from engine.data.dataset import read_rows

    return read_rows([*(files or []), *(data or [])], min_rating, category, bad_lines)


def _tokenizer(model: str) -> tuple["Tokenizer", int]:
    from engine.model_sources.open import open_model_source
    from engine.tokenization.tokenizer import load_tokenizer

    source = open_model_source(model)
    return load_tokenizer(source), source.config.vocab_size


def _build(
    rows: Sequence["Row"],
    tokenizer: "Tokenizer",
    vocab_size: int,
    max_length: int,
    bad_lines: str,
    kwargs: dict[str, Any] | None = None,
) -> tuple[list["Example"], "Report"]:
    from engine.data.examples import build_examples, check_ids

    bad_rows = "fail" if bad_lines == "fail" else "skip"
    examples, report = build_examples(
        rows, tokenizer, max_length, template_kwargs=kwargs, bad_rows=bad_rows
    )
    check_ids(examples, vocab_size)
    return examples, report


def _asdict(report: "Report | None") -> dict[str, Any] | None:
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
    start = 0
    ids, marks = example.input_ids, example.trained
    for end in range(1, len(ids) + 1):
        if end == len(ids) or marks[end] != marks[start]:
            run = tokenizer.decode(ids[start:end], skip_special_tokens=False)
            text.append(run, style="bold black on green" if marks[start] else "dim")
            start = end
    console.print(text)
    if not console.is_terminal:
        trained = [index for index, mark in zip(ids, marks, strict=True) if mark]
        decoded = tokenizer.decode(trained, skip_special_tokens=False)
        console.print(Text(f"trained: {decoded!r}"))
