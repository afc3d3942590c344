"""`engine data convert`, `split`, `dedup`, `decontaminate` and `mix`: rows into rows."""

import dataclasses
from typing import TYPE_CHECKING, Any

from cli.from_settings import Call
from cli.say import say
from engine.config.tasks.corpus import (
    ConvertSettings,
    CorpusSettings,
    DecontaminateSettings,
    DedupSettings,
    MixSettings,
    MixSource,
    SplitSettings,
)
from engine.storage.home import expanded

if TYPE_CHECKING:
    from engine.data.corpus.publishing import CorpusReport
    from engine.data.corpus.reading import Corpus
    from engine.data.origins import Origin


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
    tell(call, report, refused)


def split(call: Call) -> None:
    """Divide rows into training and held-out ones; what is alike stays on one side."""
    from engine.data.corpus.publishing import Making, publish_all
    from engine.data.corpus.split import linked_rows, split_rows
    from engine.data.corpus.writing import refuse_output

    settings = call.read(SplitSettings)
    shares = {"train": 1.0, "heldout": settings.heldout, "test": settings.test}
    outputs = {
        side: settings.output_dir / f"{side}.jsonl" for side, share in shares.items() if share
    }
    refuse_output(*outputs.values(), overwrite=settings.overwrite)
    corpus, report = _start("split", settings)
    threshold = None if settings.exact else settings.threshold
    sets = linked_rows(corpus.rows, settings.group_by, threshold)
    sides = split_rows(corpus.rows, sets, {s: shares[s] for s in outputs}, settings.seed)
    report.figures["sets_of_rows"] = len(sets)
    report.figures["largest_set"] = max(map(len, sets))
    making = Making.of("split", settings, corpus.origins)
    records = {
        path: [corpus.rows[row].record for row in sides[side]] for side, path in outputs.items()
    }
    publish_all(records, making, report)
    tell(call, report)


def dedup(call: Call) -> None:
    """Keep one row of those that are equal, or nearly."""
    from engine.data.corpus.dedup import repeats_of
    from engine.data.corpus.publishing import Making, publish
    from engine.data.corpus.reading import records
    from engine.data.corpus.writing import refuse_output

    settings = call.read(DedupSettings)
    refuse_output(settings.output, settings.removed, overwrite=settings.overwrite)
    corpus, report = _start("dedup", settings)
    rows = corpus.rows
    threshold = None if settings.exact else settings.threshold
    stay, repeats = repeats_of(rows, settings.compare, threshold)
    exact = sum(repeat.exact for repeat in repeats)
    report.left_out |= {"exact_duplicates": exact, "near_duplicates": len(repeats) - exact}
    removed = [
        {**rows[r.row].record, "duplicate_of": rows[r.original].row.source, "exact": r.exact}
        for r in repeats
    ]
    making = Making.of("dedup", settings, corpus.origins)
    others = None if settings.removed is None else (settings.removed, removed)
    publish(settings.output, records(rows[row] for row in stay), making, report, others)
    tell(call, report)


def decontaminate(call: Call) -> None:
    """Leave out rows that share runs of words with held-out ones."""
    from engine.data.corpus.decontaminate import HeldoutRuns, contaminated_rows
    from engine.data.corpus.publishing import Making, publish
    from engine.data.corpus.reading import read_corpus
    from engine.data.corpus.writing import refuse_output
    from engine.data.dataset import RowChoice
    from engine.data.sources.streams.located import RowLimit

    settings = call.read(DecontaminateSettings)
    refuse_output(settings.output, settings.removed, overwrite=settings.overwrite)
    against = read_corpus(
        settings.against,
        RowChoice(bad_lines=settings.bad_lines, limit=RowLimit(settings.max_row_bytes)),
    )
    heldout = HeldoutRuns(settings.ngram)
    for item in against.rows:
        heldout.add(item)
    corpus, report = _start("decontaminate", settings)
    shared = {match.row: match for match in contaminated_rows(corpus.rows, heldout)}
    report.left_out["contaminated"] = len(shared)
    report.figures["held_out_rows"] = len(against.rows)
    report.figures["held_out_rows_too_short_to_recognise"] = heldout.ignored
    clean = [item.record for row, item in enumerate(corpus.rows) if row not in shared]
    removed = [
        {**corpus.rows[row].record, "contaminated_by": match.heldout, "shared": match.words}
        for row, match in shared.items()
    ]
    origins = [*corpus.origins, *against.origins]
    others = None if settings.removed is None else (settings.removed, removed)
    making = Making.of("decontaminate", settings, origins)
    publish(settings.output, clean, making, report, others)
    lines = [f"{row['source']} shares with {row['contaminated_by']}" for row in removed[:10]]
    tell(call, report, lines)


def mix(call: Call) -> None:
    """Mix sources in the proportions that a YAML file names."""
    from engine.data.corpus.mix import MixPart, mix_rows
    from engine.data.corpus.publishing import CorpusReport, Making, publish
    from engine.data.corpus.writing import refuse_output, refuse_report
    from engine.storage import durable
    from engine.storage.standing import refuse_sources

    settings = call.read(MixSettings)
    refuse_output(settings.output, overwrite=settings.overwrite)
    refuse_report(settings.report, settings.output, overwrite=settings.overwrite)
    report, parts = CorpusReport("mix"), list[MixPart]()
    origins: list[Origin] = []
    absent = []
    for number, source in enumerate(settings.sources, 1):
        name = source.name or ", ".join(source.path)
        corpus = _mix_source(source, settings)
        if corpus is None:
            absent.append(name)
            continue
        name = f"{name} ({number})" if any(part.name == name for part in parts) else name
        parts.append(MixPart(name, corpus.rows, source.rate, source.weight))
        origins += corpus.origins
        report.read += corpus.report.read
        for reason, count in corpus.losses.items():
            report.left_out[reason] = report.left_out.get(reason, 0) + count
    rows, figures = mix_rows(parts, settings.rows, settings.seed)
    report.left_out["not_drawn"] = sum(told["read"] - told["used"] for told in figures.values())
    report.figures = {**figures, "absent": ", ".join(absent)}
    refuse_sources((settings.output, settings.report), [origin.content for origin in origins])
    if settings.report is not None:
        # Before the rows: where they stand, a second start is refused.
        told = {**dataclasses.asdict(report), "outputs": {str(settings.output): len(rows)}}
        durable.write_json(settings.report, told)
    publish(settings.output, rows, Making.of("mix", settings, origins), report)
    tell(call, report)


def _mix_source(source: MixSource, settings: MixSettings) -> "Corpus | None":
    """The rows of a source; None where it may be absent, and is."""
    import logging

    from engine.data.corpus.reading import read_corpus
    from engine.data.dataset import RowChoice
    from engine.data.sources.streams.located import RowLimit
    from engine.errors import DataError

    local = [expanded(path) for path in source.path]
    if source.optional and not all(path.exists() for path in local):
        if settings.strict:
            raise DataError(f"{', '.join(source.path)} is absent (--strict).")
        logging.getLogger(__name__).warning("%s is absent and optional", ", ".join(source.path))
        return None
    choice = RowChoice(
        source.min_rating,
        source.category,
        settings.bad_lines,
        source.query,
        source.map,
        limit=RowLimit(settings.max_row_bytes),
    )
    return read_corpus(source.path, choice, settings.strict)


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


def tell(call: Call, report: "CorpusReport", more: list[str] | None = None) -> None:
    """Print what a tool did, after the first of `more`."""
    told: dict[str, Any] = dataclasses.asdict(report)
    if not call.print_json(told):
        for line in (*(more or [])[:20], *report.lines()):
            say(line)
