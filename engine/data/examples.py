"""Turn rows into token ids, with the trained ones marked.

A conversation is rendered once, its text encoded once, and a token is trained when it covers
characters of a loss span. Encoding the turns apart and joining the ids would split words at the
seams differently from how the model reads them; marking tokens by id (`ids == pad`) would leave the
end token untrained where it doubles as padding. A document is encoded whole, ended by the EOS token
and divided where it is longer than an example: every token but its first is trained, once.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from engine.data.dataset import BadLines
from engine.data.example import Example as Example
from engine.data.example_report import ExampleReport, judge
from engine.data.loss_masks import span_mask, token_weights, trained_mask
from engine.data.rendering import EVERYTHING, Learning, render_known, render_row, weighted_spans
from engine.data.rows import Row
from engine.errors import DataError
from engine.tokenization.loss_spans import LocatedTurns
from engine.tokenization.messages import ConversationError, LimitError
from engine.tokenization.tokenizer import Offsets, Tokenizer

_BATCH, _BATCH_CHARACTERS = 256, 1 << 22
_MOST_STOPPED = 8
"""Rows of a batch on which the template may be stopped; each costs seconds."""


@dataclass(frozen=True)
class ExampleSettings:
    """How rows become examples.

    Attributes:
        max_length: most tokens of one example.
        template_kwargs: further variables of the chat template, such as `enable_thinking`.
        bad_rows: 'fail' to stop at a row that does not fit the chat template, 'skip' to drop it,
            'skip:5%' to stop if more than that are dropped (see `BadLines.parse`).
        learning: which answers are trained, and what becomes of reasoning.
    """

    max_length: int
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    bad_rows: str = "fail"
    learning: Learning = EVERYTHING


def build_examples(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    bad_rows: str = "fail",
    learning: Learning | None = None,
) -> tuple[list[Example], ExampleReport]:
    """Render and tokenise rows.

    A row longer than `max_length` keeps its first tokens; a document is divided instead. A row
    without a trained token left is dropped and named in the report.

    Args:
        rows: the data set.
        tokenizer: of the model that will be trained.
        max_length, template_kwargs, bad_rows, learning: see `ExampleSettings`.

    Raises:
        DataError: a row does not fit the chat template; the template is broken; a row is a
            preference pair; or more than half of the rows would be dropped.
    """
    how = ExampleSettings(max_length, template_kwargs or {}, bad_rows, learning or EVERYTHING)
    return examples_of(rows, tokenizer, how)


def examples_of(
    rows: Sequence[Row], tokenizer: Tokenizer, how: ExampleSettings
) -> tuple[list[Example], ExampleReport]:
    """`build_examples` by a table of settings."""
    builder = ExampleBuilder(tokenizer, how)
    report = ExampleReport()
    examples = [example for _, example in builder.build_all(rows, report)]
    judge(report, how.max_length, BadLines.parse(how.bad_rows))
    return examples, report


@dataclass(frozen=True)
class _RenderedRows:
    """Conversations with their text and spans, other rows as they are, and why misfits are none."""

    rows: int
    items: list[tuple[Row, LocatedTurns] | Row]
    misfits: list[str]


_Encoded = tuple[list[Encoding], list[tuple[list[int], Offsets | None]]]


class ExampleBuilder:
    """Makes examples of rows, some at a time. Raises `DataError` for a limit below 2 tokens."""

    def __init__(self, tokenizer: Tokenizer, how: ExampleSettings) -> None:
        if how.max_length < 2:
            raise DataError(f"A row of {how.max_length} tokens teaches nothing; allow at least 2.")
        self._tokenizer, self._how = tokenizer, how
        self._policy = BadLines.parse(how.bad_rows)

    def build(self, rows: Sequence[Row], report: ExampleReport) -> Iterator[Example]:
        """The examples of some rows, in order; what becomes of each is counted.

        Raises `DataError` as `build_examples`, all rows together being judged there.
        """
        return (example for _, example in self.build_with_rows(rows, report))

    def build_with_rows(
        self, rows: Sequence[Row], report: ExampleReport
    ) -> Iterator[tuple[Row, Example]]:
        """`build` with the row that each example is made of."""
        rendered = self._render(rows)
        return self._finish(rendered, self._encode(rendered), report)

    def build_all(
        self, rows: Sequence[Row], report: ExampleReport
    ) -> Iterator[tuple[Row, Example]]:
        """`build_with_rows` of any number of rows: some are rendered while others are encoded."""
        waiting: tuple[_RenderedRows, Future[_Encoded]] | None = None
        with ThreadPoolExecutor(1, "encode") as thread:
            for batch in _batches(rows):
                try:
                    rendered = self._render(batch)
                except DataError:
                    if waiting is not None:  # what is wrong with the rows before comes first
                        yield from self._finish(waiting[0], waiting[1].result(), report)
                    raise
                encoded = thread.submit(self._encode, rendered)
                if waiting is not None:
                    yield from self._finish(waiting[0], waiting[1].result(), report)
                waiting = rendered, encoded
            if waiting is not None:
                yield from self._finish(waiting[0], waiting[1].result(), report)

    def _encode(self, rendered: _RenderedRows) -> _Encoded:
        """The encodings of conversations, and ids and offsets of documents."""
        items = rendered.items
        talks = [located.text for _, located in (i for i in items if isinstance(i, tuple))]
        texts = [row.text for row in items if isinstance(row, Row) and row.text is not None]
        return self._tokenizer.encodings(talks), self._encode_documents(texts)

    def _finish(
        self, rendered: _RenderedRows, both: _Encoded, report: ExampleReport
    ) -> Iterator[tuple[Row, Example]]:
        report.rows += rendered.rows
        report.dropped += rendered.misfits
        report.misfits += len(rendered.misfits)
        encoded, whole = iter(both[0]), iter(both[1])
        for item in rendered.items:
            row = item[0] if isinstance(item, tuple) else item
            if isinstance(item, tuple):
                made = self._conversation(*item, next(encoded), report)
            elif item.ids is not None:
                ids, trained = np.array(item.ids.ids), np.array(item.ids.trained)
                weights = token_weights(item.weight, len(ids))
                made = self._checked(item, ids, trained, report, None, weights)
            else:
                made = self._document(item, *next(whole), report)
            for example in made:
                report.examples += 1
                report.tokens += len(example)
                report.trained_tokens += example.trained_tokens
                yield row, example

    def _render(self, rows: Sequence[Row]) -> _RenderedRows:
        rendered: list[tuple[Row, LocatedTurns] | Row] = []
        misfits: list[str] = []
        stopped, how = 0, self._how
        template = self._tokenizer.chat_template
        known = render_known(rows, template, how.template_kwargs, how.learning)
        for row, located in zip(rows, known, strict=True):
            if row.is_pair:
                raise DataError(
                    f"{row.source}: this is a preference pair, and this training learns one "
                    "answer. To learn which is better: --objective dpo. To learn the chosen one: "
                    "--map prompt=prompt,response=chosen (or --map messages=chosen)."
                )
            if not row.messages:
                rendered.append(row)
                continue
            try:
                rendered.append((row, located or self._located(row)))
            except ConversationError as error:
                stopped += isinstance(error, LimitError)
                if not self._policy.skip or stopped > _MOST_STOPPED:
                    raise ConversationError(
                        f"{row.source}: {error} `--bad-lines skip` leaves such rows out."
                        if not self._policy.skip
                        else f"{row.source}: {error} It is the {stopped}th such row."
                    ) from error
                misfits.append(f"{row.source}: {error}")
            except DataError as error:
                raise DataError(f"{row.source}: {error}") from error
        return _RenderedRows(len(rows), rendered, misfits)

    def _located(self, row: Row) -> LocatedTurns:
        template = self._tokenizer.chat_template
        return render_row(row, template, self._how.template_kwargs, self._how.learning)

    def _encode_documents(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets | None]]:
        if self._how.learning.marker is None:
            return [(ids, None) for ids in self._tokenizer.encode_batch(texts)]
        return [*self._tokenizer.encode_batch_with_offsets(texts)]

    def _conversation(
        self,
        row: Row,
        located: LocatedTurns,
        encoding: Encoding,
        report: ExampleReport,
    ) -> list[Example]:
        report.count_left_out(row.source, located)
        mask = span_mask(encoding, located.spans)
        how = self._how.template_kwargs, self._how.learning
        try:
            weighted = weighted_spans(row, located.text, self._tokenizer.chat_template, *how)
        except ConversationError as error:
            raise ConversationError(f"{row.source}: {error}") from error
        marked = [(weight, span_mask(encoding, spans)) for weight, spans in weighted]
        weights = token_weights(row.weight, len(mask), marked)
        return self._checked(row, np.array(encoding.ids), mask, report, located, weights)

    def _checked(
        self,
        row: Row,
        ids: npt.NDArray[Any],
        mask: npt.NDArray[np.bool_],
        report: ExampleReport,
        located: LocatedTurns | None,
        weights: npt.NDArray[np.float32] | None,
    ) -> list[Example]:
        """The one example of a row that is cut where it is too long; none if nothing is trained."""
        self._refuse_double_bos(row, ids)
        limit = self._how.max_length
        report.longest = max(report.longest, len(ids))
        weights = None if weights is None else weights[:limit]
        example = Example(ids[:limit], mask[:limit], row.source, weights)
        if example.trained_tokens == 0:
            spans, text = (located.spans, located.text) if located else ([], "")
            nothing = located is not None and not any(text[a:b].strip() for a, b in spans)
            report.dropped.append(
                f"{row.source}: the chat template leaves nothing to learn from"
                if nothing
                else f"{row.source}: the answer begins beyond the first {limit} tokens"
            )
            return []
        if len(ids) > limit:
            report.truncated += 1
            report.truncated_tokens += len(ids) - limit
        return [example]

    def _document(
        self, row: Row, ids: list[int], offsets: Offsets | None, report: ExampleReport
    ) -> list[Example]:
        """The pieces of a document. Each begins with the last token of the one before it."""
        tokenizer, limit = self._tokenizer, self._how.max_length
        before, after = tokenizer.around_document(ids)
        whole = np.array([*before, *ids, *after])
        mask = np.ones(len(whole), dtype=np.bool_)
        if offsets is not None and row.text is not None and self._how.learning.marker is not None:
            spans = tokenizer.chat_template.spans_after(row.text, self._how.learning.marker)
            inner = trained_mask(offsets, spans)
            ends = [bool(spans) and spans[-1][1] == len(row.text)] * len(after)
            mask = np.array([*[False] * len(before), *inner, *ends], dtype=np.bool_)
        self._refuse_double_bos(row, whole)
        report.documents += 1
        report.longest = max(report.longest, len(whole))
        starts = range(0, max(len(whole) - 1, 1), limit - 1)
        weights = token_weights(row.weight, len(whole))
        pieces = [
            Example(
                whole[s : s + limit],
                mask[s : s + limit],
                row.source,
                None if weights is None else weights[s : s + limit],
            )
            for s in starts
        ]
        pieces = [piece for piece in pieces if piece.trained_tokens]
        if not pieces:
            report.dropped.append(f"{row.source}: the document has nothing to learn from")
        return pieces

    def _refuse_double_bos(self, row: Row, ids: npt.NDArray[Any]) -> None:
        bos = self._tokenizer.bos_token_id
        if bos is not None and ids[:2].tolist() == [bos, bos]:
            raise DataError(
                f"{row.source}: the text begins with two BOS tokens "
                f"({self._tokenizer.bos_token!r} twice). The chat template writes one itself; "
                "remove it from the row, or one from the template."
            )


def shown_stretches(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The text of an example, a line for each stretch; those that are trained begin with '>'."""
    return [
        f"{'> ' if trained else '  '}{tokenizer.decode(ids, skip_special_tokens=False)!r}"
        for trained, ids in example.stretches()
    ]


def _batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Rows to be encoded together: so many, and no more characters than memory has space for."""
    start = size = 0
    for index, row in enumerate(rows):
        size += len(row.text or "")
        if index + 1 - start == _BATCH or size >= _BATCH_CHARACTERS:
            yield rows[start : index + 1]
            start, size = index + 1, 0
    if start < len(rows):
        yield rows[start:]


def check_ids(examples: Sequence[Example], vocab_size: int) -> None:
    """Refuse ids that the model's embedding has no row for, before any of them is looked up.

    Raises:
        DataError: names the first such row, the id, and the number of rows.
    """
    for example in examples:
        worst = int(example.ids.max(initial=0))
        if worst >= vocab_size or int(example.ids.min(initial=0)) < 0:
            bad = worst if worst >= vocab_size else int(example.ids.min())
            raise DataError(
                f"{example.source}: the token id {bad} is beyond the model's vocabulary of "
                f"{vocab_size} rows; the tokenizer does not belong to this model, or tokens were "
                "added to it without enlarging the embedding. Use the model's own tokenizer files."
            )
