"""What is written means the same to readers of either spelling."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import ConfigError
from engine.model_sources.config_json import complete_config
from engine.model_sources.hf_directory import HFDirectory
from engine.model_sources.interface.checks import read_config
from models.config.model_config import ModelConfig

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir())
NEW = ("rope_parameters", "dtype", "num_local_experts")
OLD = ("rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype", "num_experts")


def without(raw: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """`raw` as a reader sees it that does not know the keys `names`, outside and in its decoder."""
    return {
        key: without(value, names) if key == "text_config" else value
        for key, value in raw.items()
        if key not in names
    }


@pytest.mark.parametrize("unknown", [NEW, OLD], ids=["old reader", "new reader"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reader_of_one_spelling_reads_the_same_model(
    family: str, unknown: tuple[str, ...]
) -> None:
    raw = json.loads((GOLDEN / family / "config.json").read_text())
    config = ModelConfig.from_dict(raw)
    written = complete_config(raw, config, torch.bfloat16)
    assert ModelConfig.from_dict(written) == config
    assert ModelConfig.from_dict(without(written, unknown)) == config
    assert {written["dtype"], written["torch_dtype"]} == {"bfloat16"}


def test_what_is_written_is_no_longer_called_quantised(golden: Callable[[str], Path]) -> None:
    source = HFDirectory(golden("llama"))
    raw = source.raw_config | {"quantization_config": {"quant_method": "bitsandbytes"}}
    assert "quantization_config" not in complete_config(raw, source.config, torch.float32)


def test_notes_in_the_rotary_parameters_stay() -> None:
    raw = json.loads((GOLDEN / "qwen3_5_vl" / "config.json").read_text())
    raw["text_config"]["rope_parameters"]["mrope_section"] = [1, 1, 0]
    written = complete_config(raw, ModelConfig.from_dict(raw), torch.float32)["text_config"]
    assert written["rope_parameters"]["mrope_section"] == [1, 1, 0]
    assert written["rope_scaling"]["mrope_section"] == [1, 1, 0]
    assert written["partial_rotary_factor"] == 0.25


@pytest.mark.parametrize("value", ["x" * 1_000_000, [1] * 100_000, {"a": "\x1b" * 10_000}])
@pytest.mark.parametrize("key", ["hidden_size", "hidden_act", "rms_norm_eps", "layer_types"])
def test_a_long_value_is_told_in_short(key: str, value: object) -> None:
    raw = json.loads((GOLDEN / "qwen3" / "config.json").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError, match=f"config.json: {key}") as caught:
        read_config(raw | {key: value}, "config.json")
    assert len(str(caught.value)) < 1500
    assert str(caught.value).isprintable()
