"""The plan of a calibration pass, against figures worked out by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.model_sources.open import open_model_source
from engine.pruning.reconstruction.memory import calibration_peak
from models.config.model_config import ModelConfig

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
}
LAYER = 2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14_336 * 4096 + 2 * 4096
JOINED = 2 * 14_336 * 4096


def test_heads_of_an_8b_model() -> None:
    config = ModelConfig.from_dict(LLAMA_8B)
    planned = calibration_peak(config, 32_768, compute=4, stored=2, channels=False, whole=False)
    states, layer = 4 * 32_768 * 4096 * 4, 4 * (LAYER + JOINED)
    matrices, weights = 5 * 4096**2 * 8, 3 * 4096**2 * 8
    assert planned == states + layer + matrices + weights + 32 * 4096**2 * 2
    assert planned < 8e9
    whole = calibration_peak(config, 32_768, compute=4, stored=2, channels=False, whole=True)
    assert whole - planned == 4 * 8_030_261_248


def test_channels_have_wider_sums() -> None:
    config = ModelConfig.from_dict(LLAMA_8B)
    heads, channels = (
        calibration_peak(config, 4096, compute=4, stored=2, channels=wide, whole=False)
        for wide in (False, True)
    )
    more = (14_336**2 - 4096**2) * 5 * 8 + (14_336 - 4096) * 4096 * (3 * 8 + 32 * 2)
    assert channels - heads == more


@pytest.mark.parametrize("tokens", [0, 1000])
def test_depth_counts_only_what_was_repaired(tokens: int) -> None:
    config = ModelConfig.from_dict(LLAMA_8B)
    deep = config.with_layers(64)
    shallow, twice = (
        calibration_peak(c, tokens, compute=4, stored=2, channels=False, whole=False)
        for c in (config, deep)
    )
    assert twice - shallow == 32 * 4096**2 * 2


def test_delta_heads_are_known(golden: Callable[[str], Path]) -> None:
    config = open_model_source(golden("qwen3_5")).config
    assert calibration_peak(config, 10, compute=4, stored=2, channels=False, whole=False) > 0
