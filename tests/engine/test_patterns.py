"""Regular expressions of settings, adapters, gates and rows end in time."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import patterns
from engine.config.tasks.gates import GateSettings
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from engine.gates.checkers import make_checker
from engine.gates.rows import read_questions
from engine.model_sources.adapter.config import by_pattern
from engine.model_sources.adapter.targets import is_meant
from engine.model_sources.gguf import pre_tokenizers
from engine.patterns import Pattern, PatternError, SlowPatternError, may_backtrack

SLOW = r"(?:\w+\w+)+!"
NAME = "model.layers.10.self_attn.q_proj"
LONG = "a" * 200


@pytest.fixture
def half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    patterns.pattern_of.cache_clear()


@pytest.mark.parametrize(
    "text",
    ["q_proj", "q_proj|v_proj", r".*\.layers\.(8|9|1\d)\..*(q|v)_proj", r"a*?b+?", r"\(a+\)+",
     "[*+?(]+x*", r"model\.layers\.\d+\.self_attn\.(q|k|v)_proj", "(?:abc)+", "a{3}b{2,4}"],
)  # fmt: skip
def test_patterns_of_modules_are_matched_here(text: str) -> None:
    assert not may_backtrack(text)


@pytest.mark.parametrize(
    "text",
    ["(a+)+", "(a|a)*", "(a|b)+", "(a*){2,}", "((a?)b)*", r"(a)\1", "(?P<x>a)(?P=x)", "a?" * 12,
     ".*a.*b.*c", "(?:a{2,})+", "(a|a)" * 12, r"([a-z]+\.)*x"],
)  # fmt: skip
def test_patterns_that_may_take_for_ever_are_known(text: str) -> None:
    assert may_backtrack(text)


def test_pre_tokenizers_of_published_models_are_harmless() -> None:
    rules = [rule for _, rule in pre_tokenizers._RULES]
    slow = {text for rule in rules for text in rule.patterns if may_backtrack(text)}
    assert all("(?:" in text for text in slow) and len(slow) <= 1


@pytest.mark.parametrize("text", ["(", "a{99999999999}", "x" * 1001, "(?P<i>a)(?P<i>b)", "(" * 900])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(PatternError):
        Pattern(text)


@pytest.mark.parametrize("text", [r"(?P<n>\d+)x", r"(?P<n>\d+)(?:x|y)+"])
def test_both_ways_of_matching_say_the_same(text: str) -> None:
    pattern = Pattern(text)
    assert pattern.fullmatch("12x") == {"n": "12"} and pattern.fullmatch("12x ") is None
    assert pattern.match("12x ") == {"n": "12"} and pattern.match(" 12x") is None
    assert pattern.search(" 12x") == {"n": "12"} and pattern.search("\ud800") is None


def test_a_pattern_without_end_is_ended_and_the_next_one_goes_on(half_a_second: None) -> None:
    pattern, begun = Pattern(SLOW), time.monotonic()
    with pytest.raises(SlowPatternError, match=r"takes more than 0\.5 s, with 'aaaa"):
        pattern.fullmatch(LONG)
    with pytest.raises(SlowPatternError):
        pattern.fullmatch("a!")
    assert time.monotonic() - begun < 30
    assert Pattern(SLOW).fullmatch("aa!") == {}


def test_a_matching_process_that_was_ended_is_started_anew() -> None:
    """As by the system, for want of memory; and a child that was forked has one of its own."""
    pattern = Pattern(SLOW)
    assert pattern.fullmatch("aa!") == {}
    ended = patterns._WORKER._process
    assert ended is not None and os.getpgid(ended.pid) != os.getpgid(0)
    os.kill(ended.pid, signal.SIGKILL)
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert pattern.fullmatch("aa!") == {} and pattern.fullmatch("aa") is None


def of_an_adapter(key: str) -> Callable[[Path], object]:
    raw: dict[str, Any] = {"target_modules": ["q_proj"], key: SLOW}
    if key == "layers_pattern":
        raw |= {"layers_to_transform": [1], key: rf"{SLOW}\w*"}
    return lambda folder: is_meant(raw, f"{LONG}.10.q_proj", "adapter")


def checked(settings: GateSettings, answer: str) -> object:
    checker = make_checker(settings)
    assert checker is not None
    return checker(answer)


def of_a_gate(folder: Path) -> object:
    return checked(GateSettings(checker="regex", pattern=SLOW), LONG)


def of_a_row(folder: Path) -> object:
    file = folder / "rows.jsonl"
    file.write_text('{"prompt": "x", "pattern": "(?:\\\\w+\\\\w+)+!"}\n')
    (question,) = read_questions([str(file)], 1)
    assert question.pattern is not None
    return question.pattern.search(LONG)


def of_a_schema(folder: Path) -> object:
    return by_schema(folder, {"type": "string", "pattern": SLOW}, LONG)


def of_a_schema_in_itself(folder: Path) -> object:
    """The pattern is that of a schema with a `$schema`, which a reference leads to."""
    kind = "https://json-schema.org/draft/2020-12/schema"
    schema = {"$schema": kind, "pattern": SLOW, "properties": {"x": {"$ref": "#"}}}
    return by_schema(folder, schema, {"x": LONG})


def of_a_schema_of_another_draft(folder: Path) -> object:
    inner = {"$schema": "http://json-schema.org/draft-07/schema#", "pattern": SLOW}
    return by_schema(folder, {"items": {"allOf": [inner]}}, [LONG])


def by_schema(folder: Path, schema: Any, answer: Any) -> object:
    pytest.importorskip("jsonschema")
    (folder / "s.json").write_text(json.dumps(schema))
    settings = GateSettings(checker="json-schema", schema_file=folder / "s.json")
    return checked(settings, json.dumps(answer))


@pytest.mark.parametrize(
    "ask",
    [of_an_adapter("target_modules"), of_an_adapter("exclude_modules"),
     of_an_adapter("layers_pattern"), of_a_gate, of_a_row, of_a_schema,
     of_a_schema_in_itself, of_a_schema_of_another_draft,
     lambda _: by_pattern({SLOW: 8}, LONG, 4)],
    ids=["targets", "excluded", "layers", "gate", "row", "schema", "itself", "draft",
         "ranks"],
)  # fmt: skip
def test_a_slow_pattern_is_a_named_error_wherever_it_stands(
    tmp_path: Path, half_a_second: None, ask: Callable[[Path], object]
) -> None:
    with pytest.raises(SlowPatternError, match=re.escape(SLOW)):
        ask(tmp_path)


def test_slow_patterns_of_keys_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    (tmp_path / "s.json").write_text('{"items": {"patternProperties": {"(a+)+$": {}}}}')
    with pytest.raises(ConfigError, match="repetitions inside repetitions"):
        make_checker(GateSettings(checker="json-schema", schema_file=tmp_path / "s.json"))


@pytest.mark.parametrize("text", ["(q_proj", "q{99999999999}", "(" * 400 + ")" * 400 + "("])
def test_settings_refuse_what_is_no_pattern(text: str) -> None:
    with pytest.raises(ConfigError, match="neither names nor a pattern"):
        TrainConfig(model="m", data="d", target_modules=text)
