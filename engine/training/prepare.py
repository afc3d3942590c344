"""Prepare a run without weights: open files, tokenise rows, plan batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from engine.config.train_config import TrainConfig
from engine.data.dataset import ReadReport, load_rows, read_rows
from engine.data.examples import Example, ExampleReport, build_examples, check_ids
from engine.data.loader import BatchPlan, collate, split_heldout
from engine.data.rows import Row
from engine.model_sources.interface.model_source import ModelSource
from engine.model_sources.open import open_model_source
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from models.config.model_config import ModelConfig
from models.layers.packed_batch import PackedBatch


@dataclass
class Prepared:
    """Everything of a run that needs no weights."""

    config: TrainConfig
    model_source: ModelSource
    tokenizer: Tokenizer
    examples: list[Example]
    heldout: list[Example]
    plan: BatchPlan
    read: ReadReport
    report: ExampleReport
    steps_per_epoch: int = field(init=False)
    total_steps: int = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        self.steps_per_epoch = math.ceil(self.plan.steps_per_epoch / config.accumulate)
        self.total_steps = config.max_steps or config.epochs * self.steps_per_epoch

    def row_counts(self) -> dict[str, int]:
        """What became of the rows of the files, for the summary."""
        return {
            "rows_read": self.read.read,
            "rows_skipped": len(self.read.skipped),
            "rows_filtered": self.read.filtered,
            "rows_truncated": self.report.truncated,
            "rows_dropped": len(self.report.dropped),
            "rows_trained": len(self.examples),
            "rows_heldout": len(self.heldout),
        }

    def batches(self, step: int) -> tuple[list[PackedBatch], float]:
        """The micro-batches of a step, counted from 0, and the epoch reached after it."""
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.config.accumulate
        last = min(first + self.config.accumulate, self.plan.steps_per_epoch)
        batches = [
            collate([self.examples[row] for row in self.plan.batch(epoch, micro)])
            for micro in range(first, last)
        ]
        return batches, epoch + last / self.plan.steps_per_epoch


def prepare(config: TrainConfig, check: Callable[[ModelConfig], None] | None = None) -> Prepared:
    """Open the model's files and tokenise the data; no weight is read.

    `check` is given the model's shape before any row is read, and may refuse it. Raises
    `ConfigError`, `CheckpointError` or `DataError`.
    """
    source = open_model_source(config.model, config.revision)
    if check is not None:
        check(source.config)
    tokenizer = load_tokenizer(source)
    rows, read = read_rows(list(config.data), config.min_rating, config.category, config.bad_lines)
    rows = rows[: config.limit_rows]
    heldout_rows = load_rows(list(config.eval_data)) if config.eval_data else []
    if config.heldout:
        rows, heldout_rows = split_heldout(rows, config.heldout, config.seed)
    rows = [_with_system(row, config.system_prompt) for row in rows]
    heldout_rows = [_with_system(row, config.system_prompt) for row in heldout_rows]
    bad_rows = "fail" if config.bad_lines == "fail" else "skip"
    render = partial(
        build_examples,
        tokenizer=tokenizer,
        max_length=config.max_length,
        template_kwargs=config.chat_template_kwargs,
        bad_rows=bad_rows,
    )
    examples, report = render(rows)
    heldout: list[Example] = []
    if heldout_rows:
        heldout, _ = render(heldout_rows)
    check_ids([*examples, *heldout], source.config.vocab_size)
    plan = BatchPlan(
        examples,
        batch_size=config.batch_size,
        seed=config.seed,
        packing=config.packing,
        max_length=config.max_length,
    )
    return Prepared(config, source, tokenizer, examples, heldout, plan, read, report)


def _with_system(row: Row, prompt: str | None) -> Row:
    """The row with a system message in front, unless it has one."""
    if prompt is None or any(message["role"] == "system" for message in row.messages):
        return row
    return replace(row, messages=[{"role": "system", "content": prompt}, *row.messages])
