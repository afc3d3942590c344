"""Prepare a run without weights: check it, tokenise rows, plan batches."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from engine.config.train_config import TrainConfig
from engine.data.batches.loader import BatchPlan, collate
from engine.data.batches.sequences import AnswerSet
from engine.data.batches.taught_stops import taught_stops
from engine.data.examples import Example
from engine.data.sources.resolve import data_files
from engine.data.streaming.batch_stream import BatchStream
from engine.distributed.dealing import Dealer
from engine.inference.parts import PartNames
from engine.model_sources.adapter.starting_point import InitAdapter
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import open_model_source
from engine.model_sources.scratch.open_base import describe_base, open_base
from engine.runs.identity import RunIdentity, digest_files, tokenizer_digest
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from engine.training.checks import check_model, check_request, check_run
from engine.training.evaluation.samples import SamplePrompts, sample_prompts
from engine.training.init_adapter import open_init_adapter
from engine.training.row_set import RowSet, read_examples, row_settings, streamed_rows
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
    samples: SamplePrompts | None = None
    dealer: Dealer | None = None
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
        lengths = list(self.rows.lengths(self.config))
        if not isinstance(self.plan, BatchStream):
            return lengths
        return [self.config.max_length] * max(len(lengths), 2 * self.config.batch_size)

    @property
    def heldout(self) -> list[Example]:
        """The examples that are held out."""
        return self.rows.heldout

    @property
    def parts(self) -> PartNames:
        """The categories and sources of the held-out rows, where there are several."""
        return self.rows.parts

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
        """The micro-batches of a step, counted from 0, and the epoch reached after it.

        With a `dealer` they are those of this process.
        """
        if isinstance(self.plan, BatchStream):
            read, epoch_after = self.plan.step(step)
            examples = [example for micro in read for example in micro]
            numbers = iter(range(len(examples)))
            micros = [[next(numbers) for _ in micro] for micro in read]
            return self._shared(micros, partial(_collated_of, examples), examples), epoch_after
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.config.accumulate
        last = min(first + self.config.accumulate, self.plan.steps_per_epoch)
        micros = [self.plan.batch(epoch, micro) for micro in range(first, last)]
        batches = self._shared(micros, self._collated, self.examples)
        return batches, epoch + last / self.plan.steps_per_epoch

    def _shared(
        self,
        micros: Sequence[Sequence[int]],
        collated: Callable[[Sequence[int]], PackedBatch],
        examples: Sequence[Example],
    ) -> list[PackedBatch]:
        """The batches of these rows, or of those of them that are dealt to this process."""
        if self.dealer is None:
            return [collated(rows) for rows in micros]
        length = self.answers.length if self.config.learns_answers else lambda n: len(examples[n])
        pieces, idle = self.dealer.share(micros, length)
        own = [collated(p.rows).part_of(p.micro, p.first_token) for p in pieces]
        return own + [PackedBatch.idle()] * idle

    def _collated(self, rows: Sequence[int]) -> PackedBatch:
        """These examples as one batch."""
        if self.config.learns_answers:
            return self.answers.batch(rows)
        return _collated_of(self.examples, rows)

    @property
    def answers(self) -> AnswerSet:
        """The examples to train on, where they are answers."""
        return AnswerSet(self.examples, self.config.max_length, self.config.share_prompt)

    @property
    def heldout_answers(self) -> AnswerSet:
        """The examples that are held out, where they are answers."""
        return AnswerSet(self.heldout, self.config.max_length, self.config.share_prompt)

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


def _collated_of(examples: Sequence[Example], rows: Sequence[int]) -> PackedBatch:
    return collate([examples[row] for row in rows], weighted=True)


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
    elif planned is not None and planned.settings == row_settings(config, tokenizer):
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
    samples = sample_prompts(config, source, tokenizer, source.config)
    return Prepared(config, source, tokenizer, rows, plan, digests, init, samples)


def packed_for(config: TrainConfig, rows: RowSet) -> TrainConfig:
    """The settings, with packing where there are documents: every batch is to be full."""
    if config.packing or not rows.report.documents:
        return config
    log.info("%d documents are packed into rows of --max-length tokens", rows.report.documents)
    return config.model_copy(update={"packing": True})


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
