"""Turn rows into token ids, with the trained ones marked.

A conversation is rendered once, its text encoded once, and a token is trained when it covers
characters of a loss span. Encoding the turns apart and joining the ids would split words at the
seams differently from how the model reads them; marking tokens by id (`ids == pad`) would leave the
end token untrained where it doubles as padding.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.dataset import BadLines
from engine.data.rendering import render_row
from engine.data.rows import Row
from engine.errors import DataError
from engine.tokenization.loss_spans import LocatedTurns
from engine.tokenization.messages import ConversationError, LimitError
from engine.tokenization.tokenizer import Offsets, Tokenizer
from engine.tokenization.turn_edges import Span

log = logging.getLogger(__name__)

_BATCH = 256
_WARN_DROPPED, _MOST_DROPPED = 0.01, 0.5
_MOST_STOPPED = 8
"""Rows of a batch on which the template may be stopped; each costs seconds."""

_LEFT_OUT = {
    "reasoning": "reasoning",
    "content": "text",
    "argument": "tool calls' arguments",
    "name": "tool calls",
    "system": "system prompt",
    "result": "tool results",
    "tools": "tools",
}


class Example:
    """One tokenised row, in five bytes a token.

    Attributes:
        ids: token ids, int32.
        mask: which of them are trained, bool; the first never is, as nothing predicts it.
        source: where the row stands, as `file:line`.
    """

    __slots__ = ("ids", "mask", "source")

    def __init__(self, input_ids: npt.ArrayLike, trained: npt.ArrayLike, source: str) -> None:
        self.ids: npt.NDArray[np.int32] = np.array(input_ids, dtype=np.int32)
        self.mask: npt.NDArray[np.bool_] = np.array(trained, dtype=np.bool_)
        self.source = source
        if self.ids.ndim != 1 or self.ids.shape != self.mask.shape:
            raise ValueError(f"{self.ids.shape} ids with {self.mask.shape} marks in {source}")
        self.mask[:1] = False

    @property
    def input_ids(self) -> list[int]:
        """Token ids as a list."""
        ids: list[int] = self.ids.tolist()
        return ids

    @property
    def trained(self) -> list[bool]:
        """Which tokens are trained, as a list."""
        marks: list[bool] = self.mask.tolist()
        return marks

    def stretches(self) -> list[tuple[bool, list[int]]]:
        """Consecutive tokens that are all trained (True) or all not, to be decoded together."""
        pairs = groupby(zip(self.trained, self.input_ids, strict=True), key=itemgetter(0))
        return [(trained, [token for _, token in group]) for trained, group in pairs]

    @property
    def trained_tokens(self) -> int:
        """Number of trained tokens."""
        return int(np.count_nonzero(self.mask))

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Example):
            return NotImplemented
        return (
            self.source == other.source
            and np.array_equal(self.ids, other.ids)
            and np.array_equal(self.mask, other.mask)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Example({self.source}, {len(self)} tokens, {self.trained_tokens} trained)"


@dataclass
class ExampleReport:
    """What became of the rows.

    Attributes:
        rows: rows given.
        examples: examples made of them.
        tokens: tokens in the examples.
        trained_tokens: those of them that are trained.
        longest: tokens of the longest row before truncation.
        truncated: rows that lost tokens to the length limit.
        truncated_tokens: tokens they lost.
        dropped: `file:line: reason` of each row that became no example.
        misfits: how many of those do not fit the chat template.
        left_out: what the chat template does not show: 'reasoning', 'content', 'argument',
            'system' or 'tools', and in how many messages (of tools: rows).
        left_out_first: the first row of each.
    """

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    dropped: list[str] = field(default_factory=list)
    misfits: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    left_out_first: dict[str, str] = field(default_factory=dict)

    def count_left_out(self, source: str, located: LocatedTurns) -> None:
        """Count what a row lost to the template; a function's name is refused elsewhere."""
        kinds = [kind for kinds in located.left_out.values() for kind in kinds]
        for kind in [*kinds, *(["tools"] if located.ignores_tools else [])]:
            self.left_out[kind] = self.left_out.get(kind, 0) + 1
            self.left_out_first.setdefault(kind, source)

    def notes(self) -> list[str]:
        """What the template left out, a line for each kind."""
        return [
            f"The chat template leaves out the {_LEFT_OUT[kind]} of {count:,} "
            f"{'rows' if kind == 'tools' else 'messages'} (first in {self.left_out_first[kind]}): "
            "the model neither reads nor learns that. Use a template that shows it, or remove it "
            "from the rows."
            for kind, count in sorted(self.left_out.items())
        ]

    def describe(self) -> str:
        """The report as one line."""
        share = 100 * self.trained_tokens / max(self.tokens, 1)
        return (
            f"{self.examples} of {self.rows} rows, {self.tokens} tokens ({share:.1f} % trained), "
            f"longest row {self.longest} tokens, {self.truncated} rows truncated by "
            f"{self.truncated_tokens} tokens, {len(self.dropped)} rows dropped"
        )


