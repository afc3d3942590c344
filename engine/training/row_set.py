"""Read and tokenise the rows of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.config.train_config import TrainConfig
from engine.data.batches.loader import split_heldout
from engine.data.batches.sequences import AnswerSet
from engine.data.batches.weights import weighted_rows
from engine.data.dataset import BadLines, ReadReport, RowChoice, log_read, read_chosen
from engine.data.example_report import ExampleReport, judge, log_examples
from engine.data.examples import Example, ExampleSettings, check_ids, examples_of
from engine.data.preferences import answer_examples
from engine.data.rendering import Learning
from engine.data.rows import Row
from engine.data.streaming.batch_stream import BatchStream
from engine.data.token_cache import cache_of, key_of, read_tokens, write_tokens
from engine.inference.parts import PartNames, categories_of, parts_of
from engine.tokenization.tokenizer import Tokenizer
from engine.training.evaluation.best import require_metric
from engine.training.evaluation.heldout import figure_names

log = logging.getLogger(__name__)


@dataclass
class RowSet:
    """The rows of a run as examples, those held out, and what became of the others.

    `settings` are those that decide all this; `parts` are categories and sources of held-out rows.
    """

    examples: list[Example]
    heldout: list[Example]
    read: ReadReport
    read_heldout: ReadReport
    report: ExampleReport
    report_heldout: ExampleReport
    settings: tuple[Any, ...]
    parts: PartNames = field(default_factory=PartNames)

    def lengths(self, config: TrainConfig) -> tuple[int, ...]:
        """Tokens that each example to train on lays into a batch."""
        answers = AnswerSet(self.examples, config.max_length, config.share_prompt)
        return tuple(answers.length(index) for index in range(len(self.examples)))

    def log(self) -> None:
        """Log what is logged as the rows are read."""
        for read in (self.read, self.read_heldout):
            log_read(read)
        for report in (self.report, self.report_heldout):
            if report.rows:
                log_examples(report)


_DECIDING_ROWS = (
    "model",
    "revision",
    "method",
    "tokenizer",
    "data",
    "eval_data",
    "heldout",
    "seed",
    "limit_rows",
    "min_rating",
    "category",
    "bad_lines",
    "max_row_bytes",
    "max_length",
    "system_prompt",
    "chat_template_kwargs",
    "query",
    "eval_query",
    "map",
    "train_on",
    "thinking",
    "objective",
)


def row_settings(config: TrainConfig, tokenizer: Tokenizer) -> tuple[Any, ...]:
    """What decides which examples there are; the date does where the template reads it."""
    date = config.template_date if tokenizer.chat_template.reads_clock else None
    return (*(getattr(config, name) for name in _DECIDING_ROWS), date)


def read_examples(config: TrainConfig, tokenizer: Tokenizer, vocab_size: int) -> RowSet:
    """Read and tokenise the rows to train on and those held out.

    Raises `DataError` naming a row that cannot be used, where `bad_lines` does not allow it.
    """
    rows, heldout_rows, read, read_heldout = rows_of_run(config)
    examples, report = examples_of_run(config, weighted_rows(rows, config.seed), tokenizer)
    heldout, report_heldout = list[Example](), ExampleReport()
    if heldout_rows:
        heldout, report_heldout = examples_of_run(config, heldout_rows, tokenizer)
        _tell_shared(examples, heldout)
    check_ids([*examples, *heldout], vocab_size)
    _tell_unknown(examples, tokenizer)
    settings = row_settings(config, tokenizer)
    parts = _parts(config, heldout, heldout_rows)
    return RowSet(examples, heldout, read, read_heldout, report, report_heldout, settings, parts)


def _parts(config: TrainConfig, heldout: list[Example], rows: Sequence[Row]) -> PartNames:
    """Categories and sources of held-out rows; raises `ConfigError` where `save_best` is none."""
    parts = parts_of(heldout, categories_of(rows))
    if config.best_metric is not None:
        require_metric(config.best_metric, figure_names(config, heldout, parts))
    return parts


def rows_of_run(config: TrainConfig) -> tuple[list[Row], list[Row], ReadReport, ReadReport]:
    """The rows to train on and those held out, with what was left out of each.

    Raises `DataError`.
    """
    rows, read = read_chosen(config.data, trained_choice(config))
    rows, heldout, read_heldout = rows[: config.limit_rows], list[Row](), ReadReport()
    if config.eval_data:
        heldout, read_heldout = read_chosen(config.eval_data, heldout_choice(config))
    if config.heldout:
        rows, heldout = split_heldout(rows, config.heldout, config.seed)
    return rows, heldout, read, read_heldout


def examples_of_run(
    config: TrainConfig, rows: Sequence[Row], tokenizer: Tokenizer
) -> tuple[list[Example], ExampleReport]:
    """These rows as the run tokenises them, or as they were stored. Raises `DataError`.

    Preferences are tokenised in every start.
    """
    how = ExampleSettings(
        config.max_length, config.chat_template_kwargs, config.bad_lines, Learning.of(config)
    )
    rows = [with_system(row, config.system_prompt) for row in rows]
    if config.learns_answers:
        return answer_examples(rows, tokenizer, how, config.objective)
    folder = cache_of(config.token_cache, rows)
    if folder is None:
        return examples_of(rows, tokenizer, how)
    key = key_of(rows, tokenizer, how)
    stored = read_tokens(folder, key)
    if stored is not None:
        judge(stored[1], how.max_length, BadLines.parse(how.bad_rows))
        return stored
    made = examples_of(rows, tokenizer, how)
    write_tokens(folder, key, made)
    return made


def _tell_shared(examples: list[Example], heldout: list[Example]) -> None:
    """Warn where held-out rows are trained on too, so that their loss says nothing of new ones."""
    trained = {(example.ids.tobytes(), example.mask.tobytes()) for example in examples}
    shared = sum((example.ids.tobytes(), example.mask.tobytes()) in trained for example in heldout)
    if shared:
        log.warning(
            "%d of %d held-out rows stand among the rows to train on too: what they measure is "
            "partly memory, not what is learnt for other rows", shared, len(heldout),
        )  # fmt: skip


def _tell_unknown(examples: list[Example], tokenizer: Tokenizer) -> None:
    """Warn of text that the tokenizer has no tokens for, which the model never reads."""
    name = tokenizer.special_tokens.get("unk_token")
    unknown = None if name is None else tokenizer.token_to_id(name)
    if unknown is None:
        return
    counts = [int((example.ids == unknown).sum()) for example in examples]
    if any(counts):
        first = examples[next(index for index, count in enumerate(counts) if count)].source
        log.warning(
            "%d tokens in %d of %d rows are %s (first in %s): the tokenizer has none for what "
            "stands there, so the model neither reads nor learns it",
            sum(counts), sum(map(bool, counts)), len(counts), name, first,
        )  # fmt: skip


def streamed_rows(
    config: TrainConfig, stream: BatchStream, tokenizer: Tokenizer, vocab_size: int
) -> RowSet:
    """The first rows of a stream as examples, and all that are held out."""
    rows: Sequence[Row] = stream.stream.heldout_rows()
    heldout, read, report = stream.stream.examples_of(rows), ReadReport(), ExampleReport()
    if config.eval_data:
        rows, read = read_chosen(config.eval_data, heldout_choice(config))
        heldout, report = examples_of_run(config, rows, tokenizer)
        check_ids(heldout, vocab_size)
    whole = stream.stream
    _tell_unknown(stream.sample, tokenizer)
    settings = row_settings(config, tokenizer)
    reports = whole.read, read, whole.report, report
    return RowSet(stream.sample, heldout, *reports, settings, _parts(config, heldout, rows))


def trained_choice(config: TrainConfig) -> RowChoice:
    """How the rows of `data` are read."""
    return replace(RowChoice.of(config, config.category), judged=config.objective == "kto")


def heldout_choice(config: TrainConfig) -> RowChoice:
    """How the rows of `eval_data` are read."""
    return replace(trained_choice(config), min_rating=None, category=None, query=config.eval_query)


def with_system(row: Row, prompt: str | None) -> Row:
    """The row with a system message in front of its messages, unless it has one."""
    if prompt is None or any(
        message["role"] in ("system", "developer") for message in row.messages
    ):
        return row
    front: list[dict[str, Any]] = [{"role": "system", "content": prompt}]
    rejected = None if row.rejected is None else [*front, *row.rejected]
    return replace(row, messages=[*front, *row.messages], rejected=rejected)
