"""The plan of a calibration pass, against figures worked out by hand and measured ones."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.memory.simulate.meter import MemoryMeter
from engine.model_sources.open import open_model_source
from engine.pruning.calibration import Calibration
from engine.pruning.reconstruction.importance import reconstruction_scores
from engine.pruning.reconstruction.layer_stream import LayerStream
from engine.pruning.reconstruction.memory import calibration_peak
from engine.pruning.reconstruction.repair import HeadRepair
from engine.pruning.scores import prunable_heads, weight_scores
from engine.pruning.structures.channels import ChannelPruning
from models.config.model_config import ModelConfig
from models.tensor_names import expected_tensors
from tests.support.small_runs import random_examples

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
    states, layer = (4 + 1) * 32_768 * 4096 * 4, 4 * (LAYER + JOINED)
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


@pytest.mark.parametrize("what", ["repair", "scores", "channels"])
@pytest.mark.parametrize(
    ("width", "inner", "rows"), [(256, 512, 30), (256, 512, 4), (128, 640, 20)]
)
def test_what_a_pass_really_holds_is_inside_its_plan(
    golden: Callable[[str], Path], tmp_path: Path, what: str, width: int, inner: int, rows: int
) -> None:
    config = json.loads((golden("llama") / "config.json").read_text()) | {
        "hidden_size": width, "intermediate_size": inner, "head_dim": width // 4,
    }  # fmt: skip
    shapes = expected_tensors(ModelConfig.from_dict(config))
    tensors = {name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    source, examples = open_model_source(tmp_path), random_examples(5, (60,) * rows)
    blank = weight_scores(source, prunable_heads(source, "attention"), "random")
    with MemoryMeter() as meter:
        stream = LayerStream(source, examples, Calibration((), device="cpu", dtype="float32"))
        if what == "repair":
            repair = HeadRepair(stream, 1e-3, None)
            repair.run(blank, {scores.heads.layer: (1,) for scores in blank})
        elif what == "scores":
            reconstruction_scores(blank, stream, "head", 1e-3)
        else:
            channels = ChannelPruning(stream, "l2-reconstruction", 1e-3, None)
            channels.run(inner // 4)
    planned = calibration_peak(
        source.config, 60 * rows, compute=4, stored=4, channels=what == "channels", whole=False
    )
    assert meter.peak.bytes <= planned <= 2.2 * meter.peak.bytes
