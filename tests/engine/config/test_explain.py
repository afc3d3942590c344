"""Suggestions: what a name is misspelt or short for, and the switch that a choice asks for."""

from difflib import get_close_matches

import pytest

from engine.config.aliases import ALIASES
from engine.config.explain import Setting, nearest
from engine.config.sources import build
from engine.config.tasks.inference import EvalSettings, GenerateSettings, Sampling
from engine.config.tasks.quantizing import MergeSettings
from engine.config.tasks.workflow import ValidateSettings
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError

TABLES = (TrainConfig, EvalSettings, GenerateSettings, MergeSettings)
SWITCHES = {name for name, field in TrainConfig.model_fields.items() if field.annotation is bool}


def beginning(name: str) -> str:
    return name.rpartition("_")[0]


def initials(name: str) -> str:
    return "".join(word[0] for word in name.split("_"))


@pytest.mark.parametrize("table", TABLES)
def test_a_beginning_or_initials_suggest_the_only_name_they_are_of(table: type) -> None:
    fields = table.model_fields  # type: ignore[attr-defined]
    tried = 0
    for abbreviated in (beginning, initials):
        for short in {abbreviated(name) for name in fields} - {""}:
            names = [name for name in fields if abbreviated(name) == short]
            others = [*fields, *ALIASES]
            if len(short) == 1 or get_close_matches(short, others, n=1, cutoff=0.75):
                continue  # a usual letter, or misspelt rather than short
            if abbreviated is initials and any(beginning(name) == short for name in fields):
                continue
            assert nearest(short, fields) == (names[0] if len(names) == 1 else None), short
            tried += 1
    assert tried >= 3


@pytest.mark.parametrize(
    ("table", "short", "name"),
    [
        *((table, "m", "model") for table in TABLES),
        (TrainConfig, "d", "data"),
        (TrainConfig, "o", "output_dir"),
        (MergeSettings, "o", "output"),
        (MergeSettings, "a", "adapter"),
        (GenerateSettings, "p", "prompt"),
        (GenerateSettings, "n", "max_new_tokens"),
        (ValidateSettings, "output_dir", "output"),
        (TrainConfig, "output", "output_dir"),
        (TrainConfig, "b", "batch_size"),
        (TrainConfig, "bs", "batch_size"),
        (TrainConfig, "batch", "batch_size"),
        (TrainConfig, "target", "target_modules"),
        *((TrainConfig, word, None) for word in ("eval", "max", "chat", "deepspeed", "zz", "j")),
    ],
)
def test_short_names_of_other_programs(table: type, short: str, name: str | None) -> None:
    assert nearest(short, table.model_fields) == name  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "word", sorted({*SWITCHES, *(alias for alias, name in ALIASES.items() if name in SWITCHES)})
)
@pytest.mark.parametrize("setting", ["method", "optimizer", "lr_schedule"])
def test_a_switch_that_is_given_as_a_choice_is_named(setting: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(model="m", data=["d"], **{setting: word.upper()})
    switch = ALIASES.get(word, word)
    assert f"--{switch.replace('_', '-')}) goes with one of them" in str(caught.value)


def test_many_faults_and_long_values_are_told_in_short() -> None:
    with pytest.raises(ConfigError) as caught:
        build(Sampling, {"logit_bias": Setting({str(n): "x" for n in range(1000)}, "file")})
    assert "and 980 more" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        build(Sampling, {"bad_words_ids": Setting([1] * 100_000, "file")})
    assert str(caught.value).count("`bad_words_ids` = ") == 1


def test_a_name_that_is_no_utf_8_is_told_as_such() -> None:
    with pytest.raises(ConfigError, match=r"`model` = '.udcff' .*should be text in UTF-8"):
        build(GenerateSettings, {"model": Setting("\udcff", "--model")})
