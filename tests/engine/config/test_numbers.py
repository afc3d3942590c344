"""Every number of every table of settings, in all the forms that numbers come in."""

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine.config
from engine.config.numbers import MOST, takes_numbers
from engine.config.settings import Settings
from engine.config.sources import load_config
from engine.config.spelling import size_in_bytes
from engine.config.tasks.corpus import MixSettings
from engine.config.tasks.pruning import PruneSettings
from engine.config.tasks.workflow import PlanSettings
from engine.config.train_config import TrainConfig
from engine.errors import ConfigError
from models.layers.context import layer_policies

NO_NUMBERS = [
    True, False, np.True_, [True], {"a": True}, float("nan"), float("inf"), float("-inf"),
    np.float32("nan"), np.array([[1.5]]), Decimal("NaN"), Decimal("sNaN"), Decimal("1e999999"),
    10**400, -(10**400), 10**5000, 2**64, "nan", "inf", "-Infinity", "1" + "0" * 400, "9" * 5000,
    "1e400", "true", "0x10", "１", "\u0661", "\u00b2", "\u00bd", "1e", "--1", "1:30", "\x1b[2J",
    "\x00", "a" * 100_000, object(), b"\xff", 1j, "\ud800",
]  # fmt: skip


def _tables(table: type[Settings] = Settings) -> Iterator[type[Settings]]:
    for module in pkgutil.walk_packages(engine.config.__path__, "engine.config."):
        importlib.import_module(module.name)
    waiting = [table]
    while waiting:
        below = waiting.pop().__subclasses__()
        waiting += below
        yield from (each for each in below if each.__module__.startswith("engine."))


def _number_fields() -> dict[tuple[str, str], tuple[type[Settings], str]]:
    """The fields of numbers, those that several tables share once."""
    return {
        (name, repr(field)): (table, name)
        for table in _tables()
        for name, field in table.model_fields.items()
        if takes_numbers(field.annotation)
    }


def _faults(table: type[Settings], name: str, value: Any) -> str:
    """What a table says of a value; empty where it takes it, whatever else it may lack."""
    try:
        table(**{name: value})
    except ConfigError as error:
        text = str(error)
        assert text.isprintable(), (table, name, value)
        assert len(text) < 4500, (table, name, value)
        return text if f"`{name}` = " in text else ""
    return ""


def _is_one_number(table: type[Settings], name: str) -> bool:
    """Whether a field is a number, and no text or list of numbers, which reads more."""
    annotation = str(table.model_fields[name].annotation)
    return not any(word in annotation for word in ("tuple", "dict"))


def test_what_is_no_number_is_refused_for_every_number() -> None:
    fields = _number_fields()
    assert len(fields) > 100
    for table, name in fields.values():
        is_real = "float" in str(table.model_fields[name].annotation)
        for value in NO_NUMBERS:
            refused = _faults(table, name, value)
            taken = is_real and value == 2**64 if isinstance(value, int) else False
            taken = taken or (value is False and name in ("fit_memory", "max_steps"))
            taken = taken or (type(value) is int and value == 2**64 and name == "top_k")  # all
            assert refused or taken or not _is_one_number(table, name), (table, name, value)


@pytest.mark.parametrize(
    "value", [3, 3.0, "3", " 3 ", "+3", np.int64(3), np.float32(3), np.array(3), Decimal(3), b"3"]
)
def test_a_number_is_read_in_every_form(value: Any) -> None:
    config = TrainConfig(
        model="m",
        data=["d"],
        lora_rank=value,
        lora_alpha=value,
        max_steps=value,
        mlp_tile_tokens=16,
    )
    assert (config.lora_rank, config.lora_alpha, config.max_steps) == (3, 3.0, 3)
    assert type(config.lora_rank) is int
    assert TrainConfig(model="m", data=["d"], lora_alpha=Fraction(1, 4)).lora_alpha == 0.25


def test_whole_numbers_end_where_floats_hold_them_exactly() -> None:
    config = TrainConfig(model="m", data=["d"], limit_rows=MOST, seed=2**63 - 1)
    assert json.loads(json.dumps(config.stored()))["limit_rows"] == MOST
    with pytest.raises(ConfigError, match="`limit_rows` = 9007199254740993: should be at most"):
        TrainConfig(model="m", data=["d"], limit_rows=MOST + 1)
    with pytest.raises(ConfigError, match="`early_stopping`"):
        TrainConfig(model="m", data=["d"], eval_data=["e"], early_stopping=f"{MOST + 1},0.1")


