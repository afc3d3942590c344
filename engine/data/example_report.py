"""What became of the rows that were tokenised."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from engine.data.dataset import BadLines
from engine.errors import DataError
from engine.tokenization.loss_spans import LocatedTurns

log = logging.getLogger(__name__)

_WARN_DROPPED, _MOST_DROPPED = 0.01, 0.5
_LEFT_OUT = {
    "reasoning": "reasoning",
    "content": "text",
    "argument": "tool calls' arguments",
    "name": "tool calls",
    "system": "system prompt",
    "result": "tool results",
    "tools": "tools",
}


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
        documents: rows that are documents, which are divided and never cut.
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
    documents: int = 0

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
        if self.documents:
            return (
                f"{self.documents} documents among {self.rows} rows, in {self.examples} pieces, "
                f"{self.tokens} tokens ({share:.1f} % trained), longest {self.longest} tokens, "
                f"{self.truncated} rows truncated, {len(self.dropped)} rows dropped"
            )
        return (
            f"{self.examples} of {self.rows} rows, {self.tokens} tokens ({share:.1f} % trained), "
            f"longest row {self.longest} tokens, {self.truncated} rows truncated by "
            f"{self.truncated_tokens} tokens, {len(self.dropped)} rows dropped"
        )


def judge(report: ExampleReport, max_length: int, policy: BadLines) -> None:
    """Raise `DataError` where too many rows were lost, and log what was.

    `max_length` is the length limit, `policy` what was to be done with rows that cannot be used.
    """
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
