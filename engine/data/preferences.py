"""Turn preference rows into examples: pairs, or answers that are judged.

A pair is one example of two sequences behind each other: prompt and chosen answer, prompt and
rejected answer. An answer is what follows the messages that both have in common; its assistant
messages are trained, and nothing before it is. A pair of texts begins with the words that both
share, and no chat template is applied to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from engine.config.choices import ObjectiveName
from engine.data.dataset import BadLines
from engine.data.example_report import ExampleReport, judge
from engine.data.examples import Example, ExampleBuilder, ExampleSettings
from engine.data.loss_masks import trained_mask
from engine.data.rows import Row
from engine.data.rows.preference import Messages, shared_messages, split_texts
from engine.errors import DataError
from engine.tokenization.messages import LOSS_FLAGS
from engine.tokenization.tokenizer import Tokenizer

_BATCH = 128


class PairExample(Example):
    """A chosen and a rejected answer to one prompt.

    Attributes:
        split: tokens of the chosen sequence; the others are the rejected one's.
        prompt: tokens that both begin with, none of which is trained.
    """

    __slots__ = ("prompt", "split")

    def __init__(self, chosen: Example, rejected: Example) -> None:
        super().__init__(
            np.concatenate([chosen.ids, rejected.ids]),
            np.concatenate([chosen.mask, rejected.mask]),
            chosen.source,
        )
        self.split = len(chosen)
        self.prompt = _shared_tokens(chosen, rejected)

    def parts(self) -> tuple[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]], ...]:
        """Ids and marks of the chosen sequence and of the rejected one."""
        split = self.split
        return (self.ids[:split], self.mask[:split]), (self.ids[split:], self.mask[split:])


class JudgedExample(Example):
    """An answer that is good or bad.

    Attributes:
        good: which of them.
        prompt: tokens before the first that is trained.
    """

    __slots__ = ("good", "prompt")

    def __init__(self, answer: Example, good: bool) -> None:
        super().__init__(answer.ids, answer.mask, answer.source)
        self.good = good
        self.prompt = int(np.argmax(answer.mask))


def _shared_tokens(chosen: Example, rejected: Example) -> int:
    """Tokens that both begin with, before the first that either trains."""
    most = min(int(np.argmax(chosen.mask)), int(np.argmax(rejected.mask)))
    other = np.flatnonzero(chosen.ids[:most] != rejected.ids[:most])
    return int(other[0]) if other.size else most


@dataclass(frozen=True)
class _Side:
    """One answer of a row: the row with it alone, and the characters of a text's prompt."""

    row: Row
    good: bool
    prompt: int = 0


def answer_examples(
    rows: Sequence[Row], tokenizer: Tokenizer, how: ExampleSettings, objective: ObjectiveName
) -> tuple[list[Example], ExampleReport]:
    """What `objective` learns from: `judged_examples` or `pair_examples`."""
    if objective == "kto":
        judged, report = judged_examples(rows, tokenizer, how)
        return list(judged), report
    pairs, report = pair_examples(rows, tokenizer, how, objective)
    return list(pairs), report


def pair_examples(
    rows: Sequence[Row], tokenizer: Tokenizer, how: ExampleSettings, objective: str = "dpo"
) -> tuple[list[PairExample], ExampleReport]:
    """A pair of sequences of every row; each is cut as any example is.

    A row of which either answer has no trained token left is dropped and named. Raises `DataError`
    for a row without a pair, naming it and `objective`, and as `examples_of` does.
    """
    lone = next((row for row in rows if not row.is_pair), None)
    if lone is not None:
        raise DataError(
            f"{lone.source}: this row has one answer ({lone.form}), and --objective {objective} "
            "learns from pairs. Give every row 'chosen' and 'rejected', with a 'prompt' or as "
            "whole conversations, or train with --objective sft."
        )
    made, report = _answers(rows, tokenizer, how)
    examples = [PairExample(sides[0][1], sides[1][1]) for sides in made if len(sides) == 2]
    return examples, _judged(report, rows, examples, how)


