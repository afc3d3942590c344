"""Rows that are streamed: the same as in memory, resumable anywhere, in little memory."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.batches.loader import SHUFFLE
from engine.data.dataset import RowChoice
from engine.data.examples import Example, ExampleBuilder, ExampleSettings, build_examples
from engine.data.rows import Row
from engine.data.sources.resolve import data_files
from engine.data.sources.streams.located import RowLimit
from engine.data.streaming.ahead import Ahead
from engine.data.streaming.batch_stream import BatchSettings, BatchStream
from engine.data.streaming.example_stream import ExampleStream, StreamSettings
from engine.data.streaming.indexed_rows import IndexedRows
from engine.data.streaming.line_index import index_lines
from engine.data.streaming.order import ShuffledOrder
from engine.errors import DataError
from engine.tokenization.tokenizer import Tokenizer, load_tokenizer
from tests.support.source_files import WRITERS, question_rows
from tests.support.tiny_model import write_tokenizer
from tests.support.tokenizer_folder import TokenizerFolder

ROWS = question_rows(150)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(TokenizerFolder(folder))


class Streams:
    """Makes streams of data in a folder."""

    def __init__(self, tokenizer: Tokenizer, folder: Path) -> None:
        self.tokenizer, self.folder = tokenizer, folder

    def examples(
        self, data: Any, how: StreamSettings | None = None, **choice: Any
    ) -> ExampleStream:
        chosen = RowChoice(**choice)
        rows = IndexedRows(data_files(data), chosen, self.folder / "index")
        settings = ExampleSettings(64, bad_rows=chosen.bad_lines)
        builder = ExampleBuilder(self.tokenizer, settings)
        return ExampleStream(rows, chosen, builder, how or StreamSettings(seed=5))

    def batches(self, data: Any, packing: bool = False, accumulate: int = 1) -> BatchStream:
        settings = BatchSettings(4, accumulate, 64, packing, seed=5)
        return BatchStream(self.examples(data), settings)


@pytest.fixture
def streams(tokenizer: Tokenizer, tmp_path: Path) -> Streams:
    return Streams(tokenizer, tmp_path)


def write(path: Path, rows: list[Any]) -> Path:
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def sources(stream: ExampleStream, epoch: int = 0) -> list[str]:
    return [example.source for item in stream.epoch(epoch) for example in item.examples]


def ids_of(examples: Sequence[Example]) -> list[list[int]]:
    """The token ids of a micro-batch."""
    return [list(map(int, example.ids)) for example in examples]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet", "d.jsonl.gz"])
def test_an_epoch_has_the_examples_of_memory_in_another_order(
    name: str, streams: Streams, tmp_path: Path
) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    stream = streams.examples(tmp_path / name)
    read = [example for item in stream.epoch(0) for example in item.examples]
    rows = [Row([{"role": "user", "content": row["question"]},
                 {"role": "assistant", "content": row["answer"]}], number, "x")
            for number, row in enumerate(ROWS)]  # fmt: skip
    expected, _ = build_examples(rows, streams.tokenizer, 64)
    ids = [example.input_ids for example in expected]
    made = [example.input_ids for example in read]
    assert made != ids
    assert sorted(made) == sorted(ids)
    assert sources(stream, 1) != sources(stream)
    assert Counter(sources(stream, 1)) == Counter(sources(stream))


@pytest.mark.parametrize(("packing", "accumulate"), [(False, 1), (False, 3), (True, 1), (True, 2)])
@pytest.mark.parametrize("rows", [150, 12])
def test_a_stream_goes_on_from_any_step_with_the_same_batches(
    rows: int, packing: bool, accumulate: int, streams: Streams, tmp_path: Path
) -> None:
    """Also from the end of an epoch whose rows fill its batches: twelve are four bins packed."""
    path = write(tmp_path / "d.jsonl", ROWS[:rows])
    whole = streams.batches(path, packing, accumulate)
    steps = 2 * whole.steps_per_epoch + 3
    batches, cursors = [], []
    for number in range(steps):
        cursors.append(whole.cursor(number))
        micros, epoch = whole.step(number)
        batches.append(([ids_of(micro) for micro in micros], epoch))
    whole.close()
    assert batches[-1][1] > 1.5
    again = streams.batches(path, packing, accumulate)
    for start in (1, steps // 3, steps - 2) if rows > 12 else range(1, steps):
        again.go_on(start, json.loads(json.dumps(cursors[start])))
        for number in range(start, steps):
            micros, epoch = again.step(number)
            assert ([ids_of(micro) for micro in micros], epoch) == batches[number]
    again.close()


def test_an_epoch_of_batches_reads_every_row_once(streams: Streams, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [*ROWS])
    for packing in (False, True):
        stream = streams.batches(path, packing)
        tokens, number, epoch = 0, 0, 0.0
        while epoch < 1.0:
            micros, epoch = stream.step(number)
            tokens += sum(len(example) for micro in micros for example in micro)
            number += 1
        stream.close()
        examples = streams.examples(path)
        read = [example for item in examples.epoch(0) for example in item.examples]
        assert tokens == sum(map(len, read))
        if not packing:
            assert (number, stream.estimated) == (stream.steps_per_epoch, False)


def test_documents_are_divided_and_every_token_is_trained(streams: Streams, tmp_path: Path) -> None:
    write(tmp_path / "d.jsonl", [{"text": f"word{n} " * (10 + 40 * (n % 5))} for n in range(30)])
    stream = streams.batches(tmp_path / "d.jsonl", packing=True)
    micros, _ = stream.step(0)
    stream.close()
    assert sum(len(example) for micro in micros for example in micro) > 0.9 * 4 * 64
    for example in stream.sample:
        assert example.trained == [False] + [True] * (len(example) - 1)
    assert stream.stream.report.truncated == 0


def test_bad_rows_filters_and_blank_lines_are_left_out_and_counted(
    streams: Streams, tmp_path: Path
) -> None:
    rows: list[Any] = [{**row, "rating": n % 5 + 1} for n, row in enumerate(ROWS)]
    rows[7] = "{broken\n"
    rows[9] = "\n"
    path = write(tmp_path / "d.jsonl", rows)
    stream = streams.examples(path, min_rating=4, bad_lines="skip:5%")
    used = sources(stream)
    assert len(used) == sum(n % 5 >= 3 for n in range(150) if n not in (7, 9))
    assert stream.read.skipped[0].startswith(f"{path}:8:")
    with pytest.raises(DataError, match=r"d\.jsonl:8:"):
        sources(streams.examples(path))
    with pytest.raises(DataError, match="more than the"):
        sources(streams.examples(path, bad_lines="skip:0.1%"))


def test_a_row_is_measured_as_its_source_spells_it(streams: Streams, tmp_path: Path) -> None:
    row = {"prompt": "a", "response": "b" * 300, "more": [1e9] * 200}
    text = json.dumps(row, separators=(",", ":")).replace("1000000000.0", "1e9")
    (tmp_path / "rows.json").write_text(f"[{text}]")
    data = str(tmp_path / "rows.json")
    assert len(sources(streams.examples(data, limit=RowLimit(len(text))))) == 1
    with pytest.raises(DataError, match="longer than"):
        sources(streams.examples(data, limit=RowLimit(len(text) - 1)))


def test_an_error_in_a_row_reaches_the_step_that_needs_it(streams: Streams, tmp_path: Path) -> None:
    rows: list[Any] = [*ROWS] * 4
    bad = int(ShuffledOrder(len(rows), 5, SHUFFLE, 0).at(400))
    rows[bad] = {"prompt": 1}
    stream = streams.batches(write(tmp_path / "d.jsonl", rows))
    for number in range(50):
        stream.step(number)
    with pytest.raises(DataError, match=rf"d\.jsonl:{bad + 1}:"):  # noqa: PT012
        for number in range(50, 1000):
            stream.step(number)
    stream.close()


def test_heldout_rows_are_never_read_and_a_limit_takes_the_first(
    streams: Streams, tmp_path: Path
) -> None:
    path = write(tmp_path / "d.jsonl", [*ROWS])
    stream = streams.examples(path, StreamSettings(seed=1, heldout=0.1, limit_rows=100))
    reserved = {example.source for example in stream.examples_of(stream.heldout_rows())}
    used = set(sources(stream)) | set(sources(stream, 1))
    assert len(reserved) == 10
    assert not reserved & used
    assert reserved | used == {f"{path}:{n}" for n in range(1, 101)}


def test_weights_choose_the_same_part_in_every_epoch(streams: Streams, tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [*ROWS[:40]])
    two = write(tmp_path / "two.jsonl", [*ROWS[40:60]])
    stream = streams.examples([f"{one}=0.5", f"{two}=2.5"])
    counts = [Counter(sources(stream, epoch)) for epoch in range(2)]
    assert counts[0] == counts[1]
    assert sorted(n for s, n in counts[0].items() if str(one) in s) == [1] * 20
    assert sorted(n for s, n in counts[0].items() if str(two) in s) == [2] * 10 + [3] * 10


def test_an_index_is_used_again_for_the_same_file_only(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ["a\n", "\n", "ccc"])
    index = index_lines(path, tmp_path / "index")
    assert [index.line(n) for n in range(index.count)] == [b"a\n", b"\n", b"ccc"]
    made = index.index.stat().st_mtime_ns
    assert index_lines(path, tmp_path / "index").digest == index.digest
    assert index.index.stat().st_mtime_ns == made
    path.write_text("a\nb\nccc")
    other = index_lines(path, tmp_path / "index")
    assert (other.count, other.digest != index.digest) == (3, True)
    index.index.write_bytes(index.index.read_bytes()[:-3])
    assert index_lines(path, tmp_path / "index").line(2) == b"ccc"
    index.close()


def test_a_thread_stays_a_few_items_ahead_and_ends() -> None:
    made: list[int] = []

    def items() -> Any:
        for number in range(1000):
            made.append(number)
            yield number

    ahead = Ahead(items(), 3)
    assert next(ahead) == 0
    assert next(ahead) == 1
    assert len(made) <= 7
    ahead.close()
    assert list(ahead) == []
    assert len(made) <= 8


def test_an_order_is_read_at_any_position(streams: Streams, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [*ROWS])
    stream = streams.examples(path)
    whole = stream.numbers(3, 0, 150)
    assert np.array_equal(stream.numbers(3, 60, 91), whole[60:91])


def test_a_source_is_written_to_lines_once_and_again_when_it_changed(
    streams: Streams, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "d.csv"
    WRITERS["d.csv"](path, ROWS)
    first = sources(streams.examples(path))
    (made,) = tmp_path.glob("**/*.rows.jsonl")
    assert made.stat().st_mode & 0o777 == 0o600
    before = made.stat().st_mtime_ns
    assert sources(streams.examples(path)) == first
    assert made.stat().st_mtime_ns == before
    WRITERS["d.csv"](path, ROWS[:-3])
    assert len(sources(streams.examples(path))) == len(ROWS) - 3
    made.write_bytes(made.read_bytes()[:-10])  # damaged: made anew
    assert len(sources(streams.examples(path))) == len(ROWS) - 3
