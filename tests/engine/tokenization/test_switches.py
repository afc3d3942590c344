"""Switches of a tokenizer's files are true or false, and what is neither is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError
from engine.tokenization.vocabularies.switches import switch
from tests.support.tokenizer_folder import TokenizerFolder, write_byte_tokenizer


@pytest.mark.parametrize("value", ["false", "no", "", 2, -1, 0.0, 1.0, [], [False], {}])
def test_what_only_counts_as_true_or_false_is_no_switch(value: Any) -> None:
    with pytest.raises(CheckpointError, match="for add_bos_token; expected true or false"):
        switch({"add_bos_token": value}, "add_bos_token")


def test_absent_switches_have_their_default() -> None:
    for settings in ({}, {"legacy": None}):
        assert switch(settings, "legacy", True)
        assert not switch(settings, "legacy")
    assert switch({"legacy": 1}, "legacy")
    assert switch({"legacy": False}, "legacy", True) is False


@pytest.mark.parametrize(
    "content",
    [
        {"split_special_tokens": "false"},
        {"eos_token": {"content": "<x>", "lstrip": "false"}},
        {"added_tokens_decoder": {"38": {"content": "<x>", "special": "no"}}},
        {"eos_token": {"content": "<x>", "normalized": []}},
        {"eos_token": ["<x>"]},
        {"added_tokens_decoder": 5},
    ],
)
def test_odd_declarations_name_the_model(tmp_path: Path, content: dict[str, Any]) -> None:
    write_byte_tokenizer(tmp_path, 40)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="the tokenizer's files") as told:
        TokenizerFolder(tmp_path).load()
    assert str(told.value).startswith(f"{tmp_path}: ")
