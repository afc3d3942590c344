"""Settings of a gates file, which decides whether a model passes."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from engine.config.numbers import MOST_SECONDS, is_count
from engine.config.settings import Settings, setting
from engine.config.spelling import none_is_unset, one_or_many, size_in_bytes
from engine.config.tasks.inference import Paths

STRICT = "ENGINE_EVAL_STRICT"
BENCHMARK = "ENGINE_BENCHMARK"
BENCHMARK_PASS_RATE = "ENGINE_BENCHMARK_MIN_PASS_RATE"

CHECKERS = ("python-ast", "json", "json-schema", "regex", "command")

Share = Annotated[float | None, BeforeValidator(none_is_unset)]


def is_set(variable: str) -> bool:
    """Whether an environment variable says yes: anything but nothing, 0, false or no."""
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no", "off")


def shares_by_number(value: Any) -> Any:
    """`{1: 0.25, 5: 0.5}`, its keys numbers of answers."""
    if not isinstance(value, Mapping):
        return value
    if any(not is_count(str(key)) or int(key) < 1 for key in value):
        raise ValueError("expected numbers of answers and shares, as in {1: 0.25, 5: 0.5}")
    return {int(key): share for key, share in value.items()}


class GateSettings(Settings):
    """What `engine eval --gates FILE` asks of a model.

    A gate whose limit is none is left out. Parse rate, coverage and pass rate are shares from 0
    to 1.
    """

    parse_rate: Share = setting(
        0.70, "Gates", "least share of answers that the checker accepts", ge=0, le=1
    )
    coverage: Share = setting(
        0.50, "Gates", "least share of categories with an accepted answer", ge=0, le=1
    )
    pass_rate: Share = setting(
        None, "Gates", "least share of `benchmark` rows answered rightly", ge=0, le=1
    )
    pass_at: Annotated[dict[int, float], BeforeValidator(shares_by_number)] = setting(
        {}, "Gates", "least share of rows with `tests` that one of k programs passes: {1: 0.25}"
    )
    perplexity: Annotated[float | None, BeforeValidator(none_is_unset)] = setting(
        None, "Gates", "largest perplexity on the rows", gt=1
    )
    worse_than_base: Share = setting(
        None, "Gates", "largest loss of any rate against the base model", ge=0, le=1
    )
    perplexity_over_base: Annotated[float | None, BeforeValidator(none_is_unset)] = setting(
        None, "Gates", "largest quotient of the perplexity and the base model's", gt=0
    )
    earlier: Path | None = setting(
        None, "Gates", "eval_results.json of an earlier model, to be compared with"
    )
    worse_than_earlier: Share = setting(
        0.03, "Gates", "largest loss of any rate against `earlier`", ge=0, le=1
    )
    perplexity_over_earlier: Annotated[float | None, BeforeValidator(none_is_unset)] = setting(
        1.02, "Gates", "largest quotient of the perplexity and that of `earlier`", gt=0
    )

    checker: str | None = setting(
        None,
        "Answers",
        f"what an answer has to be for parse_rate and coverage: {', '.join(CHECKERS)}",
        pattern=f"^({'|'.join(CHECKERS)})$",
        expected=", ".join(CHECKERS),
    )
    pattern: str | None = setting(None, "Answers", "regular expression of the checker regex")
    schema_file: Path | None = setting(None, "Answers", "JSON schema of the checker json-schema")
    command: Annotated[tuple[str, ...], BeforeValidator(one_or_many)] = setting(
        (), "Answers", "program and arguments of the checker command; the answer is its input"
    )
    command_seconds: float = setting(
        10.0, "Answers", "longest run of `command`", gt=0, le=MOST_SECONDS
    )
    benchmark: Paths = setting(
        ("data/heldout_bench",), "Answers", "rows for pass_rate: files, or folders of them"
    )
    base: str | None = setting(
        None, "Answers", "model to compare with; by default the model without its adapter"
    )
    answered_rows: int = setting(100, "Answers", "rows that are answered, the first ones", ge=1)
    max_new_tokens: int = setting(256, "Answers", "longest answer", ge=1)
    samples: int = setting(1, "Answers", "programs for each row with `tests`", ge=1, le=1000)
    temperature: float = setting(0.8, "Answers", "of those programs, where there are several", ge=0)
    seed: int = setting(0, "Answers", "of those programs", ge=0, lt=1 << 63)
    code_seconds: int = setting(5, "Answers", "longest run of one program", ge=1, le=MOST_SECONDS)
    code_memory: Annotated[int, BeforeValidator(size_in_bytes)] = setting(
        512 << 20, "Answers", "most memory of one program", ge=64 << 20
    )
