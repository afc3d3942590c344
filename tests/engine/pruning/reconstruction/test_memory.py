"""The plan of a calibration pass, against figures worked out by hand and measured ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.config.tasks.pruning import PruneSettings
from engine.memory.simulate.meter import MemoryMeter
from engine.model_sources.open import open_model_source
from engine.pruning.reconstruction.from_settings import memory_of
from engine.pruning.reconstruction.memory import calibration_peak, weight_bytes
from engine.verbs.models.prune import prune
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
    planned = calibration_peak(config, 32_768, compute=4, stored=2, channels=False)
    states, layer = (4 + 1) * 32_768 * 4096 * 4, 4 * (LAYER + JOINED)
    matrices, weights = 5 * 4096**2 * 8, 3 * 4096**2 * 8
    assert planned == states + layer + matrices + weights + 32 * 4096**2 * 2
    assert planned < 8e9
    assert weight_bytes(config, 4, None) == 4 * 8_030_261_248
    # Of these are 7.0 billion in the projections; embedding, head and norms are not quantised.
    assert 4 * 1_051_000_000 + 0.5 * 6.979e9 < weight_bytes(config, 4, "nf4") < 8e9


def test_channels_have_wider_sums() -> None:
    config = ModelConfig.from_dict(LLAMA_8B)
    heads, channels = (
        calibration_peak(config, 4096, compute=4, stored=2, channels=wide) for wide in (False, True)
    )
    more = (14_336**2 - 4096**2) * 5 * 8 + (14_336 - 4096) * 4096 * (3 * 8 + 32 * 2)
    assert channels - heads == more


@pytest.mark.parametrize("tokens", [0, 1000])
def test_depth_counts_only_what_was_repaired(tokens: int) -> None:
    config = ModelConfig.from_dict(LLAMA_8B)
    deep = config.with_layers(64)
    shallow, twice = (
        calibration_peak(c, tokens, compute=4, stored=2, channels=False) for c in (config, deep)
    )
    assert twice - shallow == 32 * 4096**2 * 2


def test_delta_heads_are_known(golden: Callable[[str], Path]) -> None:
    config = open_model_source(golden("qwen3_5")).config
    assert calibration_peak(config, 10, compute=4, stored=2, channels=False) > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"metric": "random"},
        {"metric": "l2-output", "repair": "none"},
        {"metric": "gradient"},
        {"scope": "global"},
        {"scope": "sensitivity"},
        {"what": "mlp"},
        {"what": "layers"},
        {"what": "layers", "metric": "cosine"},
        {"target": "params=0.8", "what": "heads,mlp,layers"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
@pytest.mark.parametrize(("width", "inner", "rows"), [(256, 512, 4), (128, 640, 20)])
def test_what_pruning_really_holds_is_inside_its_plan(
    golden: Callable[[str], Path],
    tmp_path: Path,
    write_rows: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    width: int,
    inner: int,
    rows: int,
) -> None:
    given: dict[str, Any] = {"data": (str(write_rows(2)),), "device": "cpu", "fraction": 0.25}
    given |= {"dtype": "float32", "compute_dtype": "float32"}
    if "target" in settings:
        del given["fraction"]
    asked, examples = PruneSettings(**given | settings), random_examples(5, (60,) * rows)
    for module in ("reconstruction.from_settings", "structures.prune_structures", "budgets.mixed"):
        monkeypatch.setattr(f"engine.pruning.{module}.calibration_examples", lambda *_: examples)
    config = json.loads((golden("llama") / "config.json").read_text()) | {
        "hidden_size": width, "intermediate_size": inner, "head_dim": width // 4,
        "num_hidden_layers": 4,
    }  # fmt: skip
    shapes = expected_tensors(ModelConfig.from_dict(config))
    tensors = {name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}
    model = tmp_path / "model"
    model.mkdir()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_text(json.dumps(config))
    planned = memory_of(open_model_source(model), examples, asked)
    with MemoryMeter() as meter:
        prune(model, tmp_path / "out", asked)
    assert meter.peak.bytes <= planned <= 2.2 * meter.peak.bytes
