"""When rows are streamed, and the stream that settings make."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from engine.config.train_config import TrainConfig
from engine.data.dataset import RowChoice
from engine.data.examples import ExampleBuilder, ExampleSettings
from engine.data.origins import notice_stale
from engine.data.rendering import Learning
from engine.data.sources.resolve import RowFile, data_files
from engine.data.sources.streams.compressed import is_compressed
from engine.data.streaming.batch_stream import BatchSettings, BatchStream
from engine.data.streaming.example_stream import ExampleStream, StreamSettings
from engine.data.streaming.indexed_rows import IndexedRows
from engine.storage.cache_folder import cache_folder
from engine.tokenization.tokenizer import Tokenizer

log = logging.getLogger(__name__)

STREAMED_FROM = 256 << 20
"""Bytes of plain rows from which on they are streamed, where it is left to the engine."""

_COMPRESSION = 4


def is_streamed(config: TrainConfig, files: Sequence[RowFile]) -> bool:
    """Whether a run's rows are streamed; what decides is the same on every machine.

    Preferences are not: the reference judges them before training.
    """
    if config.learns_answers:
        return False
    if config.streaming != "auto":
        return config.streaming == "on"
    sizes = (
        file.path.stat().st_size
        * (_COMPRESSION if file.path.suffix == ".parquet" or is_compressed(file.path) else 1)
        for file in files
    )
    return sum(sizes) >= STREAMED_FROM


def open_stream(config: TrainConfig, tokenizer: Tokenizer, vocab_size: int) -> BatchStream | None:
    """The batches of a run whose rows are streamed; None for one whose rows are in memory.

    Raises `DataError` for rows that cannot be used among the first ones.
    """
    files = data_files(config.data, config.query)
    if not is_streamed(config, files):
        return None
    notice_stale(files)
    choice = RowChoice.of(config, config.category)
    rows = IndexedRows(files, choice, cache_folder("lines"))
    how = ExampleSettings(
        config.max_length, config.chat_template_kwargs, config.bad_lines, Learning.of(config)
    )
    order = StreamSettings(
        config.seed, config.limit_rows, config.heldout, config.system_prompt, vocab_size
    )
    stream = ExampleStream(rows, choice, ExampleBuilder(tokenizer, how), order)
    packing = config.packing or _first_is_document(stream)
    settings = BatchSettings(
        config.batch_size, config.accumulate, config.max_length, packing, config.seed
    )
    batches = BatchStream(stream, settings)
    about = "about " if batches.estimated else ""
    log.info(
        "rows are streamed (--streaming): %d rows, recognised as %s; %s%d steps an epoch. A row "
        "that cannot be used is met only when it is read: `engine data validate` looks at all",
        stream.length, stream.read.recognised(), about, batches.steps_per_epoch,
    )  # fmt: skip
    return batches


def _first_is_document(stream: ExampleStream) -> bool:
    """Whether there are documents among the first rows of an epoch."""
    for item in stream.epoch(0):
        if item.examples:
            return stream.report.documents > 0
    return False
