"""`engine data validate` and `stats`: faults and figures of rows."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.from_settings import Call
from cli.say import say
from engine.config.tasks.workflow import DataSettings, StatsSettings, ValidateSettings

if TYPE_CHECKING:
    from engine.data.corpus.quarantine import Quarantine
    from engine.data.corpus.reading import Corpus
    from engine.data.dataset import ReadReport
    from engine.data.example_report import ExampleReport
    from engine.data.examples import Example
    from engine.data.rows import Row
    from engine.tokenization.tokenizer import Tokenizer


def validate(call: Call) -> None:
    """Read every row as training would, and tell what would be left out.

    The good rows can be written to one file, the bad ones with their reasons to another.
    """
    from engine.data.corpus.quarantine import Quarantine
    from engine.data.corpus.reading import read_corpus
    from engine.data.corpus.writing import refuse_output, refuse_report
    from engine.data.dataset import RowChoice
    from engine.storage.standing import refuse_sources

    settings = call.read(ValidateSettings)
    outputs = settings.output, settings.quarantine
    refuse_output(*outputs, overwrite=settings.overwrite)
    refuse_report(settings.report, *outputs, overwrite=settings.overwrite)
    if settings.quarantine is not None and settings.bad_lines == "fail":
        settings = settings.model_copy(update={"bad_lines": "skip"})
    bad = Quarantine()
    choice = RowChoice.of(settings, settings.category)
    corpus = read_corpus(settings.data, choice, settings.strict, bad.add)
    refuse_sources((*outputs, settings.report), [file.path for file in corpus.files])
    rows = [item.row for item in corpus.rows]
    examples = None
    if settings.model is not None:
        examples = build_rows(rows, *load_words(settings.model), settings)[1]
        corpus.rows = bad.divide(corpus.rows, examples.dropped)
    told = {"read": dataclasses.asdict(corpus.report), "examples": _asdict(examples)}
    if settings.report is not None:
        _write_report(settings.report, told)
    _write_rows(settings, corpus, bad)
    if not call.print_json(told):
        _print_findings(rows, corpus.report, examples)
        for path, count in ((settings.output, len(corpus.rows)), (settings.quarantine, len(bad))):
            if path is not None:
                say(f"{count:,} rows in {path}")
    if settings.strict:
        _refuse_losses(corpus.report, examples)


def _write_rows(settings: ValidateSettings, corpus: "Corpus", bad: "Quarantine") -> None:
    """Write the good rows, the bad ones, or both together, as asked."""
    from engine.data.corpus.publishing import CorpusReport, Making, publish
    from engine.data.corpus.reading import records
    from engine.data.corpus.writing import write_records

    others = None
    if settings.quarantine is not None:
        others = (settings.quarantine, bad.records(corpus.files))
    if settings.output is not None:
        left_out = {**corpus.losses, "bad": len(bad)}
        report = CorpusReport("validate", corpus.report.read, left_out=left_out)
        making = Making.of("validate", settings, corpus.origins)
        publish(settings.output, records(corpus.rows), making, report, others)
    elif others is not None:
        write_records(*others)


def _write_report(path: Path, told: dict[str, Any]) -> None:
    from engine.storage import durable

    durable.write_json(path, told)


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
        say(f"skipped {line}")
    say(
        f"{len(rows):,} of {read.read:,} rows are good: {len(read.skipped)} bad, "
        f"{read.below_rating} rated too low, {read.unrated} without a rating, "
        f"{read.other_category} of another category."
    )
    if report is not None:
        for line in report.dropped:
            say(f"dropped {line}")
        say(f"{report.describe()}.")


def stats(call: Call) -> None:
    """Count rows, turns, categories, ratings and duplicates; with --model also tokens."""
    from engine.data.corpus.reading import read_corpus
    from engine.data.corpus.similar import repeated
    from engine.data.dataset import RowChoice
    from engine.plots import refuse_foreign_picture

    settings = call.read(StatsSettings)
    if settings.plot is not None:
        refuse_foreign_picture(settings.plot)
    corpus = read_corpus(settings.data, RowChoice.of(settings, settings.category))
    rows, read = [item.row for item in corpus.rows], corpus.report
    characters = [sum(map(len, item.texts)) for item in corpus.rows]
    lengths, unit = characters, "characters"
    figures: dict[str, Any] = {
        "rows": len(rows),
        "left_out": len(read.skipped) + read.filtered,
        "forms": read.forms,
        "messages": sum(len(row.messages) for row in rows),
        "exact_duplicates": repeated(corpus.rows),
        "repeated_prompts": repeated(corpus.rows, "prompt"),
        "categories": dict(Counter(row.category or "none" for row in rows).most_common()),
        "tags": _counted(tag for item in corpus.rows for tag in item.record.get("tags", ())),
        "ratings": _counted(row.rating for row in rows),
        "schema_versions": _counted(row.schema_version for row in rows),
        "characters": _spread(characters),
    }
    if settings.model is not None:
        examples, report = build_rows(rows, *load_words(settings.model), settings)
        lengths, unit = [len(example) for example in examples], "tokens"
        figures["tokens"] = _spread(lengths)
        figures["trained_tokens"] = report.trained_tokens
        figures["all_tokens"] = report.tokens
        figures["trained_share"] = round(report.trained_tokens / max(report.tokens, 1), 4)
        figures["longest_uncut"] = report.longest
        figures["truncated"] = report.truncated
        figures["truncated_tokens"] = report.truncated_tokens
        figures["dropped"] = len(report.dropped)
    if settings.plot is not None:
        limit = settings.max_length if unit == "tokens" else None
        figures["plot"] = _plot(settings.plot, lengths, unit, limit)
    if not call.print_json(figures):
        _print_table(figures)


def _plot(path: Path, lengths: list[int], unit: str, limit: int | None) -> str:
    from engine.data.corpus.histogram import save_histogram

    save_histogram(path, lengths, unit, limit)
    return str(path)


def read_chosen_rows(settings: DataSettings) -> tuple[list["Row"], "ReadReport"]:
    """The rows that a table of settings chooses."""
    from engine.data.dataset import RowChoice, read_chosen

    return read_chosen(settings.data, RowChoice.of(settings, settings.category))


def load_words(model: str) -> tuple["Tokenizer", int]:
    """A model's tokenizer, and how many ids its embedding has."""
    from engine.model_sources.open import describe_model
    from engine.tokenization.tokenizer import load_tokenizer

    source = describe_model(model)
    return load_tokenizer(source), source.config.vocab_size


