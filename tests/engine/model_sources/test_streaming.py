"""What reads or writes models holds one tensor at a time: resident memory of a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.memory.merging import host_peak, merge_peak, verification_peak
from engine.memory.model_shapes import preset_config
from engine.memory.simulate.meter import MemoryMeter
from engine.model_sources.interface.row_parts import PART
from engine.model_sources.load_model import _PART, _all_finite
from models.config.model_config import ModelConfig
from models.tensor_names import PROJECTIONS, expected_tensors

CHILD = Path(__file__).parents[3] / "tests" / "support" / "processes" / "streaming_child.py"
RAW = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
}
SHALLOW, DEEP = 1, 4
HEAD = 8192 * 1024 * 2
"""Bytes of the largest tensor in the files."""

OTHER = 6 << 20
"""What a process takes besides: modules that are imported on the way, small buffers."""


@pytest.fixture(scope="module")
def rises(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, int]]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    folder = tmp_path_factory.mktemp("streaming")
    # Every buffer of 64 KiB and more goes back to the system when it is freed.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    words = [sys.executable, str(CHILD), str(folder), json.dumps(RAW), json.dumps([SHALLOW, DEEP])]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    figures: list[dict[str, int]] = json.loads(done.stdout)
    return figures


def test_a_merge_holds_one_layer_however_deep_the_model(rises: list[dict[str, int]]) -> None:
    for kind in ("merge", "unverified"):
        shallow, deep = (rise[kind] for rise in rises)
        assert deep - shallow < OTHER  # three layers more are 90 MB in the files
    for layers, rise in zip((SHALLOW, DEEP), rises, strict=True):
        config = ModelConfig.from_dict(RAW | {"num_hidden_layers": layers})
        adapter = 4 * layers * 4 * (4 * 1024 + 1024 + 1024 + 256 + 256 + 3 * (1024 + 4096))
        written = host_peak(config, torch.bfloat16, PROJECTIONS, adapter)
        assert written == pytest.approx(4096 * 1024 * (2 + 4 + 2) + adapter)
        assert abs(rise["unverified"] - written) < OTHER
        planned = merge_peak(config, torch.bfloat16, PROJECTIONS, adapter)
        layer = 1024 * (2 * 1024 + 2 * 256 + 3 * 4096 + 2)
        assert planned == 4 * (layer + 2 * 4096 * 1024) + adapter
        assert abs(rise["merge"] - planned) < OTHER


def test_no_verb_that_writes_a_model_holds_more_of_a_deeper_one(
    rises: list[dict[str, int]],
) -> None:
    shallow, deep = rises
    verbs = shallow.keys() - {"load", "left"}
    assert len(verbs) == 10
    for verb in verbs:
        assert deep[verb] - shallow[verb] < OTHER, verb


def test_a_head_is_written_some_rows_at_a_time(rises: list[dict[str, int]]) -> None:
    part = 4 * PART  # in fp32
    assert 2 * part == 4 * 8192 * 1024  # the whole head
    for rise in rises:
        # Only copied: a part as it is mapped. Dequantised: a part and its new form.
        assert rise["16"] < HEAD + OTHER
        assert rise["gguf"] < HEAD + OTHER
        assert rise["gguf of a gguf"] < 2 * part + OTHER
        # As much as the largest projection: the part that is mapped, in fp32, and rounded.
        assert abs(rise["head"] - rise["unverified"]) < OTHER


def test_a_merge_of_70_billion_parameters_needs_less_than_8_gb() -> None:
    model = preset_config("llama-3.3-70b")
    assert model is not None
    adapter = 4 * 207_093_760  # rank 16 on every projection
    peak = host_peak(model, torch.bfloat16, PROJECTIONS, adapter)
    assert peak == 28_672 * 8192 * (2 + 4 + 2) + adapter
    assert peak < 3e9
    assert verification_peak(model) == 4 * (855_654_400 + 2 * 28_672 * 8192)
    assert merge_peak(model, torch.bfloat16, PROJECTIONS, adapter) < 8e9
    # Of the head, adapted too, there are some rows in memory.
    assert host_peak(model, torch.bfloat16, {*PROJECTIONS, "lm_head"}, adapter) == peak


def test_loading_takes_less_than_one_and_a_half_of_the_largest_tensor(
    rises: list[dict[str, int]],
) -> None:
    for layers, rise in zip((SHALLOW, DEEP), rises, strict=True):
        config = ModelConfig.from_dict(RAW | {"num_hidden_layers": layers})
        shapes = expected_tensors(config)
        assert max(2 * torch.Size(shape).numel() for shape in shapes.values()) == HEAD
        assert rise["load"] - rise["left"] < 1.5 * HEAD


def test_what_is_not_finite_is_found_in_every_part_without_a_copy_of_the_whole() -> None:
    values = torch.zeros(3 * _PART + 5, dtype=torch.bfloat16)
    with MemoryMeter() as meter:
        assert _all_finite(values)
    own = values.untyped_storage().nbytes()
    assert meter.peak.bytes - own <= 2 * 4 * _PART
    for index in (0, _PART, 2 * _PART - 1, 3 * _PART + 4):
        for bad in (torch.inf, -torch.inf, torch.nan):
            values[index] = bad
            assert not _all_finite(values)
        values[index] = 0
