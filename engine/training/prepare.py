"""Prepare a run without weights: check it, tokenise rows, plan batches."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from engine.config.train_config import TrainConfig
from engine.data.batches.loader import BatchPlan, collate, split_heldout
from engine.data.batches.sequences import AnswerSet
from engine.data.batches.taught_stops import taught_stops
from engine.data.batches.weights import weighted_rows
from engine.data.dataset import BadLines, ReadReport, RowChoice, log_read, read_chosen
from engine.data.example_report import ExampleReport, judge, log_examples
from engine.data.examples import Example, ExampleSettings, check_ids, examples_of
from engine.data.preferences import answer_examples
from engine.data.rendering import Learning
from engine.data.rows import Row
from engine.data.sources.resolve import data_files
from engine.data.streaming.batch_stream import BatchStream
from engine.data.token_cache import cache_of, key_of, read_tokens, write_tokens
from engine.inference.parts import PartNames, categories_of, parts_of
from engine.model_sources.adapter.starting_point import InitAdapter
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import open_model_source
from engine.model_sources.scratch.open_base import describe_base, open_base
from engine.runs.identity import RunIdentity, digest_files, tokenizer_digest
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from engine.training.checks import check_model, check_request, check_run
from engine.training.evaluation.best import require_metric
from engine.training.evaluation.heldout import figure_names
from engine.training.init_adapter import open_init_adapter
from engine.training.streamed import open_stream
from models.config.model_config import ModelConfig
from models.layers.packed_batch import PackedBatch

log = logging.getLogger(__name__)


@dataclass
class Prepared:
    """Everything of a run that needs no weights."""

    config: TrainConfig
    model_source: ModelSource
    tokenizer: Tokenizer
    rows: RowSet
    plan: BatchPlan | BatchStream
    digests: dict[str, str]
    init: InitAdapter | None = None
    steps_per_epoch: int = field(init=False)
    total_steps: int = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        per_epoch = self.plan.steps_per_epoch
        streamed = isinstance(self.plan, BatchStream)
        self.steps_per_epoch = per_epoch if streamed else math.ceil(per_epoch / config.accumulate)
        self.total_steps = config.max_steps or config.epochs * self.steps_per_epoch

    @property
    def examples(self) -> list[Example]:
        """The examples to train on; of rows that are streamed the first ones."""
        return self.rows.examples

    @property
    def row_count(self) -> int:
        """How many examples an epoch has; of rows that are streamed, rows."""
        plan = self.plan
        return plan.stream.length if isinstance(plan, BatchStream) else len(self.examples)

    @property
    def lengths(self) -> list[int]:
        """Tokens of the examples, for a plan of the largest step; streamed ones may be full."""
        lengths = [len(example) for example in self.examples]
        if not isinstance(self.plan, BatchStream):
            return lengths
        return [self.config.max_length] * max(len(lengths), 2 * self.config.batch_size)

    @property
    def heldout(self) -> list[Example]:
        """The examples that are held out."""
        return self.rows.heldout

    @cached_property
    def parts(self) -> PartNames:
        """The categories and sources of the held-out rows, where there are several."""
        return parts_of(self.heldout, self.rows.categories)

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids that the rows teach as the end of an answer."""
        special = self.tokenizer.special_ids
        return taught_stops(self.examples, special, self.config.max_length)

    @property
    def identity(self) -> RunIdentity:
        """Which run this is."""
        return RunIdentity(self.config, self.digests, self.steps_per_epoch)

    def row_counts(self) -> dict[str, int]:
        """What became of the rows of the files, for the summary."""
        return {
            "rows_read": self.rows.read.read,
            "rows_skipped": len(self.rows.read.skipped),
            "rows_filtered": self.rows.read.filtered,
            "rows_truncated": self.rows.report.truncated,
            "rows_dropped": len(self.rows.report.dropped),
            "rows_trained": self.row_count,
            "rows_heldout": len(self.heldout),
            "heldout_rows_skipped": len(self.rows.read_heldout.skipped),
            "heldout_rows_dropped": len(self.rows.report_heldout.dropped),
        }

    def batches(self, step: int) -> tuple[list[PackedBatch], float]:
        """The micro-batches of a step, counted from 0, and the epoch reached after it."""
        if isinstance(self.plan, BatchStream):
            return self.plan.step(step)
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.config.accumulate
        last = min(first + self.config.accumulate, self.plan.steps_per_epoch)
        batches = [self._collated(self.plan.batch(epoch, micro)) for micro in range(first, last)]
        return batches, epoch + last / self.plan.steps_per_epoch

    def _collated(self, rows: Sequence[int]) -> PackedBatch:
        """These examples as one batch."""
        if self.config.learns_answers:
            return self.answers.batch(rows)
        return collate([self.examples[row] for row in rows])

    @property
    def answers(self) -> AnswerSet:
        """The examples to train on, where they are answers."""
        return AnswerSet(self.examples, self.config.max_length)

    @property
    def heldout_answers(self) -> AnswerSet:
        """The examples that are held out, where they are answers."""
        return AnswerSet(self.heldout, self.config.max_length)

    def trained_rows(self) -> list[int]:
        """The examples that the run's steps read, sorted."""
        if isinstance(self.plan, BatchStream) or self.total_steps >= self.steps_per_epoch:
            return list(range(len(self.examples)))
        micro = range(self.total_steps * self.config.accumulate)
        return sorted({row for index in micro for row in self.plan.batch(0, index)})

    def cursor(self, step: int) -> dict[str, int] | None:
        """Where rows that are streamed stand after `step` steps, for a checkpoint."""
        return self.plan.cursor(step) if isinstance(self.plan, BatchStream) else None

    def go_on(self, step: int, cursor: dict[str, Any] | None) -> None:
        """Go on after `step` steps, where a checkpoint's `cursor` says that the rows stood."""
        if isinstance(self.plan, BatchStream):
            self.plan.go_on(step, cursor)

    def close(self) -> None:
        """End what works ahead of the training."""
        if isinstance(self.plan, BatchStream):
            self.plan.close()


