"""`engine data pairs`, `extract`, `synth` and `tokenizer`: rows and words made anew."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.from_settings import Call
from cli.say import say
from cli.tools.corpus import tell
from engine.config.tasks.corpus import (
    ExtractSettings,
    MadeOutput,
    PairsSettings,
    SynthSettings,
    TokenizerSettings,
)

if TYPE_CHECKING:
    from engine.data.corpus.publishing import CorpusReport
    from engine.data.corpus.records import Record
    from engine.data.makers.markdown import Page
    from engine.data.origins import Origin


def pairs(call: Call) -> None:
    """Make rows of Markdown pages with front matter and fenced code."""
    from engine.data.corpus.publishing import CorpusReport
    from engine.data.corpus.reading import read_corpus, records
    from engine.data.corpus.writing import refuse_output
    from engine.data.dataset import RowChoice
    from engine.data.makers.markdown import SUFFIXES, page_rows
    from engine.data.origins import Origin

    settings = call.read(PairsSettings)
    refuse_output(settings.output, overwrite=settings.overwrite)
    report, rows, origins = CorpusReport("pairs"), list["Record"](), list[Origin]()
    if settings.data:
        corpus = read_corpus(settings.data, RowChoice(), settings.strict)
        rows, origins, report.read = records(corpus.rows), corpus.origins, corpus.report.read
    counts, faults = Counter[str](), list[str]()
    for folder in map(Path, settings.docs):
        origins.append(Origin.of_path(folder, () if folder.is_file() else SUFFIXES))
        for file in _pages(folder):
            page = _page(file, faults)
            if page is None:
                continue
            reason = _not_eligible(page, settings.all_pages)
            if reason is None:
                new = page_rows(page, str(file), settings.fence, settings.mode)
                reason = "used_pages" if new else "pages_without_anything_to_take"
                rows += new
            counts[reason] += 1
    report.figures |= {"used_pages": counts.pop("used_pages", 0)}
    _finish(call, settings, report, rows, origins, counts, faults)


def _pages(path: Path) -> list[Path]:
    """The pages of a folder, or the one that is named."""
    from engine.data.makers.markdown import SUFFIXES
    from engine.data.origins import files_below
    from engine.errors import DataError

    pages = [path] if path.is_file() else files_below(path, SUFFIXES) if path.is_dir() else []
    if not pages:
        raise DataError(f"{path}: there are no Markdown pages (.md) here; check --docs.")
    return pages


def _page(file: Path, faults: list[str]) -> "Page | None":
    from engine.data.makers.markdown import PageFault, read_page

    try:
        return read_page(file.read_text("utf-8"), file.stem)
    except PageFault as fault:
        faults.append(f"{file}: found {fault}")
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{file}: the page cannot be read ({error})")
    return None


def _not_eligible(page: "Page", all_pages: bool) -> str | None:
    """Why a page gives no rows; None if it does."""
    if page.eligible:
        return None
    if page.about.get("training_eligible") is False:
        return "pages_not_eligible"
    return None if all_pages else "pages_that_do_not_say_training_eligible"


def extract(call: Call) -> None:
    """Make rows of the documented functions and classes of sources.

    Of Python anywhere, of JavaScript, TypeScript, Go, Rust, Java, C, C++, Ruby and C# with the
    extra `code`.
    """
    from engine.data.corpus.publishing import CorpusReport
    from engine.data.corpus.writing import refuse_output
    from engine.data.makers.code import ExtractLimits, code_rows, source_files, source_path
    from engine.data.makers.syntax_trees import GRAMMARS, missing_grammar, tree_rows
    from engine.data.origins import Origin

    settings = call.read(ExtractSettings)
    refuse_output(settings.output, overwrite=settings.overwrite)
    limits = ExtractLimits(settings.fewest_lines, settings.most_lines, settings.private)
    rows, origins = list["Record"](), list[Origin]()
    counts, faults, files = Counter[str](), list[str](), 0
    suffixes, missing = (".py", *GRAMMARS), Counter[str]()
    for path in map(source_path, settings.source):
        origins.append(Origin.of_path(path, () if path.is_file() else suffixes))
        for file in source_files(path, suffixes):
            language = missing_grammar(file) if file.suffix in GRAMMARS else None
            if language is not None:
                missing[language] += 1
                continue
            make = tree_rows if file.suffix in GRAMMARS else code_rows
            files += 1
            try:
                rows += make(file, settings.task, limits, counts)
            except (SyntaxError, ValueError, OSError) as error:
                faults.append(f"{file}: the file cannot be parsed ({error})")
    for name, count in sorted(missing.items()):
        counts["without_a_grammar"] += count
        faults.append(
            f"{count} files of {name} are left out: their grammar is not installed (pip install "
            "'engine-trainer[code]')"
        )
    if settings.limit is not None:
        counts["beyond_the_limit"] = max(0, len(rows) - settings.limit)
        rows = rows[: settings.limit]
    report = CorpusReport("extract", figures={"files": files})
    _finish(call, settings, report, rows, origins, counts, faults)


def synth(call: Call) -> None:
    """Make rows of templates whose variables take values from lists."""
    from engine.data.corpus.publishing import CorpusReport
    from engine.data.corpus.writing import refuse_output
    from engine.data.makers.templates import expand
    from engine.data.origins import Origin
    from engine.errors import DataError
    from engine.storage.safe_files import MIB, read_given

    settings = call.read(SynthSettings)
    refuse_output(settings.output, overwrite=settings.overwrite)
    file, limit = settings.templates, 64 * MIB
    try:
        data = read_given(file, limit)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: the templates cannot be read ({error}).") from None
    if len(data) > limit:
        raise DataError(f"{file} is over {limit // MIB} MiB, too long for a file of templates.")
    rows, counts = expand(text, str(file), settings.limit, settings.seed)
    report, origins = CorpusReport("synth"), [Origin.of_path(file)]
    _finish(call, settings, report, rows, origins, counts, [])


def tokenizer(call: Call) -> None:
    """Train a byte-level BPE tokenizer on rows."""
    from engine.data.corpus.reading import read_corpus
    from engine.data.dataset import RowChoice
    from engine.data.makers.vocabulary import train_tokenizer
    from engine.data.origins import write_origins
    from engine.storage.durable import refuse_occupied

    settings = call.read(TokenizerSettings)
    refuse_occupied(settings.output_dir)
    corpus = read_corpus(settings.data, RowChoice.of(settings, settings.category))
    texts = [text for item in corpus.rows for text in item.texts if text]
    asked = settings.model_dump(mode="json", exclude={"output_dir"})
    counts = {"read": corpus.report.read, **corpus.losses}

    def describe(folder: Path) -> None:
        write_origins(
            settings.output_dir, "tokenizer", asked, corpus.origins, counts, content=folder
        )

    trained = train_tokenizer(
        texts, settings.output_dir, settings.vocab_size, settings.special, describe
    )
    per_token = round(trained.text_bytes / max(trained.tokens, 1), 3)
    told: dict[str, Any] = {"vocab_size": trained.size, "bytes_per_token": per_token, **counts}
    if not call.print_json(told):
        say(f"{trained.size:,} ids in {settings.output_dir}, {per_token} bytes a token")
        if trained.size < settings.vocab_size:
            say(f"{settings.vocab_size:,} were asked for; the text has no more pairs to merge")


def _finish(
    call: Call,
    settings: MadeOutput,
    report: "CorpusReport",
    rows: list["Record"],
    origins: list["Origin"],
    counts: Counter[str],
    faults: list[str],
) -> None:
    """Count what could not be used, write the rows, and tell."""
    from engine.data.corpus.publishing import Making, publish
    from engine.errors import DataError

    report.left_out |= {name: count for name, count in sorted(counts.items()) if count}
    if faults:
        if settings.strict:
            raise DataError(f"{len(faults):,} files cannot be used (--strict): {faults[0]}")
        report.left_out["files_that_cannot_be_used"] = len(faults)
    if not rows:
        reasons = ", ".join(f"{n:,} {why.replace('_', ' ')}" for why, n in report.left_out.items())
        raise DataError(f"There are no rows to write; left out: {reasons or 'nothing'}.")
    publish(settings.output, rows, Making.of(report.tool, settings, origins), report)
    tell(call, report, faults)
