"""Rates: how many answers are accepted, right, or pass tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import comb

from engine.gates.checkers import Checker, python_source
from engine.gates.rows import Question

RunProgram = Callable[[str], str | None]


@dataclass(frozen=True)
class Judged:
    """One answer: None for `parsed` or `right` where that was not asked."""

    question: Question
    answer: str
    parsed: bool | None = None
    right: bool | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Rates:
    """What was counted; a rate is None where there was nothing to count.

    `categories` has for each category its numbers of accepted answers and of answers.
    """

    parse_rate: float | None = None
    coverage: float | None = None
    pass_rate: float | None = None
    pass_at: dict[int, float] = field(default_factory=dict)
    categories: dict[str, tuple[int, int]] = field(default_factory=dict)


def judge(question: Question, answer: str, checker: Checker | None, run: RunProgram) -> Judged:
    """Hold an answer against the checker, and against what its row says of a right one."""
    fault = checker(answer) if checker is not None else None
    parsed = None if checker is None else fault is None
    wrong = fault or _fault(question, answer, run)
    has_measure = question.is_checked or checker is not None or question.reference is not None
    if wrong is None and not question.is_checked and checker is None:
        same = answer.split() == (question.reference or "").split()
        wrong = None if same else "not the row's own answer"
    return Judged(question, answer, parsed, wrong is None if has_measure else None, wrong)


def _fault(question: Question, answer: str, run: RunProgram) -> str | None:
    """What is wrong with an answer by the row's own words."""
    plain = answer.strip()
    if question.expected and plain not in {text.strip() for text in question.expected}:
        return "not the expected answer"
    absent = [text for text in question.contains if text not in answer]
    if absent:
        return f"does not contain {absent[0]!r}"
    if question.pattern is not None and question.pattern.search(answer) is None:
        return f"nothing matches {question.pattern.text!r}"
    return run(program_of(question, answer)) if question.tests else None


def program_of(question: Question, answer: str) -> str:
    """The answer's code with the row's tests behind it.

    Where the prompt is code to be completed, it comes first, unless the answer defines the whole
    anew.
    """
    code = python_source(answer)
    whole = not question.prefix or any(
        line.startswith(("def ", "class ", "async def ", "import ", "from "))
        for line in code.splitlines()
    )
    return f"{code if whole else question.prefix + code}\n\n{question.tests}\n"


def parse_rates(judged: Sequence[Judged]) -> Rates:
    """Parse rate, and the share of categories that have an accepted answer."""
    asked = [one for one in judged if one.parsed is not None]
    if not asked:
        return Rates()
    categories: dict[str, tuple[int, int]] = {}
    for one in asked:
        name = one.question.row.category
        if name is not None:
            accepted, count = categories.get(name, (0, 0))
            categories[name] = (accepted + bool(one.parsed), count + 1)
    covered = sum(accepted > 0 for accepted, _ in categories.values())
    return Rates(
        parse_rate=sum(bool(one.parsed) for one in asked) / len(asked),
        coverage=covered / len(categories) if categories else None,
        categories=categories,
    )


def pass_rate(judged: Sequence[Judged]) -> float | None:
    """The share of right answers, of those that there was a measure for."""
    asked = [one.right for one in judged if one.right is not None]
    return sum(asked) / len(asked) if asked else None


def pass_at(k: int, samples: int, right: int) -> float:
    """The chance that one of `k` programs passes, from `right` of `samples` that did.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374).
    """
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def mean_pass_at(k: int, counts: Sequence[tuple[int, int]]) -> float:
    """`pass_at` over rows, given the number of programs and of passing ones of each."""
    return sum(pass_at(k, samples, right) for samples, right in counts) / len(counts)
