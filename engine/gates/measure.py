"""Measure what gates ask for: answers, checked, and programs, run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.config.tasks.gates import GateSettings
from engine.errors import ConfigError
from engine.gates.answers import Answerer
from engine.gates.checkers import Checker, make_checker
from engine.gates.generated_code import CodeLimits, run_program
from engine.gates.rates import (
    Judged,
    Rates,
    judge,
    mean_pass_at,
    parse_rates,
    pass_rate,
    program_of,
)
from engine.gates.rows import Question, read_questions


@dataclass(frozen=True)
class Questions:
    """What a model is asked: the rows of the data, and those of the benchmark."""

    rows: list[Question]
    benchmark: list[Question]
    checker: Checker | None

    @property
    def have_answers(self) -> bool:
        """Whether every row of the data has an answer of its own, whose perplexity there is."""
        return all(question.reference is not None for question in self.rows)


def check_gates(gates: GateSettings) -> Checker | None:
    """The checker of gates, whose settings are checked without any rows.

    Raises `ConfigError` for gates that contradict each other or lack something.
    """
    if gates.checker is None and (gates.parse_rate is not None or gates.coverage is not None):
        raise ConfigError(
            "`parse_rate` and `coverage` are shares of answers that a checker accepts, and none "
            "is named. Add `checker: python-ast` (or json, json-schema, regex, command) to the "
            "gates file, or set both to none."
        )
    most = max(gates.pass_at, default=0)
    if most > gates.samples:
        raise ConfigError(
            f"`pass_at` asks for {most} programs a row, and `samples` is {gates.samples}; set "
            f"samples: {most} or more."
        )
    return make_checker(gates)


def prepare(gates: GateSettings, data: Sequence[str]) -> Questions:
    """Read all that is asked, before any model is loaded.

    Raises `ConfigError` as `check_gates` and for rows that lack something, `DataError` for rows
    that cannot be read.
    """
    checker = check_gates(gates)
    rows = read_questions(data, gates.answered_rows)
    if gates.pass_at and not any(question.tests for question in rows):
        raise ConfigError(
            "`pass_at` needs rows with `tests`, Python source that is run behind the answer's "
            "code, and no row has any. Add them, or leave out pass_at."
        )
    benchmark: list[Question] = []
    if gates.pass_rate is not None:
        _require_benchmark(gates)
        benchmark = read_questions(gates.benchmark, gates.answered_rows)
    return Questions(rows, benchmark, checker)


def _require_benchmark(gates: GateSettings) -> None:
    absent = [path for path in gates.benchmark if not Path(path).exists()]
    if absent:
        raise ConfigError(
            f"`pass_rate` is measured on the rows of `benchmark`, and there is no {absent[0]}. "
            "Put held-out rows there, or name their file or folder as `benchmark`."
        )


@dataclass(frozen=True)
class Measured:
    """Everything that was measured of one model but its perplexity."""

    rates: Rates
    judged: list[Judged]

    def figures(self) -> dict[str, float | None]:
        """Figures by the names that gates have."""
        rates = self.rates
        figures = {
            "parse_rate": rates.parse_rate,
            "coverage": rates.coverage,
            "pass_rate": rates.pass_rate,
        }
        return figures | {f"pass_at_{k}": share for k, share in rates.pass_at.items()}


def measure(answerer: Answerer, questions: Questions, gates: GateSettings) -> Measured:
    """Have the model answer, and judge every answer.

    Raises `ConfigError` where a program would have to be run and cannot be shut off.
    """
    limits = CodeLimits(gates.code_seconds, 2.0 * gates.code_seconds, gates.code_memory)

    def run(program: str) -> str | None:
        return run_program(program, limits)

    def judged_of(asked: Sequence[Question]) -> list[Judged]:
        answers = answerer.answers(asked)
        return [
            judge(question, answer, questions.checker, run)
            for question, answer in zip(asked, answers, strict=True)
        ]

    judged, benchmark = judged_of(questions.rows), judged_of(questions.benchmark)
    counts: list[tuple[int, int]] = []
    for index, one in enumerate(judged):
        if not gates.pass_at or one.question.tests is None:
            continue
        if gates.samples == 1:
            counts.append((1, int(bool(one.right))))
            continue
        programs = answerer.programs(one.question, gates, index)
        faults = [run(program_of(one.question, program)) for program in programs]
        counts.append((gates.samples, faults.count(None)))
    parsed = parse_rates(judged)
    rates = Rates(
        parsed.parse_rate,
        parsed.coverage,
        pass_rate(benchmark),
        {k: mean_pass_at(k, counts) for k in sorted(gates.pass_at)},
        parsed.categories,
    )
    return Measured(rates, judged + benchmark)