def build_rows(
    rows: Sequence["Row"],
    tokenizer: "Tokenizer",
    vocab_size: int,
    settings: DataSettings,
) -> tuple[list["Example"], "ExampleReport"]:
    """Tokenise rows as training would; where all are pairs, as training on preferences."""
    from engine.data.examples import ExampleSettings, check_ids, examples_of
    from engine.data.preferences import answer_examples
    from engine.data.rendering import Learning

    how = ExampleSettings(
        settings.max_length,
        settings.chat_template_kwargs,
        settings.bad_lines,
        Learning.of(settings),
    )
    if rows and all(row.is_pair for row in rows):
        examples, report = answer_examples(rows, tokenizer, how, "dpo")
    else:
        examples, report = examples_of(rows, tokenizer, how)
    check_ids(examples, vocab_size)
    return examples, report


def _asdict(report: "ExampleReport | None") -> dict[str, Any] | None:
    return None if report is None else dataclasses.asdict(report)


def _counted(values: Iterable[Any]) -> dict[str, int]:
    counts = Counter("none" if value is None else str(value) for value in values)
    return dict(sorted(counts.items()))


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
            value = ", ".join(f"{key} {number:,}" for key, number in value.items()) or "none"
        elif not isinstance(value, str):
            value = f"{value:,}"
        say(f"{name.replace('_', ' '):<{width}}  {value}")