def judged_examples(
    rows: Sequence[Row], tokenizer: Tokenizer, how: ExampleSettings
) -> tuple[list[JudgedExample], ExampleReport]:
    """An example of every answer: of a row with a label one, of a pair two.

    Raises `DataError` for a row with neither, and as `examples_of` does.
    """
    for row in rows:
        if not row.is_pair and (row.label is None or row.ids is not None):
            raise DataError(
                f"{row.source}: this row ({row.form}) does not say whether its answer is a good "
                "one, and --objective kto learns from that. Give every row a 'label', true or "
                "false, or 'chosen' and 'rejected'."
            )
        if row.messages and row.messages[-1]["role"] != "assistant":
            raise DataError(
                f"{row.source}: the conversation ends with a message of role "
                f"{row.messages[-1]['role']!r}, and the 'label' is about the answer that ends it."
            )
    made, report = _answers(rows, tokenizer, how)
    examples = [JudgedExample(answer, side.good) for sides in made for side, answer in sides]
    return examples, _judged(report, rows, examples, how)


def _sides(row: Row) -> list[_Side]:
    """The answers of a row, the better one first."""
    if row.rejected_text is not None and row.text is not None:
        prompt = split_texts(row.text, row.rejected_text)
        worse = replace(row, text=row.rejected_text, rejected_text=None)
        return [
            _Side(replace(row, rejected_text=None), True, prompt),
            _Side(worse, False, prompt),
        ]
    if row.rejected is not None:
        shared = shared_messages(row.messages, row.rejected)
        return [
            _Side(replace(row, messages=_asked(messages, shared), rejected=None), good)
            for messages, good in ((row.messages, True), (row.rejected, False))
        ]
    messages = _asked(row.messages, len(row.messages) - 1) if row.messages else []
    return [_Side(replace(row, messages=messages), bool(row.label))]


def _asked(messages: Messages, prompt: int) -> Messages:
    """A conversation of which nothing is trained before the message `prompt`."""
    return [
        {**{k: v for k, v in message.items() if k not in LOSS_FLAGS}, "train": False}
        if index < prompt and message["role"] == "assistant"
        else message
        for index, message in enumerate(messages)
    ]


def _answers(
    rows: Sequence[Row], tokenizer: Tokenizer, how: ExampleSettings
) -> tuple[list[list[tuple[_Side, Example]]], ExampleReport]:
    """The answers of every row with their sequences; those without a trained token are missing."""
    report, talks = ExampleReport(), ExampleBuilder(tokenizer, how)
    result: list[list[tuple[_Side, Example]]] = []
    for start in range(0, len(rows), _BATCH):
        sides = [_sides(row) for row in rows[start : start + _BATCH]]
        flat = [side for each in sides for side in each]
        made = dict[int, Example]()
        said = [side.row for side in flat if side.row.messages]
        for row, example in talks.build_with_rows(said, report):
            made[id(row)] = example
        for side, example in _texts([s for s in flat if not s.row.messages], tokenizer, how):
            made[id(side.row)] = _cut(side.row, example, how.max_length, report)
        result += [
            [
                (side, made[id(side.row)])
                for side in each
                if id(side.row) in made and made[id(side.row)].trained_tokens
            ]
            for each in sides
        ]
    return result, report


def _texts(
    sides: Sequence[_Side], tokenizer: Tokenizer, how: ExampleSettings
) -> Iterator[tuple[_Side, Example]]:
    """Texts as they are, trained after their prompt, with the tokens that end a document."""
    encoded = tokenizer.encode_batch_with_offsets([side.row.text or "" for side in sides])
    for side, (ids, offsets) in zip(sides, encoded, strict=True):
        inner = trained_mask(offsets, [(side.prompt, len(side.row.text or ""))])
        before, after = tokenizer.around_document(ids)
        mask = [*[False] * len(before), *inner.tolist(), *[True] * len(after)]
        yield side, Example([*before, *ids, *after], mask, side.row.source)


def _cut(row: Row, example: Example, limit: int, report: ExampleReport) -> Example:
    """The first tokens of a text that is too long; what is lost is counted."""
    report.longest = max(report.longest, len(example))
    if len(example) <= limit:
        return example
    report.truncated += 1
    report.truncated_tokens += len(example) - limit
    cut = Example(example.ids[:limit], example.mask[:limit], row.source)
    if not cut.trained_tokens:
        report.dropped.append(f"{row.source}: the answer begins beyond the first {limit} tokens")
    return cut


def _judged(
    report: ExampleReport, rows: Sequence[Row], examples: Sequence[Example], how: ExampleSettings
) -> ExampleReport:
    """The report in rows and examples, not in the sequences that these are made of."""
    report.rows, report.examples = len(rows), len(examples)
    report.tokens = sum(map(len, examples))
    report.trained_tokens = sum(example.trained_tokens for example in examples)
    report.dropped = list(dict.fromkeys(report.dropped))
    judge(report, how.max_length, BadLines.parse(how.bad_rows))
    return report