def build_examples(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    max_length: int,
    *,
    template_kwargs: Mapping[str, Any] | None = None,
    bad_rows: str = "fail",
) -> tuple[list[Example], ExampleReport]:
    """Render and tokenise rows.

    A row longer than `max_length` keeps its first tokens. A row without a trained token left is
    dropped and named in the report.

    Args:
        rows: the data set.
        tokenizer: of the model that will be trained.
        max_length: most tokens of one example.
        template_kwargs: further variables of the chat template, such as `enable_thinking`.
        bad_rows: 'fail' to stop at a row that does not fit the chat template, 'skip' to drop it,
            'skip:5%' to stop if more than that are dropped (see `BadLines.parse`).

    Raises:
        DataError: a row does not fit the chat template; the template is broken; or more than half
            of the rows would be dropped.
    """
    if max_length < 2:
        raise DataError(f"A row of {max_length} tokens teaches nothing; allow at least 2.")
    examples: list[Example] = []
    report = ExampleReport(rows=len(rows))
    policy = BadLines.parse(bad_rows)
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        rendered = _render(batch, tokenizer, template_kwargs or {}, policy)
        usable = [item for item in rendered if not isinstance(item, str)]
        report.dropped += [item for item in rendered if isinstance(item, str)]
        report.misfits += len(rendered) - len(usable)
        encoded = tokenizer.encode_batch_with_offsets([located.text for _, located in usable])
        for (row, located), (ids, offsets) in zip(usable, encoded, strict=True):
            _refuse_double_bos(row, ids, tokenizer)
            report.count_left_out(row.source, located)
            text, spans = located.text, located.spans
            mask = trained_mask(offsets, spans)
            example = _cut(ids, mask, max_length, row.source, report)
            if example is None:
                report.dropped.append(_without_label(row, text, spans, max_length))
                continue
            examples.append(example)
            report.tokens += len(example)
            report.trained_tokens += example.trained_tokens
    report.examples = len(examples)
    _judge(report, max_length, policy)
    return examples, report


def trained_mask(offsets: Offsets, spans: Sequence[Span]) -> npt.NDArray[np.bool_]:
    """Which tokens cover a character of a span.

    Args:
        offsets: [start, end) characters of every token, in order.
        spans: [start, end) characters of what is trained, in order and apart.

    Returns:
        (len(offsets),) bool. Tokenizers that trim white space from offsets give a token of white
        space no characters, only a position: such a token belongs to the text before it.
    """
    characters = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    if not len(spans):
        return np.zeros(len(characters), dtype=np.bool_)
    first, last = np.array(spans, dtype=np.int64).T
    starts, ends = characters[:, 0], characters[:, 1]
    # The last span that begins before a token ends is the only one that it can cover, or follow.
    span = np.searchsorted(first, ends, side="left") - 1
    until = np.where(span >= 0, last[span], -1)
    return np.where(starts == ends, starts <= until, starts < until)


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


def _render(
    rows: Sequence[Row], tokenizer: Tokenizer, kwargs: Mapping[str, Any], policy: BadLines
) -> list[tuple[Row, LocatedTurns] | str]:
    """Text and spans of each row, or why it was left out."""
    rendered: list[tuple[Row, LocatedTurns] | str] = []
    stopped = 0
    for row in rows:
        try:
            located = render_row(row, tokenizer.chat_template, kwargs)
        except ConversationError as error:
            stopped += isinstance(error, LimitError)
            if not policy.skip or stopped > _MOST_STOPPED:
                raise ConversationError(
                    f"{row.source}: {error} `--bad-lines skip` leaves such rows out."
                    if not policy.skip
                    else f"{row.source}: {error} It is the {stopped}th such row."
                ) from error
            rendered.append(f"{row.source}: {error}")
            continue
        except DataError as error:
            raise DataError(f"{row.source}: {error}") from error
        rendered.append((row, located))
    return rendered


def _refuse_double_bos(row: Row, ids: Sequence[int], tokenizer: Tokenizer) -> None:
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise DataError(
            f"{row.source}: the text begins with two BOS tokens ({tokenizer.bos_token!r} twice). "
            "The chat template writes one itself; remove it from the row, or one from the template."
        )


def _cut(
    ids: Sequence[int],
    mask: npt.NDArray[np.bool_],
    max_length: int,
    source: str,
    report: ExampleReport,
) -> Example | None:
    report.longest = max(report.longest, len(ids))
    example = Example(ids[:max_length], mask[:max_length], source)
    if example.trained_tokens == 0:
        return None
    if len(ids) > max_length:
        report.truncated += 1
        report.truncated_tokens += len(ids) - max_length
    return example


def _without_label(row: Row, text: str, spans: Sequence[Span], max_length: int) -> str:
    if not any(text[start:end].strip() for start, end in spans):
        return f"{row.source}: the chat template leaves nothing to learn from"
    return f"{row.source}: the answer begins beyond the first {max_length} tokens"


def _judge(report: ExampleReport, max_length: int, policy: BadLines) -> None:
    dropped = len(report.dropped)
    if report.misfits > policy.at_most * report.rows:
        raise DataError(
            f"{report.misfits} of {report.rows} rows do not fit the chat template, more than the "
            f"{100 * policy.at_most:.4g} % that may be skipped; the first is {report.dropped[0]}"
        )
    if report.rows and (report.examples == 0 or dropped > _MOST_DROPPED * report.rows):
        raise DataError(
            f"{dropped} of {report.rows} rows have no trained token, the first of them "
            f"{report.dropped[0]}. A run on what is left would not be the one that was asked for; "
            f"raise the length limit (now {max_length} tokens; the longest row has "
            f"{report.longest}) or fix the rows."
        )
    log_examples(report)


def log_examples(report: ExampleReport) -> None:
    """Count rows that are cut, as the summary does; warn of rows that are lost."""
    dropped = len(report.dropped)
    loss = dropped > _WARN_DROPPED * report.rows
    log.log(logging.WARNING if loss else logging.INFO, "%s", report.describe())
    for reason in report.dropped[:20]:
        log.warning("dropped %s", reason)
    for note in report.notes():
        log.warning("%s", note)
