"""Preference rows as examples: which tokens are trained, and which rows are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.data.batches.sequences import AnswerSet, collate_mismatched
from engine.data.examples import ExampleSettings
from engine.data.preferences import JudgedExample, judged_examples, pair_examples
from engine.data.rows import parse_row
from engine.data.rows.fields import RowFault
from engine.errors import DataError
from engine.tokenization.tokenizer import Tokenizer

HOW = ExampleSettings(256)
ASK, MORE = {"role": "user", "content": "Q"}, {"role": "user", "content": "and"}
EARLIER = {"role": "assistant", "content": "well"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("yes", "no way"))


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., Tokenizer]) -> Tokenizer:
    return make_tokenizer("chatml")


def trained_text(tokenizer: Tokenizer, ids: Any, mask: Any) -> str:
    return tokenizer.decode(ids[mask].tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "Q", "chosen": "yes", "rejected": "no way"},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": [ASK, EARLIER, MORE], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASK, EARLIER, MORE, GOOD], "rejected": [ASK, EARLIER, MORE, BAD]},
    ],
    ids=range(4),
)
def test_only_the_answers_of_a_pair_are_trained(raw: dict[str, Any], tokenizer: Tokenizer) -> None:
    (pair,), report = pair_examples([parse_row(raw, "d", 1)], tokenizer, HOW)
    texts = [trained_text(tokenizer, *part) for part in pair.parts()]
    assert texts == ["yes<|im_end|>", "no way<|im_end|>"]
    (chosen, marks), (rejected, _) = pair.parts()
    assert pair.prompt == int(marks.argmax())
    assert chosen[: pair.prompt].tolist() == rejected[: pair.prompt].tolist()
    assert (report.rows, report.examples, report.tokens) == (1, 1, len(pair))


def test_texts_share_whole_words_and_end_as_documents(tokenizer: Tokenizer) -> None:
    raw = {"chosen": "Human: Hi\nBot: apples fall", "rejected": "Human: Hi\nBot: apply it"}
    (pair,), _ = pair_examples([parse_row(raw, "d", 1)], tokenizer, HOW)
    texts = [trained_text(tokenizer, *part) for part in pair.parts()]
    assert texts == [" apples fall<|im_end|>", " apply it<|im_end|>"]


def test_batches_lay_pairs_end_to_end_and_share_prompts(tokenizer: Tokenizer) -> None:
    rows = [
        parse_row({"prompt": f"Q{n}", "chosen": "yes", "rejected": "no way"}, "d", n)
        for n in range(3)
    ]
    pairs, _ = pair_examples(rows, tokenizer, HOW)
    apart, shared = (AnswerSet(pairs, 256, share) for share in (False, True))
    one, other = apart.batch([2, 0]), shared.batch([2, 0])
    assert one.sequences is not None
    assert one.sequences.examples == (2, 2, 0, 0)
    assert one.targets.tolist() == other.targets.tolist()
    assert sum(one.sequences.counts) == one.trained_tokens == other.trained_tokens
    assert one.tokens - other.tokens == pairs[0].prompt + pairs[2].prompt
    # What predicts a target is the token before it, in either layout.
    assert one.input_ids[one.trained].tolist() == other.input_ids[other.trained].tolist()
    assert other.tokens == shared.length(2) + shared.length(0)
    assert apart.digest([0, 1]) == shared.digest([0, 1]) != apart.digest([0, 2])


def test_judged_answers_come_of_labels_and_of_pairs(tokenizer: Tokenizer) -> None:
    raws: list[dict[str, Any]] = [
        {"prompt": "Q", "completion": "yes", "label": True},
        {"messages": [ASK, EARLIER, MORE, BAD], "label": 0},
        {"prompt": "Q", "chosen": "yes", "rejected": "no way"},
    ]
    rows = [parse_row(raw, "d", n, judged=True) for n, raw in enumerate(raws)]
    assert all(not row.unused for row in rows)
    answers, report = judged_examples(rows, tokenizer, HOW)
    assert [answer.good for answer in answers] == [True, False, True, False]
    texts = [trained_text(tokenizer, answer.ids, answer.mask) for answer in answers]
    assert texts == ["yes<|im_end|>", "no way<|im_end|>"] * 2
    assert (report.rows, report.examples) == (3, 4)
    mixed = collate_mismatched(answers, [0, 3], 256)
    assert mixed.sequences is not None
    bounds = mixed.bounds
    assert bounds[1] == answers[0].prompt + len(answers[1]) - answers[1].prompt
    assert bounds[2] - bounds[1] == answers[3].prompt + len(answers[0]) - answers[0].prompt
    assert collate_mismatched(answers, [0], 12).tokens == 12


def test_rows_that_are_no_preferences_are_refused(tokenizer: Tokenizer) -> None:
    for raw, words in (
        ({"chosen": [ASK, GOOD], "rejected": [MORE, BAD]}, "different prompts: .* message 1"),
        (
            {"chosen": [ASK, EARLIER, MORE, GOOD], "rejected": [ASK, EARLIER, ASK, BAD]},
            "different prompts: .* message 3",
        ),
        ({"chosen": "Hi\n", "rejected": "Hi\nthere"}, "says nothing after the prompt"),
        ({"prompt": "Q", "completion": "yes", "label": "maybe"}, "'label' is a text, 'maybe'"),
    ):
        with pytest.raises(RowFault, match=words):
            parse_row(raw, "d", 1, judged=True)
    plain = parse_row({"prompt": "Q", "response": "A"}, "d.jsonl", 7)
    with pytest.raises(DataError, match=r"d\.jsonl:7: .* --objective ipo learns from pairs"):
        pair_examples([plain], tokenizer, HOW, "ipo")
    with pytest.raises(DataError, match=r"d\.jsonl:7: .* 'label', true or"):
        judged_examples([plain], tokenizer, HOW)


def test_a_pair_that_is_cut_before_an_answer_is_dropped(tokenizer: Tokenizer) -> None:
    rows = [
        parse_row({"prompt": prompt, "chosen": "yes", "rejected": "no way"}, "d", n)
        for n, prompt in enumerate(("Q", "Q" * 90, "R", "S"))
    ]
    pairs, report = pair_examples(rows, tokenizer, ExampleSettings(60))
    assert len(pairs) == 3
    assert len(report.dropped) == 1
    assert "beyond the first 60 tokens" in report.dropped[0]
    assert not any(isinstance(pair, JudgedExample) for pair in pairs)