def prepare(
    config: TrainConfig,
    check: Callable[[ModelConfig], None] | None = None,
    planned: RowSet | None = None,
) -> Prepared:
    """Check the run, tokenise its rows and open the model's files; no weight is read.

    The weight files are opened last, when all that can be known without them is known to be good.
    `check` is given the model's shape before any row is read, and may refuse it. `planned` are rows
    that were read to plan this run: they serve where they would be read alike now. Raises
    `ConfigError`, `CheckpointError` or `DataError`.
    """
    machine = check_request(config)
    described = describe_base(config)
    adapter = check_model(config, described.config, machine)
    if check is not None:
        check(described.config)
    tokenizer = load_tokenizer(described, config.template_date)
    stream = open_stream(config, tokenizer, described.config.vocab_size)
    if stream is not None:
        rows = streamed_rows(config, stream, tokenizer, described.config.vocab_size)
    elif planned is not None and planned.settings == _row_settings(config, tokenizer):
        rows = planned
        rows.log()  # what was said of them then is in no log of this run
    else:
        rows = read_examples(config, tokenizer, described.config.vocab_size)
    config = packed_for(config, rows)
    source = open_base(config)
    digests = _digests(config, source, tokenizer, stream)
    init = open_init_adapter(config, adapter, source, digests["base"])
    check_run(config, source.config, *machine)
    plan = stream or _plan(config, rows.examples)
    prepared = Prepared(config, source, tokenizer, rows, plan, digests, init)
    if config.best_metric is not None:
        require_metric(config.best_metric, figure_names(prepared.heldout, prepared.parts))
    return prepared


@dataclass
class RowSet:
    """The rows of a run as examples, those held out, and what became of the others.

    `settings` are those that decide all this; `categories` are those of held-out rows, by where
    they stand.
    """

    examples: list[Example]
    heldout: list[Example]
    read: ReadReport
    read_heldout: ReadReport
    report: ExampleReport
    report_heldout: ExampleReport
    settings: tuple[Any, ...]
    categories: dict[str, str] = field(default_factory=dict)

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


def _row_settings(config: TrainConfig, tokenizer: Tokenizer) -> tuple[Any, ...]:
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
    settings = _row_settings(config, tokenizer)
    categories = categories_of(heldout_rows)
    return RowSet(
        examples, heldout, read, read_heldout, report, report_heldout, settings, categories
    )


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
    settings = _row_settings(config, tokenizer)
    reports = whole.read, read, whole.report, report
    return RowSet(stream.sample, heldout, *reports, settings, categories_of(rows))


def packed_for(config: TrainConfig, rows: RowSet) -> TrainConfig:
    """The settings, with packing where there are documents: every batch is to be full."""
    if config.packing or not rows.report.documents:
        return config
    log.info("%d documents are packed into rows of --max-length tokens", rows.report.documents)
    return config.model_copy(update={"packing": True})


def trained_choice(config: TrainConfig) -> RowChoice:
    """How the rows of `data` are read."""
    return replace(RowChoice.of(config, config.category), judged=config.objective == "kto")


def heldout_choice(config: TrainConfig) -> RowChoice:
    """How the rows of `eval_data` are read."""
    judged = config.objective == "kto"
    return RowChoice(None, None, config.bad_lines, config.eval_query, config.map, judged)


def _plan(config: TrainConfig, examples: list[Example]) -> BatchPlan:
    return BatchPlan(
        examples,
        batch_size=config.batch_size,
        seed=config.seed,
        packing=config.packing,
        max_length=config.max_length,
    )


def _digests(
    config: TrainConfig, source: ModelSource, tokenizer: Tokenizer, stream: BatchStream | None
) -> dict[str, str]:
    """What decides a run's rows and weights, by name (`engine.runs.identity`)."""
    template = "\0".join(tokenizer.chat_template.sources).encode(errors="surrogatepass")
    digests = {
        "base": source.digest(),
        "data": stream.digest
        if stream is not None
        else digest_files(data_files(config.data, config.query)),
        "template": hashlib.sha256(template).hexdigest(),
        "tokenizer": tokenizer_digest(source.tokenizer_files()),
    }
    if config.eval_data:
        digests["eval_data"] = digest_files(data_files(config.eval_data, config.eval_query))
    if config.teacher is not None:
        digests["teacher"] = open_model_source(config.teacher).digest()
    if config.reference not in (None, "base"):
        digests["reference"] = open_model_source(config.reference).digest()
    return digests


def with_system(row: Row, prompt: str | None) -> Row:
    """The row with a system message in front of its messages, unless it has one."""
    if prompt is None or any(
        message["role"] in ("system", "developer") for message in row.messages
    ):
        return row
    front: list[dict[str, Any]] = [{"role": "system", "content": prompt}]
    rejected = None if row.rejected is None else [*front, *row.rejected]
    return replace(row, messages=[*front, *row.messages], rejected=rejected)
