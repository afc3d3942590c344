"""`engine data convert`, `split`, `dedup`, `decontaminate` and `mix`: rows into rows."""

import dataclasses
from typing import TYPE_CHECKING, Any

from cli.from_settings import Call
from engine.config.tasks.corpus import ConvertSettings, CorpusSettings

if TYPE_CHECKING:
    from engine.data.corpus.publishing import CorpusReport
    from engine.data.corpus.reading import Corpus


def convert(call: Call) -> None:
    """Write rows of any source as JSON Lines or Parquet, in any of the shapes."""
    from engine.data.corpus.convert import convert_rows
    from engine.data.corpus.publishing import Making, publish
    from engine.data.corpus.writing import refuse_output
    from engine.data.dataset import BadLines
    from engine.errors import DataError

    settings = call.read(ConvertSettings)
    refuse_output(settings.output, overwrite=settings.overwrite)
    corpus, report = _start("convert", settings)
    rows, refused = convert_rows(corpus.rows, settings.shape)
    policy = BadLines.parse(settings.bad_lines)
    if refused and not (policy.skip and len(refused) <= policy.at_most * corpus.report.read):
        raise DataError(
            f"{len(refused):,} of {len(corpus.rows):,} rows cannot be written as "
            f"{settings.shape}; the first is {refused[0]}. Choose another --shape, or leave them "
            "out with --bad-lines skip."
        )
    report.left_out["of_another_shape"] = len(refused)
    publish(settings.output, rows, Making.of("convert", settings, corpus.origins), report)
    _tell(call, report, refused)


def _start(tool: str, settings: CorpusSettings) -> tuple["Corpus", "CorpusReport"]:
    """The rows that a table of settings chooses, and the report to go on with."""
    from engine.data.corpus.publishing import CorpusReport
    from engine.data.corpus.reading import read_corpus
    from engine.data.dataset import RowChoice
    from engine.errors import DataError

    choice = RowChoice.of(settings, settings.category)
    corpus = read_corpus(settings.data, choice, settings.strict)
    if settings.strict and corpus.report.skipped:
        raise DataError(
            f"{len(corpus.report.skipped):,} rows are bad (--strict); the first is "
            f"{corpus.report.skipped[0]}"
        )
    return corpus, CorpusReport(tool, corpus.report.read, left_out=corpus.losses)


def _tell(call: Call, report: "CorpusReport", more: list[str] | None = None) -> None:
    told: dict[str, Any] = dataclasses.asdict(report)
    if not call.print_json(told):
        for line in (*(more or [])[:20], *report.lines()):
            print(line)