def test_a_norm_that_float32_does_not_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`max_grad_norm` = 1e.300"):
        TrainConfig(model="m", data=["d"], max_grad_norm=1e300)


def test_every_time_has_an_end_that_clocks_take() -> None:
    times = [
        (table, name)
        for table in _tables()
        for name, field in table.model_fields.items()
        if re.search("second|timeout", name) or str(field.description).startswith("seconds ")
        if takes_numbers(field.annotation)
    ]
    assert len(times) > 5
    for table, name in times:
        assert _faults(table, name, 1e10), (table, name)


@pytest.mark.parametrize("value", [0, -1, 1.0, 1000, "1KiB"])
def test_memory_below_a_mebibyte_is_refused_as_number_and_as_text(value: Any) -> None:
    with pytest.raises(ValueError, match="less than 1 MiB"):
        size_in_bytes(value)


@pytest.mark.parametrize("gpus", ["1e30", "1.5", "0", "8x", "8xlarge 4", "x8", "10000"])
def test_a_text_with_a_number_in_it_is_no_number_of_gpus(gpus: str) -> None:
    with pytest.raises(ConfigError, match=r"`gpus` = .*should be a number of GPUs"):
        PlanSettings(gpus=gpus)
    patterns = [
        limit.pattern
        for table in _tables()
        for field in table.model_fields.values()
        for limit in field.metadata
        if getattr(limit, "pattern", None)
    ]
    assert len(patterns) > 9
    assert all(pattern[0] == "^" and pattern[-1] == "$" for pattern in patterns)


def test_a_path_that_is_no_text_can_be_hashed() -> None:
    config = TrainConfig(model="m", data=["d"], output_dir="runs/\udcff")
    assert hash(config) == hash(TrainConfig(model="m", data=["d"], output_dir="runs/\udcff"))


@pytest.mark.parametrize("field", ["output_dir", "token_cache", "reference_cache"])
@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_refused(field: str, name: str) -> None:
    told = "(holds a character that no file|should be text in UTF-8)"
    with pytest.raises(ConfigError, match=rf"`{field}` = 'a.*b': {told}"):
        TrainConfig(**dict[str, Any]({"model": "m", "data": ["d"], field: name}))


@pytest.mark.parametrize("name", ["s3://b/k", "file:///tmp/x", "hf://a/b", "http://x", ""])
def test_a_url_or_nothing_is_no_path(name: str) -> None:
    told = "is a URL; a path on this machine" if name else "is empty; name a file"
    with pytest.raises(ConfigError, match=f"`output_dir` = .*{told}"):
        TrainConfig(model="m", data=["d"], output_dir=name)
    assert TrainConfig(model="m", data=["d"], output_dir="a:b/c").output_dir == Path("a:b/c")


def test_a_refusal_may_quote_a_name_that_is_no_utf8() -> None:
    with pytest.raises(ConfigError, match=r"sample_prompts a\\udcff would never be answered"):
        TrainConfig(model="m", data="d", sample_prompts="a\udcff")


def test_keys_that_are_no_text_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no setting `1`"):
        MixSettings(**dict[str, Any](sources=[{1: 2}], output="x.jsonl"))


@pytest.mark.parametrize("count", ["99999999999", "\u00b2", "\u0661"])
def test_numbers_of_layers_are_short_and_ascii(count: str) -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        TrainConfig(model="m", data=["d"], gradient_checkpointing=f"full:{count},none")
    with pytest.raises(ValueError, match="checkpointing policy"):
        layer_policies(f"full:{count},none", 4)


@pytest.mark.parametrize("digits", ["\u0660", "\uff10,1", "1,\u0967"])
def test_layers_are_listed_in_the_digits_0_to_9(digits: str) -> None:
    with pytest.raises(ConfigError, match="`protect`"):
        PruneSettings(protect=digits)


def test_an_empty_mapping_is_no_value_of_a_setting(tmp_path: Path) -> None:
    """It is nothing only where it stands for a group of settings."""
    file = tmp_path / "c.yaml"
    file.write_text("batch_size: {}\n")
    with pytest.raises(ConfigError, match="`batch_size`"):
        load_config(file, flags={"model": "m", "data": ["d"]})
    file.write_text("bach_size: {}\n")
    with pytest.raises(ConfigError, match="did you mean `batch_size`"):
        load_config(file)
    file.write_text("lora: {}\nchat_template_kwargs: {}\n")
    assert load_config(file, flags={"model": "m", "data": ["d"]}).chat_template_kwargs == {}
